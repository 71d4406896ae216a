"""List past runs, the newest first: what they were made of, how they ended, what they gave; or clear some away.

lab runs
lab runs distill
lab runs --prune --older-than 30
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from lab.cli import options as shared

HELP = "list past runs, or clear some away"
COLUMNS = ("id", "recipe", "group", "seed", "status", "started", "took", "result")
WIDTH = 160
"""Columns of text where nobody watches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab runs``."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="only this recipe's runs: its name or file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs lie (default: runs)")
    parser.add_argument(
        "--prune", action="store_true", help="remove runs that did not finish, and those made with --smoke"
    )
    parser.add_argument(
        "--older-than", type=float, metavar="DAYS", help="with --prune: finished runs that are older, too"
    )
    parser.add_argument("--yes", action="store_true", help="with --prune: don't ask")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Read manifests and results; a folder whose files are damaged is listed as that."""
    from lab.errors import UserError
    from lab.registry import nearest
    from lab.run import RUNS, folders

    if not options.prune and (options.yes or options.older_than is not None):
        raise UserError("--older-than and --yes go with --prune")
    out = options.out or RUNS
    found = sorted(folders(out), key=lambda folder: folder.name, reverse=True)
    if options.recipe is not None:
        name = Path(options.recipe).stem if options.recipe.endswith((".yaml", ".yml")) else options.recipe
        recipes = {folder.parent.name for folder in found}
        if name not in recipes:
            raise UserError(f"no runs of a recipe '{name}' in {out}/{nearest(name, recipes)}")
        found = [folder for folder in found if folder.parent.name == name]
    if options.prune:
        return _prune(out, {folder.parent.name for folder in found}, options)
    rows = [_row(folder) for folder in found]
    if options.json:
        import json

        print(json.dumps(rows, indent=2, allow_nan=False))
    elif rows:
        _print(rows)
    else:
        print(f"no runs in {out}/")
    return 0


def _prune(out: Path, recipes: set[str], options: argparse.Namespace) -> int:
    """Say what can go and what that frees, ask, and remove it."""
    import json

    from lab import clearing
    from lab.errors import UserError

    if options.older_than is not None and not options.older_than >= 0:
        raise UserError(f"--older-than takes days, 0 at least, got {options.older_than:g}")
    only = next(iter(recipes)) if options.recipe is not None else None
    chosen = clearing.select(out, recipe=only, older_than=options.older_than)
    if not options.json:
        lines = [(one.folder.name, one.folder.parent.name, one.why, _bytes(one.size)) for one in chosen]
        widths = [max(len(line[i]) for line in lines) for i in range(4)] if lines else []
        for line in lines:
            print(shared.plain("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()))
        print(f"{_counted(len(chosen))} to remove, {_bytes(sum(one.size for one in chosen))}")
    if chosen and not options.yes:
        if options.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise UserError("nothing was removed: --yes removes these runs without a question")
        if input("Remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 0
    gone = clearing.remove(out, chosen)
    freed = sum(one.size for one in gone)
    if options.json:
        rows = [{"folder": str(one.folder), "why": one.why, "bytes": one.size} for one in gone]
        print(json.dumps({"removed": rows, "freed": freed}, indent=2))
    elif chosen:
        print(f"{_counted(len(gone))} removed, {_bytes(freed)} freed")
    return 0


def _counted(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"


def _bytes(size: int) -> str:
    for unit, letters in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {letters}"
    return f"{size} B"


def _row(folder: Path) -> dict[str, Any]:
    """A run as ``--json`` has it; damaged ones say why, and only what their folder's name says."""
    from lab.lineage import seconds
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
            "seconds": seconds(started, results.get("ended")), "stages": stages,
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
        row["status"], str(row.get("started") or "")[:16].replace("T", " "), "" if seconds is None else took(seconds),
        f"{'/'.join(metrics)}: {', '.join(results)}" if results else row.get("error", ""),
    )  # fmt: skip
    return tuple(shared.plain(cell) for cell in cells)


def took(seconds: float) -> str:
    """Seconds, minutes or hours, as people say them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
