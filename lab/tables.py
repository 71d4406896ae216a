"""Tables that a stage leaves: a CSV file each, beside its pictures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.files import named, replacing


@dataclass(frozen=True)
class Table:
    """Columns, and rows of numbers and strings."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def keep(folder: Path, name: str, table: Table) -> Path:
    """Write a table into a stage's ``tables/``; its path.

    Args:
        name: without an extension.

    Raises:
        ValueError: the name is no file's name, or a row has not as many cells as there are columns.
        OSError: it cannot be written.
    """
    path = folder / named(name, "csv")
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {name}: a row of {len(row)} cells, and {len(table.columns)} columns")
    folder.mkdir(exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        writer.writerows(table.rows)
    return path
