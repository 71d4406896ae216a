"""List what is registered, by kind: names, packages, and one line about each.

lab list
lab list networks
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap

from lab.cli import options as shared
from lab.registry import KINDS

HELP = "list what is registered"
WIDTH = 160
"""Columns of text where nobody watches."""
NARROWEST = 20
"""Columns that the descriptions get on any terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab list``."""
    choices = sorted([*KINDS, "recipes"])
    parser.add_argument("kind", metavar="KIND", nargs="?", choices=choices, help=", ".join(choices))
    shared.add_import(parser)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Read from package metadata and source text: nothing that is listed is imported."""
    from lab.registry import allow

    for package in options.imports:
        allow(package)
    with shared.uncollected():
        rows = _rows(options.kind)
        if options.json:
            import json

            print(json.dumps(rows, indent=2))
        else:
            _print(rows)
    return 0


def _rows(only: str | None) -> list[dict[str, str]]:
    """What there is, by kind and name; the recipes that come with lab last."""
    from lab.recipe import bundled
    from lab.signature import summary

    rows = []
    for entry in [entry for kind in KINDS.values() if only in (None, kind.name) for entry in kind.entries()]:
        doc, unreadable = summary(entry.target)
        if unreadable and entry.loaded is not None:  # a notebook's
            doc, unreadable = entry.loaded.__doc__ or "", ""
        about = f"cannot be read: {unreadable}" if unreadable else doc.strip().partition("\n")[0] or entry.target
        rows.append({"kind": entry.kind, "name": entry.name, "package": entry.package, "about": about})
    for name, path in bundled().items() if only in (None, "recipes") else ():
        about = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        rows.append({"kind": "recipes", "name": name, "package": "lightning-lab", "about": about})
    return rows


def _print(rows: list[dict[str, str]]) -> None:
    """A table, as wide as the terminal; by hand, as importing and using rich takes longer than all else here."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    shown = [{"kind": "kind", "name": "name", "package": "package", "about": "about"}, *rows]
    widths = [max(len(row[column]) for row in shown) for column in ("kind", "name", "package")]
    left = sum(widths) + 2 * len(widths)
    last = ""
    for row in shown:
        cells = (row["kind"] if row["kind"] != last else "", row["name"], row["package"])
        about = textwrap.wrap(row["about"], max(width - left, NARROWEST)) or [""]
        begin = "".join(cell.ljust(wide + 2) for cell, wide in zip(cells, widths, strict=True))
        print(begin + f"\n{' ' * left}".join(about))
        last = row["kind"]
