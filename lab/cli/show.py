"""Print the resolved recipe, merged and with defaults, as YAML that runs again.

lab show distill stages.student.module.temperature=2
"""

from __future__ import annotations

import argparse

from lab.cli import options as shared

HELP = "print the resolved recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab show``."""
    shared.add_recipe(parser)


def run(options: argparse.Namespace) -> int:
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
    print(document.dump(plan.resolved()), end="")
    for stage in plan.stages.values():
        prefix = f"stages.{stage.name}." if stage.name != ONLY_STAGE else ""
        for component in stage.components():
            if isinstance(component, Component):
                for name, source in component.filled.items():
                    print(f"# {prefix}{'.'.join((*component.path, name))}: <from {source.removeprefix('the ')}>")
    return 0
