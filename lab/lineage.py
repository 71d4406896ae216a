"""Where a run came from: what made it, and for each stage the networks that it started from, through other runs.

Read from the runs' files; nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lab import recipe, report
from lab.document import Node
from lab.errors import UserError
from lab.run import Run, locate, stage_of

FACTS = ("recipe", "started", "command", "seed", "group", "smoke", "git", "versions", "hardware", "plugins", "imports")
"""What of a run's manifest is told."""
RESULTS = ("status", "cached", "checkpoint", "error", "missed", "fingerprint")
"""What of a stage's results is told, beside its main metric."""


def lineage(this: Run, only: str | None = None) -> dict[str, Any]:
    """What a run was made of, stage by stage, as plain data.

    Args:
        only: one stage instead of all.

    Returns:
        Of each stage, ``from`` has a mapping for every reference: where it stands (``at``), what it says (``source``,
        ``options``), the ``run`` and ``stage`` that it means, with their status, main metric and own ``from``; or why
        it is ``missing``. What was told of already says ``again`` and no ``from``.

    Raises:
        RunNotFound: the run is damaged.
    """
    manifest, results = this.manifest, this.results
    stages = _mapping(results.get("stages"))
    names = [only] if only else list(dict.fromkeys((*_references(this.folder), *stages)))
    return {
        "id": this.id,
        "folder": str(this.folder),
        "status": str(results.get("status")),
        **{fact: manifest.get(fact) for fact in FACTS},
        "ended": results.get("ended"),
        "seconds": seconds(manifest.get("started"), results.get("ended")),
        "stages": {
            name: {
                **_said(stages.get(name)),
                "data": _mapping(manifest.get("data")).get(name),
                "from": _origins(this, name, {(this.folder.resolve(), name)}),
            }
            for name in names
        },
        "again": shlex.join(_again(this, manifest)),
    }


def seconds(started: Any, ended: Any) -> float | None:
    """How long a run took; None where it is running, or ended before this was written down."""
    if not (isinstance(started, str) and isinstance(ended, str)):
        return None
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()


def _said(stage: Any) -> dict[str, Any]:
    """A stage's results in short; nothing where it hasn't begun."""
    told: dict[str, Any] = {"status": "not run"}
    told |= {key: value for key in RESULTS if (value := _mapping(stage).get(key)) not in (None, [])}
    metrics = _mapping(_mapping(stage).get("metrics"))
    for name in report.metrics({"": {"metrics": metrics}})[:1]:
        value = metrics[name]
        told["metric"], told["value"] = name, value if isinstance(value, int | float) and math.isfinite(value) else None
    return told


def _origins(this: Run, stage: str, told: set[tuple[Path, str]]) -> list[dict[str, Any]]:
    """What a stage started from, and what that did."""
    found: list[dict[str, Any]] = []
    for path, node in _references(this.folder).get(stage, []):
        options = {name: child.plain() for name, child in node.mapping.items() if name != "from"}
        entry = {"at": ".".join(path), "source": str(node.mapping["from"].value), "options": options}
        try:
            origin, name = _meant(this, node)
            results = _mapping(origin.results.get("stages")).get(name)
        except UserError as cause:
            found.append({**entry, "missing": str(cause)})
            continue
        entry |= {"run": origin.id, "stage": name, **_said(results)}
        place = (origin.folder.resolve(), name)
        if place in told:
            found.append({**entry, "again": True})
        else:
            told.add(place)
            found.append({**entry, "from": _origins(origin, name, told)})
    return found


def _meant(this: Run, node: Node) -> tuple[Run, str]:
    """The run and stage that a reference means: what it meant when the run began, else what it means now."""
    source = str(node.mapping["from"].value)
    if "/" not in source:
        return this, source
    pinned = _mapping(this.manifest.get("origins")).get(source)
    if isinstance(pinned, str) and (folder := Path(os.path.normpath(this.folder / pinned))).is_dir():
        return Run(folder.parent), folder.name
    folder = stage_of(*locate(source, node.place.folder))
    return Run(Path(os.path.normpath(folder.parent))), folder.name


def _references(folder: Path) -> dict[str, list[tuple[tuple[str, ...], Node]]]:
    """Every ``{from: ...}`` of a run's stages; nothing where its recipe is damaged."""
    try:
        found = recipe.load(Run(folder).recipe)
    except UserError:
        return {}
    return {name: list(recipe.references(node)) for name, node in found.stages.items()}


def _again(this: Run, manifest: Mapping[str, Any]) -> list[str]:
    """The command that does the same once more."""
    imports = manifest.get("imports")
    flags = [f"--import={package}" for package in imports] if isinstance(imports, list) else []
    return ["lab", "fit", str(this.recipe), *flags, *(["--smoke"] if manifest.get("smoke") else [])]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
