"""List what is registered, by kind: names, packages, and one line about each.

lab list
lab list networks
"""

from __future__ import annotations

import argparse

from lab.cli import options as shared
from lab.registry import KINDS

HELP = "list what is registered"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab list``."""
    choices = sorted([*KINDS, "recipes"])
    parser.add_argument("kind", metavar="KIND", nargs="?", choices=choices, help=", ".join(choices))
    shared.add_import(parser)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Read from package metadata and source text: nothing that is listed is imported."""
    from lab.check import read_signature
    from lab.recipe import bundled
    from lab.registry import allow

    for package in options.imports:
        allow(package)
    rows = []
    for kind in KINDS.values():
        if options.kind in (None, kind.name):
            for entry in kind.entries():
                signature = read_signature(entry)
                about = signature.doc.partition("\n")[0] if signature.known else f"cannot be read: {signature.reason}"
                rows.append({"kind": kind.name, "name": entry.name, "package": entry.package, "about": about})
    if options.kind in (None, "recipes"):
        for name, path in bundled().items():
            about = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
            rows.append({"kind": "recipes", "name": name, "package": "lightning-lab", "about": about})
    if options.json:
        import json

        print(json.dumps(rows, indent=2))
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("kind", "name", "package", "about"):
        table.add_column(column, no_wrap=column != "about")
    last = ""
    for row in rows:
        table.add_row(*(Text(text) for text in (row["kind"] if row["kind"] != last else "", *list(row.values())[1:])))
        last = row["kind"]
    shared.console().print(table)
    return 0
