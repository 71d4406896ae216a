"""Prove that a recipe's trainings resume exactly: each is left in the middle, gone on with, and compared bit for bit.

lab verify-resume distill
lab verify-resume mine.yaml --import mypackage
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lab.cli import options as shared

HELP = "prove that a recipe resumes exactly"
DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab verify-resume``."""
    shared.add_recipe(parser)
    parser.add_argument("--batches", type=int, default=6, metavar="N", help="batches an epoch (default: 6)")


def run(options: argparse.Namespace) -> int:
    """Print a line for every break, as it is known."""
    from lab.errors import UserError
    from lab.verification import verify

    if options.batches < 2:
        raise UserError(f"--batches must be 2 at least, got {options.batches}: a break lies between batches")
    fine = True
    with tempfile.TemporaryDirectory(prefix="lab-verify-") as folder:
        for verdict in verify(
            options.recipe, options.overrides, folder=Path(folder), imports=options.imports, batches=options.batches
        ):
            print(shared.plain(str(verdict)), flush=True)
            fine = fine and verdict.difference is None
    return 0 if fine else DIFFERENT
