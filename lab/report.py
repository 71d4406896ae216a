"""What a run's results look like to people: the scoreboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

FIGURES = ("parameters", "nonzero_parameters", "macs", "bytes", "train_seconds", "n_test")
"""The numbers of a stage that are no metrics."""
SHOWN = {
    "parameters": "params", "macs": "MACs", "bytes": "bytes", "latency_ms.batch_1": "ms@1",
    "latency_ms.batch_64": "ms@64", "train_seconds": "train s",
}  # fmt: skip
"""The scoreboard's columns after the metrics, and what they are called there."""


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The scoreboard as plain columns and rows, one row a stage, without differences."""
    stages: Mapping[str, Any] = results["stages"]
    metrics = _metrics(stages)
    columns = ["stage", "parent", *metrics, *SHOWN]
    return columns, [
        [name, stage.get("parent"), *(_value(stage, key) for key in (*metrics, *SHOWN))]
        for name, stage in stages.items()
    ]


def scoreboard(results: Mapping[str, Any]) -> Table:
    """A run's stages side by side; below a figure, its difference to the parent's."""
    stages: Mapping[str, Any] = results["stages"]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    table.add_column("stage", no_wrap=True)
    parents = any(stage.get("parent") for stage in stages.values())
    if parents:
        table.add_column("parent")
    metrics = _metrics(stages)
    keys = [*metrics, *(key for key in SHOWN if any(_value(stage, key) is not None for stage in stages.values()))]
    for key in keys:
        table.add_column(Text(SHOWN.get(key, key.removeprefix("test/"))), justify="right", no_wrap=True)
    for name, stage in stages.items():
        parent = stages.get(stage.get("parent") or "", {})
        label = Text(name)
        if stage.get("status") != "finished":
            label.append(f"\n{stage.get('status')}", style="red")
        cells = [_cell(key, _value(stage, key), _value(parent, key)) for key in keys]
        table.add_row(label, *([Text(stage.get("parent") or "")] if parents else []), *cells)
    return table


def missed(results: Mapping[str, Any]) -> list[str]:
    """The gates that were not met, a line each."""
    return [f"{name}: {line}" for name, stage in results["stages"].items() for line in stage.get("missed", [])]


def _metrics(stages: Mapping[str, Any]) -> list[str]:
    """The test metrics, those of most interest first; validation's where nothing was tested."""
    names = list(dict.fromkeys(name for stage in stages.values() for name in stage.get("metrics", {})))
    for split in ("test", "val"):
        chosen = [name for name in names if name.startswith((f"{split}/", f"{split}_"))]  # plain modules write test_acc
        if chosen:
            return sorted(chosen, key=lambda name: name.endswith("loss"))
    return []


def _value(stage: Mapping[str, Any], key: str) -> Any:
    if key in stage.get("metrics", {}):
        return stage["metrics"][key]
    value: Any = stage
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _cell(key: str, value: Any, parent: Any) -> Text:
    if value is None:
        return Text("–", style="dim")
    cell = Text(_number(key, value))
    if parent is None or key == "train_seconds":
        return cell
    difference = value - parent
    relative = f"{difference / parent:+.0%}" if key in SHOWN and parent else f"{difference:+.4f}"
    return cell.append(f"\n{relative}", style="dim")


def _number(key: str, value: float) -> str:
    if key not in SHOWN:
        return f"{value:.4f}"
    if key.startswith("latency"):
        return f"{value:.3g}"
    if isinstance(value, float):
        return f"{value:.1f}"
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if key == "macs" and value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,}"
