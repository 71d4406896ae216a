"""Copy a bundled recipe, with its comments, to start from.

lab new distill
lab new distill mine.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "copy a bundled recipe here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab new``."""
    parser.add_argument("name", metavar="NAME", help="a bundled recipe: `lab list recipes` has them")
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="the copy (default: NAME.yaml)")


def run(options: argparse.Namespace) -> int:
    """Copy the recipe and the files that it extends; say what to type next."""
    from lab.errors import UserError
    from lab.recipe import bundled
    from lab.registry import nearest

    known = bundled()
    if options.name not in known:
        raise UserError(f"no bundled recipe '{options.name}'{nearest(options.name, known)}")
    target = options.file or Path(f"{options.name}.yaml")
    if target.is_dir():
        target = target / f"{options.name}.yaml"
    copies = _copies(known[options.name], target)
    if there := [str(copy) for copy in copies if copy.exists()]:
        raise UserError(f"{', '.join(there)} is there already; name another file: lab new {options.name} FILE")
    for copy, source in copies.items():
        text = source.read_text(encoding="utf-8").replace(f"lab fit recipes/{source.name}", f"lab fit {copy}")
        try:
            with copy.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as cause:
            raise UserError(f"{copy} cannot be written: {cause.strerror or cause}") from cause
        print(copy)
    print(f"\nlab check {target}          what is wrong with it, after you changed it")
    print(f"lab fit {target} --smoke    a few batches of everything")
    print(f"lab fit {target}")
    return 0


def _copies(source: Path, target: Path) -> dict[Path, Path]:
    """What is copied where: the recipe, and beside it the files that it extends; bundled names need no copy."""
    from lab import document

    copies = {target: source}
    extends = document.read(source).mapping.get("extends")
    for parent in (extends.items or [extends]) if extends is not None else []:
        if isinstance(parent.value, str) and (source.parent / parent.value).is_file():
            copies |= _copies(source.parent / parent.value, target.parent / parent.value)
    return copies
