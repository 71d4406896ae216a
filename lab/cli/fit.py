"""Train every stage of a recipe, test its selected checkpoint, print the scoreboard, print the run's folder last.

lab fit recipes/distill.yaml
lab fit distill trainer.max_epochs=3 stages.student.module.temperature=2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "train every stage of a recipe"
GATED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab fit``."""
    from lab.cli import options

    options.add_recipe(parser)
    parser.add_argument("--smoke", action="store_true", help="every stage for a few batches, the chain whole")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs lie (default: runs)")


def run(options: argparse.Namespace) -> int:
    """Check everything first, then train."""
    from lab import recipe
    from lab.check import check
    from lab.cli.options import console
    from lab.registry import allow

    for package in options.imports:
        allow(package)
    plan = check(recipe.load(options.recipe, options.overrides))

    from lab import report, stages

    this = stages.fit(
        plan, out=options.out, smoke=options.smoke, command=["lab", *sys.argv[1:]], imports=options.imports
    )
    results = this.results
    console().print(report.scoreboard(results))
    missed = report.missed(results)
    for line in missed:
        print(f"required, and not met: {line}", file=sys.stderr)
    print(this.folder)
    return GATED if missed else 0
