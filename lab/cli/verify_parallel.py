"""Prove that a recipe's weights don't depend on how many processes share its batches.

Every stage is trained for a few steps, on CPU and in float64, by one process that takes a global batch at once, and in
other ways: in parts, by two processes, both, and with its weights shared out. Shown is how far the weights end from
each other, at most, relative to the largest of their tensor.

lab verify-parallel distill
lab verify-parallel mine.yaml --import mypackage --precision 32-true
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import options as shared

if TYPE_CHECKING:
    from lab.parity import Verdict

HELP = "prove that a recipe ends alike on any number of processes"
DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab verify-parallel``."""
    shared.add_recipe(parser)
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps an epoch (default: 10)")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="epochs (default: 2)")
    parser.add_argument(
        "--precision", default="64-true", metavar="NAME", help="Lightning's name; others are shown, not judged"
    )


def run(options: argparse.Namespace) -> int:
    """Print a row for every stage, a column for every width."""
    from rich.table import Table

    from lab import parity
    from lab.cli.options import console
    from lab.errors import UserError

    if min(options.steps, options.epochs) < 1:
        raise UserError("--steps and --epochs must be 1 at least")
    bound = parity.TOLERANCE.get(options.precision)
    found: dict[str, dict[str, Verdict]] = {}
    with tempfile.TemporaryDirectory(prefix="lab-verify-") as folder:
        for verdict in parity.compare(
            options.recipe, options.overrides, folder=Path(folder), imports=options.imports,
            precision=options.precision, epochs=options.epochs, steps=options.steps,
        ):  # fmt: skip
            found.setdefault(verdict.stage, {})[verdict.width] = verdict
    table = Table("stage", *(width.name for width in parity.WIDTHS), box=None)
    different: list[Verdict] = []
    refused: dict[str, None] = {}
    for stage, row in found.items():
        table.add_row(stage, *(_shown(verdict) for verdict in row.values()))
        different += [verdict for verdict in row.values() if bound is not None and verdict.differs(bound)]
        refused |= {verdict.refused: None for verdict in row.values() if verdict.refused}
    console().print(table)
    for why in refused:
        print(shared.plain(f"–  {why}"))
    for verdict in different:
        what, off, most = verdict.tensor, verdict.off, bound or 0.0
        if off <= most:
            what, off, most = verdict.metric, verdict.metric_off, parity.METRICS
        said = f"{verdict.stage}, {verdict.width}: {what} is off by {off:.1e}, more than {most:.0e}"
        print(shared.plain(said + "".join(f"; {why}" for why in verdict.natural)), file=sys.stderr)
    return DIFFERENT if different else 0


def _shown(verdict: Verdict) -> str:
    return "–" if verdict.refused else f"{verdict.off:.1e}"
