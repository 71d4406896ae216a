"""Files that are whole or not there: a temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.errors import UserError

OR_NAME = "lab.ranges.PathOrName"
"""The annotation of a path in whose place a name may stand, such as a data set's on a hub."""
SUFFIXES = (".csv", ".tsv", ".parquet", ".json", ".jsonl", ".ndjson", ".arrow", ".feather", ".npz")
"""What only files of data end in."""


def located(said: str, folder: Path, *, or_name: bool = False) -> Path | str:
    """The path that a text means, relative to a folder.

    Args:
        or_name: the text may be a name instead: it is one where nothing lies there and it doesn't look like a path
            (which starts with ``.``, ``/`` or ``~``, or ends as files of data do).
    """
    path = folder / Path(said).expanduser()
    looks_local = said.startswith((".", "/", "~")) or said.lower().endswith(SUFFIXES)
    return said if or_name and not looks_local and not path.exists() else path


def inside(folder: Path, path: str | Path) -> Path:
    """A path in a folder, which must not lead out of it: what was copied from elsewhere may say ``..``, or link.

    Raises:
        UserError: it does.
    """
    found = folder / path
    try:
        stays = found.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name that no file can have
        stays = False
    if not stays:
        raise UserError(f"{found} leads out of {folder}, or nowhere: it is not read")
    return found


def named(name: str, ending: str) -> str:
    """The name of a file for a thing that a plugin has named.

    Raises:
        ValueError: it would be no name of a file in any system.
    """
    if not re.fullmatch(r"\w[\w. -]*", name):
        raise ValueError(f"a name is letters, digits, '_', '-', '.' and spaces, not {name!r}")
    return f"{name}.{ending}"


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it is no file, or cannot be read.
        ValueError: it is no JSON, or nested too deeply.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no file but a folder, a pipe or a device")  # a pipe would be waited for
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as cause:
        raise ValueError("it is nested too deeply") from cause


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well; when it doesn't, ``path`` is left as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write data as indented JSON, whole."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
