"""Train every stage of a recipe, test its selected checkpoint, print the scoreboard, print the run's folder last.

lab fit recipes/distill.yaml
lab fit distill trainer.max_epochs=3 stages.student.module.temperature=2
lab fit distill --seeds 5 --jobs 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.run import Run

HELP = "train every stage of a recipe"
FAILED = 1
GATED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab fit``."""
    from lab.cli import options

    options.add_recipe(parser)
    parser.add_argument("--seeds", type=int, metavar="N", help="N runs, with the recipe's seed, the next one, …")
    parser.add_argument("--folds", type=int, metavar="K", help="K runs, each tested on another K-th of the data")
    parser.add_argument("--jobs", type=int, metavar="J", help="of several runs J at once, a process each")
    parser.add_argument("--smoke", action="store_true", help="every stage for a few batches, the chain whole")
    parser.add_argument("--fresh", action="store_true", help="train every stage, also those that an earlier run has")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs lie (default: runs)")


def run(options: argparse.Namespace) -> int:
    """Check everything first, then train."""
    from lab import recipe
    from lab.check import check
    from lab.errors import UserError
    from lab.registry import allow

    for package in options.imports:
        allow(package)
    if (earlier := _run_of(options.recipe)) is not None:
        return _longer(earlier, options)
    if options.seeds is not None or options.folds is not None:
        return _several(options)
    if options.jobs is not None:
        raise UserError("--jobs is for several runs: say --seeds N or --folds K too")
    plan = check(recipe.load(options.recipe, options.overrides))

    from lab import stages

    return told(
        stages.fit(
            plan,
            out=options.out,
            smoke=options.smoke,
            fresh=options.fresh,
            command=["lab", *sys.argv[1:]],
            imports=options.imports,
        )
    )


def _run_of(said: str) -> Run | None:
    """The run that is to be trained longer; None where a recipe is meant."""
    from lab import recipe
    from lab.run import RunNotFound, locate

    if recipe.names(said):
        return None
    try:
        found, stage = locate(said)
    except RunNotFound:
        return None
    return found if stage is None else None


def _longer(earlier: Run, options: argparse.Namespace) -> int:
    from lab import stages
    from lab.errors import UserError

    given = {f"--{name}": getattr(options, name) for name in ("seeds", "folds", "jobs", "smoke", "fresh", "out")}
    if wrong := [flag for flag, value in given.items() if value]:
        raise UserError(f"{earlier.folder} is a run, to be trained longer: {wrong[0]} is for recipes")
    return told(stages.extend(earlier, options.overrides, command=["lab", *sys.argv[1:]], imports=options.imports))


def told(this: Run) -> int:
    """Print a run's scoreboard, the gates that it missed, and last its folder; the exit code."""
    from lab import report
    from lab.cli.options import console

    results = this.results
    console().print(report.scoreboard(results))
    for line in report.met(results):
        print(f"required, and met: {line}")
    for line in report.missed(results):
        print(f"required, and not met: {line}", file=sys.stderr)
    print(this.folder)
    return GATED if this.status == "gated" else 0


def _several(options: argparse.Namespace) -> int:
    """Runs in one group, and what they say together; prints last what ``lab compare`` takes."""
    from lab import compare, groups, repetition, report
    from lab.cli.options import console

    wanted = repetition.variants(options.recipe, options.overrides, seeds=options.seeds, folds=options.folds)
    runs: list[Run] = []
    try:
        for this in repetition.fit(
            wanted,
            out=options.out,
            smoke=options.smoke,
            fresh=options.fresh,
            jobs=options.jobs,
            command=["lab", *sys.argv[1:]],
            imports=options.imports,
        ):
            runs.append(this)
    except KeyboardInterrupt:
        if runs:
            print(f"{len(runs)} of {len(wanted)} runs had ended: lab compare {groups.reference(runs[0])}")
        raise
    failed = [this for this in runs if this.status == "failed"]
    if len(failed) < len(runs):
        found = compare.compare([groups.Pick(this) for this in runs], every_pair=True)
        for part in report.comparison(found):
            console().print(part)
    for this in runs:
        print(this.folder)
    for line in [f"{this.id}: {line}" for this in runs for line in report.missed(this.results)]:
        print(f"required, and not met: {line}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(this.id for this in failed)}", file=sys.stderr)
    print(groups.reference(runs[0]))
    return FAILED if failed else GATED if any(this.status == "gated" for this in runs) else 0
