"""Tables: named columns, from files (CSV, Parquet, JSON lines, Arrow) or from Hugging Face ``datasets``.

A file is read by Arrow alone. A name on the hub, a folder that ``save_to_disk`` wrote or any other folder is left to
``datasets`` (the extra ``hf``); code that comes with data is never run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.json
import pyarrow.parquet

from lab.registry import nearest

SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""What data call their splits; the first that there is."""


@dataclass(frozen=True)
class Table:
    """One split's columns.

    Args:
        rows: a ``pyarrow.Table``, or one of ``datasets``, which lies on disk.
        source: what an error calls it.
        features: what Hugging Face says of the columns, by name: ``{"_type": "ClassLabel", "names": [...]}``.
        folder: what relative paths in it start from.
    """

    rows: Any
    source: str
    features: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path = Path()

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def columns(self) -> list[str]:
        """Their names."""
        return list(self.rows.column_names)

    def feature(self, column: str) -> str:
        """What Hugging Face calls the column's sort, such as ``ClassLabel``; else empty."""
        described = self.features.get(column)
        return str(described.get("_type", "")) if isinstance(described, Mapping) else ""

    def type(self, column: str) -> pa.DataType:
        """The column's type; of a dictionary that of its values."""
        kind = self.rows.schema.field(column).type
        while isinstance(kind, pa.DictionaryType | pa.BaseExtensionType):
            kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind.storage_type
        return kind

    def column(self, name: str) -> pa.ChunkedArray:
        """A column.

        Raises:
            ValueError: there is none of that name; lists them.
        """
        self.need(name)
        column = self.rows.column(name)
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        return column.cast(column.type.value_type) if isinstance(column.type, pa.DictionaryType) else column

    def need(self, name: str) -> None:
        """Refuse a column that isn't there.

        Raises:
            ValueError: lists those that are.
        """
        if name not in self.columns:
            close = nearest(name, self.columns)
            hint = close if "did you mean" in close else ""
            raise ValueError(f"{self.source} has no column '{name}'{hint}; it has {self.said()}")

    def said(self) -> str:
        """The columns with their types, for an error."""
        return ", ".join(f"{name} ({self.feature(name) or self.type(name)})" for name in self.columns) or "no columns"


def load(
    path: Path | str, config: str | None = None, revision: str | None = None, splits: Mapping[str, str] | None = None
) -> dict[str, Table]:
    """The tables ``train``, ``val`` and ``test``, those that there are.

    Args:
        path: a file, a folder, or a name on the hub.
        config: which of the data sets of that name.
        revision: a commit, tag or branch on the hub.
        splits: what the data call them; found by name where it is left out, a single one being ``train``.

    Raises:
        ValueError: the data cannot be read, are empty, or have no such split.
        ModuleNotFoundError: ``datasets`` is needed, and not installed.
    """
    is_file = isinstance(path, Path) and path.is_file()
    found = {"train": read(Path(path))} if is_file else _of_datasets(path, config, revision)
    chosen = splits or _by_name(path, list(found))
    for name in chosen.values():
        if name not in found:
            raise ValueError(f"{path} has no split '{name}'{nearest(name, found)}")
    tables = {split: found[chosen[split]] for split in SPLITS if split in chosen}
    if not any(map(len, tables.values())):
        raise ValueError(f"{path} has no rows")
    return tables


def _by_name(path: Path | str, found: list[str]) -> dict[str, str]:
    known = {split: next((name for name in names if name in found), None) for split, names in SPLITS.items()}
    chosen = {split: name for split, name in known.items() if name}
    if "train" in chosen:
        return chosen
    if len(found) == 1:
        return {"train": found[0]}
    raise ValueError(
        f"{path} has the splits {', '.join(found)}: say which to train on, such as `splits: {{train: {found[0]}}}`"
    )


def read(path: Path) -> Table:
    """The table in a file, by what the file's name ends in.

    Raises:
        ValueError: it ends in something else, or holds something else.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: a table is a file {', '.join(_READERS)}, got '{path.suffix}'")
    try:
        rows = reader(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as cause:
        said = " ".join(str(cause).split())
        raise ValueError(f"{path} cannot be read as {path.suffix.lower().lstrip('.')}: {said}") from cause
    twice = sorted({name for name in rows.column_names if rows.column_names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has more than one column '{twice[0]}'")
    return Table(rows, str(path), _features(rows.schema), path.parent)


def _csv(path: Path) -> pa.Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    return pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True))


def _arrow(path: Path) -> pa.Table:
    """Arrow's stream format, or its file format (Feather)."""
    with pa.memory_map(str(path)) as content:
        try:
            return pa.ipc.open_stream(content).read_all()
        except pa.ArrowInvalid:
            return pa.feather.read_table(path)


_READERS = {
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": lambda path: pa.parquet.ParquetFile(path).read(),
    ".jsonl": pa.json.read_json,
    ".ndjson": pa.json.read_json,
    ".json": pa.json.read_json,
    ".arrow": _arrow,
    ".feather": _arrow,
}


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face wrote into a schema about the columns."""
    try:
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = written.get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}
    return features if isinstance(features, dict) else {}


def _of_datasets(path: Path | str, config: str | None, revision: str | None) -> dict[str, Table]:
    try:
        import datasets
    except ModuleNotFoundError as cause:
        raise ModuleNotFoundError(f"{path} needs the package datasets: pip install 'lightning-lab[hf]'") from cause
    if str(path) in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise ValueError(
            f"{path} is a reader of the package datasets, say a file, a folder, or a data set's OWNER/NAME"
        )
    try:
        with _quiet(datasets):
            if isinstance(path, Path) and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path), config, revision=revision)
    except Exception as cause:  # of the network, of the hub, of whatever reads the files
        said = " ".join(str(cause).split()) or type(cause).__name__
        hint = " (say it as `config:`)" if "Config name is missing" in said else ""
        raise ValueError(f"{path} cannot be loaded: {said}{hint}") from cause
    splits = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    return {name: _table(split, f"{path}, split {name}") for name, split in splits.items()}


def _table(split: Any, source: str) -> Table:
    if split._indices is not None:  # rows chosen or shuffled, and not written so
        split = split.flatten_indices()
    return Table(split.data, source, split.features.to_dict())


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without progress bars and reports."""
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
