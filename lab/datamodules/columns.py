"""Labelled data from the columns of tables: which column is the target, and what its values are.

Text and whole numbers are classes, in the order of the training data's sorted values, or as Hugging Face's ClassLabel
has them; floating-point numbers are a regression. Cells without a value have no label.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lab.batch import UNLABELLED, Labelled
from lab.datamodules.labelled import Splits
from lab.datamodules.own import OwnData, indices
from lab.datamodules.tables import Table, load
from lab.ranges import PathOrName, checked

TARGETS = ("label", "labels", "target", "class", "fine_label")
"""What a target's column is called where nothing else says which it is."""
MANY_CLASSES = 10_000
"""More classes than this are a column that identifies the rows."""


class ColumnData(OwnData):
    """A table with a column of targets; a subclass says in :meth:`inputs` what its inputs are.

    Args:
        path: a file (``.csv``, ``.tsv``, ``.parquet``, ``.jsonl``, ``.arrow``), a folder, or the name of a data set on
            the Hugging Face hub; the latter two need the extra ``hf``.
        target: the column to predict; found where it is left out: the one ClassLabel, else ``label`` or the like.
        task: what its values are; ``auto``: floating-point numbers are a regression, all others classes.
        splits: what the data call ``train``, ``val`` and ``test``; by name where it is left out.
        config: which of the data sets of that name, for those that have several.
        revision: a commit, tag or branch on the hub.

    Raises:
        FileNotFoundError: a file isn't there.
        ValueError: the data cannot be read, or lack a column or split; the message says what there is.
    """

    kept: ClassVar[dict[str, Any]] = {"target": str, "regression": bool, "classes": list[str]}

    @checked
    def __init__(
        self,
        path: PathOrName,
        *,
        target: str | None = None,
        task: Literal["auto", "classification", "regression"] = "auto",
        splits: dict[Literal["train", "val", "test"], str] | None = None,
        config: str | None = None,
        revision: str | None = None,
        **own: Any,
    ) -> None:
        super().__init__(**own)
        self.path = path
        self.target = target
        self.task = task
        self.splits = splits
        self.config = config
        self.revision = revision
        self._tables: dict[str, Table] = {}

    @property
    def tables(self) -> dict[str, Table]:
        """The data's tables by split, read once."""
        if not self._tables:
            self._tables = load(self.path, self.config, self.revision, self.splits)  # type: ignore[arg-type]
        return self._tables

    @abstractmethod
    def inputs(self, tables: Mapping[str, Table]) -> Tensor:
        """The inputs of all tables' rows, end to end: ``[N, ...]``."""

    def load(self) -> Splits:
        """The rows of each split."""
        tables = self.tables
        targets = self._targets(tables)
        everything = self.inputs(tables)
        parts: dict[str, Labelled | None] = {}
        begin = 0
        for split, table in tables.items():
            parts[split] = Labelled(everything[begin : begin + len(table)], targets[split])
            begin += len(table)
        some = next(part for part in parts.values() if part is not None)
        self._tables = {}  # what is served lies elsewhere by now
        return Splits(parts.get("train") or some[:0], parts.get("val"), parts.get("test"))

    @property
    def first(self) -> Table:
        """The training table."""
        return next(iter(self.tables.values()))

    def target_column(self) -> str | None:
        """The name of the target's column; None in new data that have none.

        Raises:
            ValueError: there is no such column, or it isn't clear which it is.
        """
        table = self.first
        if self.target is not None:
            if not (self.given and self.target not in table.columns):
                table.need(self.target)
            return self.target if self.target in table.columns else None
        if self.given:
            learnt = self.learnt.get("target")
            return learnt if learnt in table.columns else None
        labels = [name for name in table.columns if table.feature(name) == "ClassLabel"]
        found = labels if len(labels) == 1 else [name for name in TARGETS if name in table.columns][:1]
        if not found:
            raise ValueError(f"{table.source}: which column is the target? Say `target:`; there are {table.said()}")
        return found[0]

    def _targets(self, tables: Mapping[str, Table]) -> dict[str, Tensor]:
        name = self.target_column()
        if name is not None:
            self.once("target", lambda: name)
        regression = self.once("regression", lambda: self._is_regression(name))
        if not regression:
            self.classes = self.once("classes", lambda: self._classes(name))
        found = {}
        for split, table in tables.items():
            if name is None:
                found[split] = torch.full((len(table), 1), torch.nan) if regression else missing(len(table))
            elif regression:
                found[split] = _numbers_of(table, name)
            else:
                found[split] = indices(_names(table, name), self.classes or [], f"{table.source}, column '{name}'")
        return found

    def _is_regression(self, name: str | None) -> bool:
        if self.task != "auto" or name is None:
            return self.task == "regression"
        kind = self.first.type(name)
        return pa.types.is_floating(kind) or pa.types.is_decimal(kind) or _is_list(kind)

    def _classes(self, name: str | None) -> list[str]:
        assert name is not None
        table = self.first
        if table.feature(name) == "ClassLabel":
            return list(table.features[name]["names"])
        values = pc.unique(table.column(name)).drop_null()
        numeric = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
        classes = sorted({text for text in _texts(values) if text}, key=float if numeric else str)
        if len(classes) < 2 or len(classes) > MANY_CLASSES:
            raise ValueError(
                f"{table.source}: the column '{name}' has {len(classes)} different values: "
                f"classes are from 2 to {MANY_CLASSES} (task: regression predicts numbers)"
            )
        return classes


def missing(rows: int) -> Tensor:
    """``[N]`` classes that are not known."""
    return torch.full((rows,), UNLABELLED)


def rows_of(samples: Labelled, inputs: Tensor) -> Labelled:
    """The samples, whose inputs are ``[N, 1]`` row numbers, with the rows of ``inputs`` instead."""
    return replace(samples, inputs=inputs[samples.inputs[:, 0]])


def arrays(column: pa.ChunkedArray) -> Iterator[Tensor]:
    """A column of numbers, or of equally long lists of them, lists in lists too: a tensor for each of its chunks.

    Raises:
        ValueError: lists differ in length, something has no value, or is no number.
    """
    for chunk in column.chunks:
        shape, values = [len(chunk)], chunk
        while _is_list(values.type):
            lengths = pc.unique(pc.list_value_length(values)).to_pylist()
            if len(lengths) > 1 or lengths == [None]:
                raise ValueError(f"lists of {', '.join(map(str, lengths[:3]))} values: all must have one length")
            shape.append(*lengths or [0])
            values = values.flatten()
        if values.null_count or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            raise ValueError(f"{values.type} with {values.null_count} empty cells: numbers were expected")
        yield torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False)).reshape(shape))


def _names(table: Table, column: str) -> list[str | None]:
    """Each row's class, None where it has none."""
    values = table.column(column)
    if table.feature(column) == "ClassLabel":
        names = table.features[column]["names"]
        return [None if place is None or place < 0 else names[place] for place in values.to_pylist()]
    return [text or None for text in _texts(values)]


def _texts(values: Any) -> list[Any]:
    """Values as the names of classes: whole numbers as such, also those that stand in a column of real numbers."""
    if pa.types.is_floating(values.type):
        known = [None if value is None or math.isnan(value) else value for value in values.to_pylist()]
        return [None if v is None else str(int(v)) if v.is_integer() else str(v) for v in known]
    return [None if value is None else str(value) for value in values.to_pylist()]


def _numbers_of(table: Table, name: str) -> Tensor:
    """``[N, K]`` real targets, NaN where there is none."""
    column = table.column(name)
    try:
        if not _is_list(column.type):
            numbers = pc.cast(column, pa.float64()).to_numpy()
            targets = torch.from_numpy(np.array(numbers)).unsqueeze(1)
        else:
            targets = torch.cat(list(arrays(column)))
    except (ValueError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as cause:
        raise ValueError(f"{table.source}: the column '{name}' ({column.type}) is no number: {cause}") from cause
    if targets.isinf().any():
        raise ValueError(f"{table.source}: {int(targets.isinf().sum())} values of '{name}' are infinite")
    return targets.float()


def _is_list(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
