"""Metrics in a file that every tool reads: ``metrics.csv``, one column a metric, one row a log call."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lab.files import replacing
from lab.ranges import checked


class CSV(Logger):
    """Writes ``metrics.csv``: ``step``, ``epoch``, then the metrics as they first came; other cells are empty.

    Each row is in the file when ``log_metrics`` returns, so a killed run keeps them all; numbers have full precision. A
    new metric rewrites the file with one column more, atomically. An existing file is continued; a line that a killed
    process left unfinished is dropped.

    Args:
        save_dir: the folder of ``metrics.csv``, made if need be.
    """

    @checked
    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._rows = 0
        self._read = False

    @property
    def name(self) -> str:
        """Empty: the folder is the stage's own."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the folder is the stage's own."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of ``metrics.csv``."""
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        """The folder of ``metrics.csv``."""
        return self.save_dir

    def state_dict(self) -> dict[str, int]:
        """How many rows the file has: the place that a run which goes on returns to."""
        self._continue()
        return {"rows": self._rows}

    @rank_zero_only
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Drop the rows that came later: they are written again."""
        self._continue()
        if state_dict["rows"] < self._rows:
            self._rewrite(self._columns, self._lines()[: state_dict["rows"]])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row.

        Raises:
            OSError: the file can't be written; what was in it stays.
        """
        self._continue()
        cells = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        cells["step"] = step
        new = [name for name in ("step", "epoch", *cells) if name not in self._columns]
        if new:
            self._rewrite([*self._columns, *dict.fromkeys(new)], self._lines())
        self._append(_encoded([[cells.get(column) for column in self._columns]]))
        self._rows += 1

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has the recipe."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ask the disk to keep what was written."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _continue(self) -> None:
        """Take up the file that an earlier process left."""
        if self._read:
            return
        self._read = True
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        if whole := content.rpartition(b"\n")[0]:
            if not content.endswith(b"\n"):
                os.truncate(self.path, len(whole) + 1)
            self._columns = next(csv.reader(io.StringIO(whole.decode())))
            self._rows = len(self._lines())

    def _lines(self) -> list[list[Any]]:
        if not self._columns:
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))[1:]

    def _rewrite(self, columns: list[str], lines: list[list[Any]]) -> None:
        padded = ([*line, *[None] * (len(columns) - len(line))] for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_bytes(_encoded([columns, *padded]))
        except OSError as cause:
            raise self._failed(cause) from cause
        self._columns, self._rows = columns, len(lines)

    def _append(self, line: bytes) -> None:
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as cause:
            raise self._failed(cause) from cause

    def _failed(self, cause: OSError) -> OSError:
        return OSError(
            cause.errno, f"metrics could not be written ({cause.strerror}); earlier rows are intact", str(self.path)
        )


def _encoded(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
