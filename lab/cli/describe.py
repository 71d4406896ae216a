"""Describe one name: what it does, its arguments and defaults, what it consumes and yields, where it comes from.

lab describe distill
"""

from __future__ import annotations

import argparse
from typing import Any

from lab.cli import options as shared
from lab.errors import UserError
from lab.registry import KINDS, Entry, UnknownName, nearest

HELP = "describe a registered name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab describe``."""
    parser.add_argument("name", metavar="NAME", help="as a recipe says it; KIND/NAME where several kinds have it")
    shared.add_import(parser)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Read from source text: nothing is imported."""
    from lab.registry import allow

    for package in options.imports:
        allow(package)
    with shared.uncollected():
        found = [_described(entry) for entry in _entries(options.name)]
        if options.json:
            import json

            print(json.dumps(found, indent=2))
        else:
            for description in found:
                _print(description)
    return 0


def _entries(name: str) -> list[Entry]:
    """What ``NAME`` or ``KIND/NAME`` means; several where kinds share it, or packages are at odds.

    Raises:
        UserError: nothing has that name.
    """
    from lab.slots import kinds_with

    prefix, _, rest = name.partition("/")
    kinds, name = ([KINDS[prefix]], rest) if prefix in KINDS and rest else (kinds_with(name), name)
    if not kinds:
        known = {known for kind in KINDS.values() for known in kind.names()}
        raise UserError(f"nothing is registered as '{name}'{nearest(name, known)}")
    try:
        return [entry for kind in kinds for entry in kind.claims(name) or [kind.find(name)]]
    except UnknownName as cause:
        raise UserError(str(cause)) from cause


def _described(entry: Entry) -> dict[str, Any]:
    from lab.slots import read_signature, slot

    signature = read_signature(entry)
    flow = {word: _short(signature.attributes.get(word)) for word in ("consumes", "yields")}
    arguments = [
        {
            "name": p.name, "type": p.annotation, "default": p.default, "required": p.required,
            "component": slot(p), "from": p.owner.rpartition(":")[2],
        }
        for p in signature.parameters.values()
    ]  # fmt: skip
    return {
        "kind": KINDS[entry.kind].singular, "name": entry.name, "package": entry.package, "class": entry.target,
        "about": signature.doc or signature.reason, **{word: what for word, what in flow.items() if what},
        "arguments": arguments,
    }  # fmt: skip


def _short(reference: Any) -> str | None:
    return reference.rpartition(".")[2] if isinstance(reference, str) else None


def _print(description: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = shared.console()
    kind = next(kind for kind in KINDS.values() if kind.singular == description["kind"])
    heading = f"{description['name']}, {kind.one} of {description['package']} ({description['class']})"
    console.print(Text(heading, style="bold"))
    for word in ("consumes", "yields"):
        if word in description:
            console.print(Text(f"{word} {description[word]} batches"))
    about = description["about"].partition("\nArgs:")
    console.print(Text(f"\n{about[0].strip()}\n"))
    if not description["arguments"]:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("argument", "type", "default", "takes"):
        table.add_column(column)
    for argument in description["arguments"]:
        takes = KINDS[argument["component"]].one if argument["component"] else ""
        default = "required" if argument["required"] else str(argument["default"])
        table.add_row(Text(argument["name"]), Text(argument["type"]), Text(default), Text(takes))
    console.print(table)
    if about[2]:
        console.print(Text(f"\nArguments:{about[2]}"))
