"""Files that are whole or not there: a temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
