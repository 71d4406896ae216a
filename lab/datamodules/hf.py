"""Hugging Face data sets: images or numbers, from the hub or from files.

Q. Lhoest et al.: Datasets: A Community Library for Natural Language Processing, EMNLP 2021. Images are taken from the
table's bytes as they are, not row by row through the library's decoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import torch
from torch import Tensor

from lab.datamodules.columns import ColumnData, arrays
from lab.datamodules.decoding import DecodedData, Encoded
from lab.datamodules.tables import Table
from lab.ranges import PathOrName, checked


class HF(ColumnData, DecodedData):
    """A column of images, or of equally long lists or arrays of numbers, and a column of targets.

    Images are Hugging Face's ``Image`` columns, columns of ``{bytes, path}``, and columns of the files' bytes. Arrays
    are ``[H, W]`` or ``[C, H, W]`` images or ``[F]`` vectors; uint8 is taken as pixels.

    Args:
        path: a name on the hub (``ylecun/mnist``), a folder, or a file.
        inputs: the column of inputs; found where it is left out: the only one of images, else of arrays.

    Raises:
        FileNotFoundError: a file isn't there.
        ValueError: the data cannot be read, or lack a column or split; an image cannot be read (split and row are
            named).
    """

    kept: ClassVar[dict[str, Any]] = {**ColumnData.kept, **DecodedData.kept}

    @checked
    def __init__(self, path: PathOrName, *, inputs: str | None = None, **columns: Any) -> None:
        super().__init__(path, **columns)
        self.column = inputs

    def inputs(self, tables: Mapping[str, Table]) -> Tensor:
        """``[N, C, H, W]`` images, or ``[N, ...]`` numbers."""
        column = self._column()
        for table in tables.values():
            table.need(column)
        if _is_image(self.first, column):
            return self.decode(_Cells(list(tables.values()), column))
        return torch.cat([_array(table, column) for table in tables.values()])

    def _column(self) -> str:
        table = self.first
        if self.column is not None:
            table.need(self.column)
            if not (_is_image(table, self.column) or _is_array(table, self.column)):
                raise ValueError(
                    f"{table.source}: the column '{self.column}' has neither images nor lists of numbers; there are "
                    f"{table.said()} (text: `name: text`; a column for each number: `name: tabular`)"
                )
            return self.column
        others = [name for name in table.columns if name != self.learnt.get("target")]
        for fits in (_is_image, _is_array):
            found = [name for name in others if fits(table, name)]
            if len(found) == 1:
                return found[0]
            if found:
                break
        raise ValueError(
            f"{table.source}: which column are the inputs? Say `inputs:`; there are {table.said()} "
            "(text: `name: text`; a column for each number: `name: tabular`)"
        )


class _Cells(Encoded):
    """A column of image files in tables that follow each other."""

    def __init__(self, tables: list[Table], column: str) -> None:
        self.tables = tables
        self.column = column
        self._columns: list[pa.ChunkedArray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": None}  # the tables of `datasets` are sent as the names of their files

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def name(self, position: int) -> str:
        table, row = self._place(position)
        return f"{self.tables[table].source}, row {row}, column '{self.column}'"

    def key(self, position: int) -> str:
        return str(position)

    def length(self, position: int) -> int:
        return len(self.content(position))

    def content(self, position: int) -> Any:
        if self._columns is None:
            self._columns = [table.column(self.column) for table in self.tables]
        table, row = self._place(position)
        cell: Any = self._columns[table][row]
        path = None
        if isinstance(cell.type, pa.StructType) and cell.is_valid:
            path = cell["path"].as_py() if "path" in cell else None
            cell = cell["bytes"]
        if cell.is_valid:
            return cell.as_buffer()
        if path is None:
            raise ValueError("the cell is empty")
        file: Path = self.tables[table].folder / path
        if not file.is_file():  # a device or a pipe would never end
            raise ValueError(f"{file} is no file")
        return file.read_bytes()

    def _place(self, position: int) -> tuple[int, int]:
        """Which table, and which row of it."""
        for number, table in enumerate(self.tables):
            if position < len(table):
                return number, position
            position -= len(table)
        raise IndexError(position)


def _is_image(table: Table, column: str) -> bool:
    kind = table.type(column)
    if isinstance(kind, pa.StructType):
        named = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
        return "bytes" in named and _is_binary(named["bytes"]) and table.feature(column) != "Audio"
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_array(table: Table, column: str) -> bool:
    kind = table.type(column)
    lists = False
    while isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        kind, lists = kind.value_type, True
    return lists and bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _array(table: Table, column: str) -> Tensor:
    try:
        parts = list(arrays(table.column(column)))
        values = torch.cat(parts if len(parts) > 1 else [part for part in parts if len(part)] or parts)
    except (ValueError, RuntimeError) as cause:
        raise ValueError(f"{table.source}: the column '{column}' cannot be stacked: {cause}") from cause
    if values.dtype != torch.uint8:
        values = values.float()
    if not values.isfinite().all():
        raise ValueError(f"{table.source}: {int((~values.isfinite()).sum())} values of '{column}' are not finite")
    return values.unsqueeze(1) if values.ndim == 3 else values
