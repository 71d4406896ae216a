"""Go on with a run exactly where it stopped: killed, interrupted, failed, or asked to stop.

lab resume latest
lab resume runs/distill/20260101-120000-abcdef
"""

from __future__ import annotations

import argparse

from lab.cli import options as shared

HELP = "go on with a run where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab resume``."""
    parser.add_argument("reference", metavar="RUN", help="a run's folder, its id, or `latest`")
    shared.add_import(parser)


def run(options: argparse.Namespace) -> int:
    """Train what is left, and print what ``lab fit`` prints."""
    from lab.cli.fit import told
    from lab.errors import UserError

    this, stage = shared.located(options)
    if stage is not None:
        raise UserError(f"a run is resumed whole: lab resume {this.folder}")

    from lab import stages

    return told(stages.resume(this))
