"""Print the resolved recipe, merged and with defaults, as YAML that runs again; or where a run came from.

lab show distill stages.student.module.temperature=2
lab show latest
lab show runs/distill/20260101-000000-abcdef/student
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.cli import options as shared

HELP = "print the resolved recipe, or where a run came from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab show``."""
    parser.add_argument(
        "recipe", metavar="RECIPE|RUN", help="a file or bundled recipe; or a run's folder, id, `latest`, or RUN/STAGE"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="of a recipe, such as trainer.max_epochs=3")
    shared.add_import(parser)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """A file or a bundled recipe's name is a recipe, anything else a run."""
    from lab import recipe

    if recipe.names(options.recipe):
        _show_recipe(options)
    else:
        _show_run(options)
    return 0


def _show_recipe(options: argparse.Namespace) -> None:
    """What the data, trainer or run will fill in stands as a comment at the end."""
    from lab import document, recipe
    from lab.check import check
    from lab.plan import Component
    from lab.recipe import ONLY_STAGE
    from lab.registry import allow

    for package in options.imports:
        allow(package)
    with shared.uncollected():
        plan = check(recipe.load(options.recipe, options.overrides))
    if options.json:
        _print_json(plan.resolved())
        return
    print(document.dump(plan.resolved()), end="")
    for stage in plan.stages.values():
        prefix = f"stages.{stage.name}." if stage.name != ONLY_STAGE else ""
        for component in stage.components():
            if isinstance(component, Component):
                for name, source in component.filled.items():
                    print(f"# {prefix}{'.'.join((*component.path, name))}: <from {source.removeprefix('the ')}>")


def _show_run(options: argparse.Namespace) -> None:
    from lab.errors import UserError
    from lab.lineage import lineage
    from lab.recipe import bundled
    from lab.registry import nearest
    from lab.run import RunNotFound, locate

    try:
        this, stage = locate(options.recipe)
    except RunNotFound as unknown:
        if len(Path(options.recipe).parts) > 1:
            raise
        recipes = nearest(options.recipe, bundled())
        raise UserError(f"{unknown}; and no bundled recipe of that name{recipes}") from unknown
    if options.overrides:
        raise UserError(f"a run is as it is, it takes no overrides: lab show {this.recipe} {options.overrides[0]}")
    found = lineage(this, stage)
    if options.json:
        _print_json(found)
        return
    for line in (*_of_run(found), "", *_of_stages(found["stages"]), f"again: {found['again']}"):
        print(shared.plain(line))


def _print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=2, default=str))


def _of_run(found: dict[str, Any]) -> Iterator[str]:
    """What made the run, a line each; what there is nothing of has none."""
    from lab.cli.runs import took

    duration = f", took {took(found['seconds'])}" if found["seconds"] is not None else ""
    facts = {
        "run": found["folder"],
        "recipe": found["recipe"],
        "status": f"{found['status']}{', shortened (--smoke)' if found['smoke'] else ''}",
        "started": f"{str(found['started'])[:16].replace('T', ' ')}{duration}",
        "command": " ".join(map(str, found["command"])) if isinstance(found["command"], list) else None,
        "seed": found["seed"],
        "group": found["group"] if found["group"] != found["id"] else None,
        "git": _commit(found["git"]),
        "versions": _listed(found["versions"]),
        "hardware": _listed(found["hardware"]),
        "plugins": _listed(found["plugins"]),
        "imports": ", ".join(map(str, found["imports"])) if isinstance(found["imports"], list) else None,
    }
    yield from _aligned(facts)


def _of_stages(stages: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Every stage, and below it what it started from."""
    for name, stage in stages.items():
        cached = f", cached from {stage['cached']}" if stage.get("cached") else ""
        yield f"{name}: {stage['status']}{cached}"
        missed = stage.get("missed")
        facts = {
            stage.get("metric", "metric"): _value(stage),
            "data": str(stage["data"])[:12] if stage["data"] else None,
            "checkpoint": stage.get("checkpoint"),
            "missed": "; ".join(map(str, missed)) if isinstance(missed, list) else None,
            "error": str(stage["error"]).partition("\n")[0] if "error" in stage else None,
        }
        for line in (*_aligned(facts), *_tree(stage["from"])):
            yield f"  {line}"
        yield ""


def _tree(origins: list[dict[str, Any]]) -> Iterator[str]:
    for origin in origins:
        options = "".join(f", {key}: {value}" for key, value in origin["options"].items())
        said = f"{origin['at']} from {origin['source']}{options}"
        if "missing" in origin:
            yield f"{said}: missing: {origin['missing']}"
            continue
        place = f"{origin['run']}/{origin['stage']}"
        value = f", {origin['metric']} {_value(origin)}" if _value(origin) else ""
        meant = f" ({place})" if "/" in origin["source"] and origin["source"] != place else ""
        yield f"{said}{meant}: {origin['status']}{value}{', as above' if 'again' in origin else ''}"
        for line in _tree(origin.get("from", [])):
            yield f"  {line}"


def _value(stage: dict[str, Any]) -> str | None:
    return f"{stage['value']:.4f}" if stage.get("value") is not None else None


def _commit(git: Any) -> str | None:
    if not isinstance(git, dict):
        return None
    return f"{git.get('commit')}{' and uncommitted changes' if git.get('dirty') else ''}"


def _listed(facts: Any) -> str | None:
    if not isinstance(facts, dict):
        return None
    named = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in facts.items()}
    return ", ".join(f"{key} {value}" for key, value in named.items() if value not in (None, ""))


def _aligned(facts: dict[str, Any]) -> Iterator[str]:
    shown = {name: str(value) for name, value in facts.items() if value not in (None, "")}
    width = max(map(len, shown), default=0)
    yield from (f"{name.ljust(width)}  {value}" for name, value in shown.items())
