"""Look for a recipe's best values: many runs over the space that its `sweep:` says. Goes on where it was left.

lab sweep mine.yaml --jobs 2
lab sweep mine.yaml --storage postgresql://user@host/db      (the same on every machine: they work together)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

from lab.cli import options as shared

HELP = "look for a recipe's best values"
FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab sweep``."""
    shared.add_recipe(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at once, a process each (default: 1)")
    parser.add_argument("--storage", metavar="URL", help="where the study lies (default: SQLite among the runs)")
    parser.add_argument("--study", metavar="NAME", help="its name there (default: of the recipe and what it says)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs lie (default: runs)")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Train what is missing, print the trials, the best first, and last how the best one is run."""
    from lab.errors import UserError
    from lab.registry import allow

    if importlib.util.find_spec("optuna") is None:
        raise UserError("lab sweep needs Optuna: pip install 'lightning-lab[sweep]'")
    for package in options.imports:
        allow(package)

    from lab import sweep, trials

    work = sweep.prepare(
        options.recipe,
        options.overrides,
        storage=options.storage,
        study=options.study,
        out=options.out,
        command=["lab", *sys.argv[1:]],
        imports=options.imports,
    )
    try:
        sweeping = sweep.carry_out(work, jobs=options.jobs)
    except (KeyboardInterrupt, SystemExit):
        print("lab: what was trained is kept; the same command goes on with it", file=sys.stderr)
        raise
    found = trials.rows(sweeping)
    kept = trials.keep_all(sweeping, found)
    done = [row for row in found if row.status == "finished"]
    if options.json:
        print(json.dumps([trials.as_dict(row) for row in found], indent=2))
        return 0 if done else FAILED
    shared.console().print(trials.table(work.sweep, found))
    for path in kept:
        print(path)
    if not done:
        print(f"none of {len(found)} trials has finished", file=sys.stderr)
        return FAILED
    best = [axis.override(done[0].values[axis.path]) for axis in work.sweep.axes]
    others = [text for text in options.overrides if not text.startswith("sweep.")]
    print(f"lab fit {options.recipe} {shlex.join([*others, *best])}")
    return 0
