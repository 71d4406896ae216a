"""What a run's results look like to people: the scoreboard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lab.errors import plain

if TYPE_CHECKING:
    from lab.compare import Comparison
    from lab.statistics import Estimate

FIGURES = ("parameters", "nonzero_parameters", "macs", "bytes", "train_seconds", "n_test")
"""The numbers of a stage that are no metrics."""
SHOWN = {
    "parameters": "params", "nonzero_parameters": "non-zero", "macs": "MACs", "bytes": "bytes",
    "latency_ms.batch_1": "ms@1", "latency_ms.batch_64": "ms@64", "devices": "devices",
    "global_batch_size": "batch", "samples_per_second": "samples/s", "train_seconds": "train s",
}  # fmt: skip
"""The scoreboard's columns after the metrics, and what they are called there."""


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The scoreboard as plain columns and rows, one row a stage, without differences."""
    stages: Mapping[str, Any] = results["stages"]
    chosen = metrics(stages)
    columns = ["stage", "parent", *chosen, *SHOWN]
    return columns, [
        [name, stage.get("parent"), *(value(stage, key) for key in (*chosen, *SHOWN))] for name, stage in stages.items()
    ]


def scoreboard(results: Mapping[str, Any]) -> Table:
    """A run's stages side by side; below a figure, its difference to the parent's."""
    stages: Mapping[str, Any] = results["stages"]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    table.add_column("stage", no_wrap=True)
    parents = any(stage.get("parent") for stage in stages.values())
    if parents:
        table.add_column("parent")
    chosen = metrics(stages)
    keys = [*chosen, *(key for key in SHOWN if any(_tells(stage, key) for stage in stages.values()))]
    for key in keys:
        table.add_column(text(SHOWN.get(key, key.removeprefix("test/"))), justify="right", no_wrap=True)
    for name, stage in stages.items():
        parent = stages.get(stage.get("parent") or "", {})
        label = text(name)
        if stage.get("cached"):
            label.append("\ncached", style="dim")
        if stage.get("status") != "finished":
            label.append(f"\n{stage.get('status')}", style="red")
        cells = [_cell(key, value(stage, key), value(parent, key)) for key in keys]
        table.add_row(label, *([text(stage.get("parent") or "")] if parents else []), *cells)
    return table


Cells = tuple[list[str], list[list[str]]]
"""A table's head and rows."""


def comparison(found: Comparison) -> list[RenderableType]:
    """Runs side by side: the rows, the tests of their differences, what differs in the recipes and besides, notes."""
    tables = [_table(*summary(found), justify="right")]
    if found.differences:
        tables.append(_table(*differences(found), justify="right"))
    if found.recipe:
        tables.append(_table(*recipes(found), justify="left"))
    if found.provenance:
        tables.append(_table(*provenance(found), justify="left"))
    return [*tables, *(text(f"note: {note}") for note in found.notes)]


def summary(found: Comparison) -> Cells:
    """A comparison's rows: how many runs, metrics as ``mean ± half the 95 % interval``, mean figures."""
    keys = [key for key in SHOWN if any(_tells(row.figures, key) for row in found.rows)]
    head = ["", "n", *(name.removeprefix("test/") for name in found.metrics), *(SHOWN[key] for key in keys)]
    return head, [
        [
            row.name,
            str(len(row.members)),
            *(_estimated(row.estimate(metric)) for metric in found.metrics),
            *(_number(key, row.figures[key]) if key in row.figures else "–" for key in keys),
        ]
        for row in found.rows
    ]


def differences(found: Comparison) -> Cells:
    """The tests of a comparison; where there is one run of each, the differences alone."""
    tested = any(d.test.kind != "none" for d in found.differences)
    corrected = any(d.p != d.test.p for d in found.differences)
    head = ["difference", "metric", "mean [95 %]" if tested else "mean"]
    rows = []
    for d in found.differences:
        interval = d.test.difference.interval
        ends = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else ""
        cells = [
            f"{d.row.name} − {d.baseline.name}",
            d.metric.removeprefix("test/"),
            f"{d.test.difference.mean:+.4f}{ends}",
        ]
        p = "–" if d.p is None else "< 0.0001" if d.p < 1e-4 else f"{d.p:.2g}"
        rows.append([*cells, str(d.test.difference.n), p, d.test.kind] if tested else cells)
    return [*head, "n", "p (Holm)" if corrected else "p", "test"] if tested else head, rows


def recipes(found: Comparison) -> Cells:
    """The keys that differ and what each group, or each stage of the only one, says."""
    return ["recipe", *found.columns], [[key, *map(said, values)] for key, values in found.recipe.items()]


def provenance(found: Comparison) -> Cells:
    """What differs besides the recipes, and what the runs of each group have."""
    head = ["besides the recipe", *(group.label for group in found.groups)]
    return head, [[what, *(", ".join(seen) or "–" for seen in values)] for what, values in found.provenance.items()]


def said(value: Any) -> str:
    """A recipe's value in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text(content: str) -> Text:
    """For a table: markup and control characters are shown, not obeyed."""
    return Text(plain(content))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], justify: Literal["left", "right"]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for i, name in enumerate(head):
        table.add_column(text(name), justify=justify if i else "left")
    for row in rows:
        table.add_row(*map(text, row))
    return table


def _estimated(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.mean:.4f}" + ("" if estimate.half is None else f" ± {estimate.half:.4f}")


def missed(results: Mapping[str, Any]) -> list[str]:
    """The gates that were not met, a line each."""
    return _gates(results, "missed")


def met(results: Mapping[str, Any]) -> list[str]:
    """The gates that were met, a line each."""
    return _gates(results, "met")


def _gates(results: Mapping[str, Any], which: Literal["missed", "met"]) -> list[str]:
    return [f"{name}: {line}" for name, stage in results["stages"].items() for line in stage.get(which, [])]


def metrics(stages: Mapping[str, Any]) -> list[str]:
    """The test metrics, those of most interest first; validation's where nothing was tested."""
    names = list(dict.fromkeys(name for stage in stages.values() for name in stage.get("metrics", {})))
    for split in ("test", "val"):
        chosen = [name for name in names if name.startswith((f"{split}/", f"{split}_"))]  # plain modules write test_acc
        if chosen:
            return sorted(chosen, key=lambda name: name.endswith("loss"))
    return []


def value(stage: Mapping[str, Any], key: str) -> Any:
    """A metric or a figure of a stage; ``latency_ms.batch_1`` is in ``latency_ms``; None where it has none."""
    if key in stage.get("metrics", {}):
        return stage["metrics"][key]
    if key in stage:
        return stage[key]
    found: Any = stage
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _tells(stage: Mapping[str, Any], key: str) -> bool:
    """Whether a stage has something to say in a column: zeros are a column's worth only where there are many."""
    found = value(stage, key)
    return found is not None and (key != "nonzero_parameters" or found < 0.99 * stage.get("parameters", found))


def _cell(key: str, value: Any, parent: Any) -> Text:
    if value is None:
        return Text("–", style="dim")
    cell = text(_number(key, value))
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
