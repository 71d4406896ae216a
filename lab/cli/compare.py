"""Compare runs: metrics over seeds with 95 % intervals, tests of their differences, what differs in the recipes.

lab compare group-ab12cd --baseline control
lab compare runs/distill latest --html distill.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lab.cli import options as shared

HELP = "a table of runs: seeds aggregated, differences tested, recipes compared"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab compare``."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+",
        help="a run's folder, its id, or `latest`; RUN/STAGE; a group's id; a recipe's folder in runs, or its name",
    )  # fmt: skip
    parser.add_argument("--baseline", metavar="ROW", help="the row that every other is compared with")
    parser.add_argument(
        "--metric", dest="metrics", metavar="NAME", action="append", default=[],
        help="instead of all test metrics; may be repeated",
    )  # fmt: skip
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw metrics and training curves")
    parser.add_argument("--frontier", type=Path, metavar="FILE", help="draw the metric against bytes and milliseconds")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write all of it as one page that needs nothing else")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Read the runs' files; nothing is built or trained."""
    from lab import compare, groups

    picks = [pick for reference in options.runs for pick in groups.find(reference)]
    found = compare.compare(picks, metrics=options.metrics, baseline=options.baseline)
    if options.json:
        import json

        print(json.dumps(found.as_dict(), indent=2, allow_nan=False))
    else:
        from lab import report

        for part in report.comparison(found):
            shared.console().print(part)
    if options.png:
        from lab import pictures

        _write(options.png, pictures.png(pictures.overview(found)), options)
    if options.frontier:
        from lab import frontier, pictures

        _write(options.frontier, pictures.png(frontier.frontier(found)), options)
    if options.html:
        from lab import page

        _write(options.html, page.page(found).encode(), options)
    return 0


def _write(path: Path, content: bytes, options: argparse.Namespace) -> None:
    from lab.errors import UserError
    from lab.files import replacing

    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as cause:
        raise UserError(f"{path} cannot be written: {cause.strerror or cause}") from cause
    if not options.json:
        print(path)
