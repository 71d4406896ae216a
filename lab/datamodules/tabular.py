"""Tables of numbers and categories: standardised, imputed, one-hot; all of it learnt from the training split only.

A column x of numbers becomes (x − μ)/σ, for the mean μ and the standard deviation σ of its training values; 0 where it
has no value, the mean that is, and where training values were missing a second feature says so with 1. A column of text
or of yes and no becomes a feature for each of its training values, 1 where the row has it; a value that training
doesn't have, or none, is 0 in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import TypedDict

from lab.batch import Labelled
from lab.datamodules.columns import ColumnData, rows_of
from lab.datamodules.tables import Table
from lab.ranges import PathOrName, checked

MANY_CATEGORIES = 1000
"""More values than this are a column that identifies the rows."""


class Scaled(TypedDict):
    """What is learnt of a column of numbers."""

    mean: float
    deviation: float
    missing: bool


class Categories(TypedDict):
    """What is learnt of a column of text."""

    categories: list[str]


class Tabular(ColumnData):
    """A row of a table a sample; ``in_channels`` is the number of features that its columns become.

    Args:
        path: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl`` or ``.arrow``; or a name on the Hugging Face hub.
        features: the columns to learn from; all but the target where it is left out.

    Raises:
        FileNotFoundError: the file isn't there.
        ValueError: a column is missing, or has neither numbers nor text; the message says what there is.
    """

    kept: ClassVar[dict[str, Any]] = {
        **ColumnData.kept,
        "columns": dict[str, Scaled | Categories],
        "numbers": list[str],
    }

    @checked
    def __init__(self, path: PathOrName, *, features: tuple[str, ...] | None = None, **columns: Any) -> None:
        super().__init__(path, **columns)
        self.features = features
        self._columns: dict[str, NDArray[Any]] = {}

    def inputs(self, tables: Mapping[str, Table]) -> Tensor:
        """``[N, 1]`` row numbers: features are made of the rows when it is known which are for training."""
        names = self._features()
        for table in tables.values():
            for name in names:
                table.need(name)
        self._columns = {
            name: np.concatenate([_values(table, name, self._is_number(name)) for table in tables.values()])
            for name in names
        }
        return torch.arange(sum(map(len, tables.values()))).unsqueeze(1)

    def learn(self, train: Labelled) -> None:
        """Means, deviations and categories of the training rows."""
        rows = train.inputs[:, 0].numpy()
        for name, kind in self.learnt["columns"].items():
            if not kind:
                values = self._columns[name][rows]
                kind.update(_scale(values) if self._is_number(name) else _categories(values, name))

    def prepared(self, samples: Labelled) -> Labelled:
        """``[N, F]`` features."""
        parts = [_encoded(self._columns[name], kind) for name, kind in self.learnt["columns"].items()]
        return rows_of(samples, torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32)))

    def _features(self) -> list[str]:
        return list(self.once("columns", self._chosen))

    def _chosen(self) -> dict[str, dict[str, Any]]:
        """The columns to learn from, nothing learnt yet."""
        table, target = self.first, self.learnt["target"]
        names = list(self.features) if self.features else [name for name in table.columns if name != target]
        if target in names:
            raise ValueError(f"{table.source}: '{target}' is the target, it cannot be a feature too")
        if not names:
            raise ValueError(f"{table.source} has no column beside the target '{target}'")
        for name in names:
            table.need(name)
            kind = table.type(name)
            if not (_is_number(kind) or _is_category(kind) or pa.types.is_null(kind)):
                raise ValueError(
                    f"{table.source}: the column '{name}' ({kind}) has neither numbers nor text: name those to learn "
                    f"from as `features:`; there are {table.said()}"
                )
        self.once("numbers", lambda: [name for name in names if _is_number(table.type(name))])
        return {name: {} for name in names}

    def _is_number(self, name: str) -> bool:
        return name in self.learnt["numbers"]


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_category(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind))


def _values(table: Table, name: str, number: bool) -> NDArray[Any]:
    """A column: numbers as float64, NaN where there is none; else text, empty where there is none."""
    column = table.column(name)
    if not number:
        return np.array(["" if value is None else str(value) for value in column.to_pylist()], dtype=object)
    try:
        values: NDArray[Any] = np.array(pc.cast(column, pa.float64()).to_numpy())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as cause:
        raise ValueError(f"{table.source}: the column '{name}' had numbers in training: {cause}") from cause
    if np.isinf(values).any():
        raise ValueError(f"{table.source}: {int(np.isinf(values).sum())} values of '{name}' are infinite")
    return values


def _scale(values: NDArray[np.float64]) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    deviation = float(known.std()) if len(known) else 0.0
    return {
        "mean": float(known.mean()) if len(known) else 0.0,
        "deviation": deviation if deviation > 0 else 1.0,
        "missing": len(known) < len(values),
    }


def _categories(values: NDArray[Any], name: str) -> dict[str, Any]:
    categories = sorted({str(value) for value in values} - {""})
    if len(categories) > MANY_CATEGORIES:
        raise ValueError(
            f"the column '{name}' has {len(categories)} different texts, over {MANY_CATEGORIES} are no categories: "
            "name the columns to learn from as `features:`, or use `name: text`"
        )
    return {"categories": categories}


def _encoded(values: NDArray[Any], learnt: Mapping[str, Any]) -> NDArray[np.float64]:
    """``[N]`` values as ``[N, F]`` features."""
    if "categories" in learnt:
        hot: NDArray[np.float64] = (values[:, None] == np.array(learnt["categories"], dtype=object)).astype(np.float64)
        return hot
    empty = np.isnan(values)
    scaled = np.where(empty, 0.0, (values - learnt["mean"]) / learnt["deviation"])
    return np.stack([scaled, empty], axis=1) if learnt["missing"] else scaled[:, None]
