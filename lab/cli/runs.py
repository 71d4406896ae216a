"""List past runs, the newest first: what they were made of, how they ended, what they gave.

lab runs
lab runs distill
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from lab.cli import options as shared

HELP = "list past runs"
COLUMNS = ("id", "recipe", "group", "seed", "status", "started", "took", "result")
WIDTH = 160
"""Columns of text where nobody watches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab runs``."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="only this recipe's runs: its name or file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs lie (default: runs)")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Read manifests and results; a folder whose files are damaged is listed as that."""
    from lab.errors import UserError
    from lab.registry import nearest
    from lab.run import RUNS, folders

    out = options.out or RUNS
    found = sorted(folders(out), key=lambda folder: folder.name, reverse=True)
    if options.recipe is not None:
        name = Path(options.recipe).stem if options.recipe.endswith((".yaml", ".yml")) else options.recipe
        recipes = {folder.parent.name for folder in found}
        if name not in recipes:
            raise UserError(f"no runs of a recipe '{name}' in {out}/{nearest(name, recipes)}")
        found = [folder for folder in found if folder.parent.name == name]
    rows = [_row(folder) for folder in found]
    if options.json:
        import json

        print(json.dumps(rows, indent=2, allow_nan=False))
    elif rows:
        _print(rows)
    else:
        print(f"no runs in {out}/")
    return 0


def _row(folder: Path) -> dict[str, Any]:
    """A run as ``--json`` has it; damaged ones say why, and only what their folder's name says."""
    from lab.run import Run, RunNotFound

    this = Run(folder)
    known = {"id": this.id, "recipe": folder.parent.name, "folder": str(folder)}
    try:
        manifest, results = this.manifest, this.results
        stages = {name: _result(stage) for name, stage in results.get("stages", {}).items()}
        group, started = manifest.get("group"), manifest.get("started")
        return {
            **known, "group": group if group != this.id else None, "seed": manifest.get("seed"),
            "status": str(results.get("status")), "started": started,
            "seconds": _seconds(started, results.get("ended")), "stages": stages,
        }  # fmt: skip
    except (RunNotFound, AttributeError, TypeError, ValueError) as cause:
        return {**known, "status": "damaged", "error": str(cause)}


def _result(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's status, and its main metric where it has one."""
    import math

    from lab.report import metrics

    names = metrics({"": stage})
    if not names:
        return {"status": stage.get("status")}
    value = float(stage["metrics"][names[0]])
    return {"status": stage.get("status"), "metric": names[0], "value": value if math.isfinite(value) else None}


def _seconds(started: Any, ended: Any) -> float | None:
    """How long a run took; None where it is running, or ended before this was written down."""
    from datetime import datetime

    if not (isinstance(started, str) and isinstance(ended, str)):
        return None
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()


def _print(rows: list[dict[str, Any]]) -> None:
    """A table by hand, as ``lab list`` does; the last column is cut where the terminal ends."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    table = [COLUMNS, *(_cells(row) for row in rows)]
    shown = [i for i in range(len(COLUMNS)) if any(line[i] for line in table[1:])]
    widths = {i: max(len(line[i]) for line in table) for i in shown}
    for line in table:
        text = "  ".join(line[i].ljust(widths[i]) for i in shown).rstrip()
        print(text if len(text) <= width else f"{text[: width - 1]}…")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    stages = row.get("stages", {})
    results = [
        f"{name if len(stages) > 1 else ''} {stage['value']:.4f}".strip()
        for name, stage in stages.items()
        if stage.get("value") is not None
    ]
    metrics = dict.fromkeys(stage["metric"].removeprefix("test/") for stage in stages.values() if "metric" in stage)
    seconds = row.get("seconds")
    cells = (
        row["id"], row["recipe"], row.get("group") or "", "" if row.get("seed") is None else str(row["seed"]),
        row["status"], str(row.get("started") or "")[:16].replace("T", " "), "" if seconds is None else _took(seconds),
        f"{'/'.join(metrics)}: {', '.join(results)}" if results else row.get("error", ""),
    )  # fmt: skip
    return tuple(shared.plain(cell) for cell in cells)


def _took(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
