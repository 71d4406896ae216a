"""Pictures of runs: training curves, confusion matrices, what was predicted against what is true, seeds compared.

Figures are ``matplotlib.figure.Figure`` objects, never pyplot's: nothing global, no display. Matplotlib is imported
when the first one is drawn.
"""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lab import statistics
from lab.files import named, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lab.compare import Comparison, Row

INK = "#1f2933"
"""Text and axes; on a page they take the page's own colour."""
COLORS = ("#3b7dd8", "#e07b39", "#2a9d78", "#b565a7", "#c9a227", "#58a9c9", "#d1495b", "#7d8597")
"""Distinct for most colour-blind eyes, on white and on black."""
PANELS = 4
"""How many metrics one picture of curves shows."""
POINTS = 400
"""How many points of a curve are drawn."""
COUNTED = 20
"""Up to how many classes a confusion matrix has its counts in its cells."""
NAMED = 60
"""Up to how many classes it has their names at its sides."""

Curve = tuple[list[float], list[float]]
"""Steps and values."""

_STYLE: Any = {
    "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlecolor": INK,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "xtick.major.size": 3, "ytick.major.size": 3,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6, "lines.solid_capstyle": "round",
    "axes.formatter.useoffset": False, "svg.hashsalt": "lab", "text.parse_math": False,
}  # fmt: skip


def png(figure: Figure) -> bytes:
    """A figure as a PNG file on white, 150 dots an inch."""
    return _saved(figure, format="png", dpi=150, facecolor="white")


def svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element for a page: transparent, its ink in the page's ``currentColor``."""
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = _saved(figure, format="svg", transparent=True, metadata=metadata).decode()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def keep(folder: Path, name: str, picture: Figure | bytes) -> Path:
    """Write a picture into a stage's ``pictures/``; its path.

    Args:
        name: without an extension.
        picture: a figure, or the bytes of a PNG or GIF file.

    Raises:
        ValueError: the name is no file's name.
        OSError: it cannot be written.
    """
    content = picture if isinstance(picture, bytes) else png(picture)
    path = folder / named(name, "gif" if content.startswith(b"GIF8") else "png")
    folder.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def of_training(stage: Path) -> dict[str, Figure]:
    """The pictures that every stage has: ``curves`` of its ``metrics.csv``, if it trained."""
    drawn = curves(stage / "metrics.csv")
    return {"curves": drawn} if drawn is not None else {}


def curves(metrics: Path) -> Figure | None:
    """Loss and metrics over steps, training beside validation, of a stage's ``metrics.csv``; None where it has none."""
    read = _read(metrics)
    names = _panels(read)
    if not names:
        return None
    with styled():
        figure, axes = grid(len(names), width=4.2, height=2.9)
        for ax, name in zip(axes, names, strict=True):
            for split, color in (("train", COLORS[7]), ("val", COLORS[0])):
                if (split, name) in read:
                    steps, values = _thinned(*read[split, name])
                    ax.plot(steps, values, color=color, label=split, marker="o" if len(steps) == 1 else None)
            _label(ax, name, legend=True)
    return figure


def confusion(counts: NDArray[Any], classes: Sequence[str] | None = None) -> Figure:
    """A confusion matrix: colours are shares of each true class, counts stand in the cells of up to 20 classes.

    Args:
        counts: ``[C, C]``, true class by predicted class.
        classes: their names; numbers where there are none.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    size = len(counts)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    names = [fitting(name, 18) for name in (classes or map(str, range(size)))]
    side = min(max(0.42 * size, 2.6), 9.0)
    with styled():
        figure, (ax,) = grid(1, width=side + 1.6, height=side + 0.9)
        image = ax.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))  # rare mistakes stay visible
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.set(xlabel="predicted class", ylabel="true class")
        right = counts.trace() / max(counts.sum(), 1)
        ax.set_title(f"{right:.2%} of {int(counts.sum()):,} right")
        if size <= NAMED:
            upright = max(map(len, names)) > 3
            small = 9 if size <= COUNTED else 6
            ax.set_xticks(range(size), names, rotation=90 if upright else 0, fontsize=small)
            ax.set_yticks(range(size), names, fontsize=small)
        ax.tick_params(length=0)
        for (row, column), count in (((i, j), counts[i, j]) for i in range(size) for j in range(size)):
            if size <= COUNTED and count:
                color = "white" if shares[row, column] > 0.3 else INK
                ax.text(column, row, f"{int(count)}", ha="center", va="center", color=color, fontsize=8)
        bar = figure.colorbar(image, ax=ax, shrink=0.8, aspect=24, ticks=[0, 0.05, 0.25, 0.5, 1])
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.set_label("share of the true class")
    return figure


def heatmap(values: NDArray[Any], rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """A table as colours, its values in the cells of up to 20 columns; NaN stays empty.

    Args:
        values: ``[R, C]``.
        rows: their names.
        columns: theirs.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    with styled():
        width, height = (min(max(0.48 * size, 2.6), 9.0) for size in values.T.shape)
        figure, (ax,) = grid(1, width=width + 1.8, height=height + 0.9)
        image = ax.imshow(values, cmap="Blues", vmin=low, vmax=high)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.set_title(fitting(title))
        for axis, names in ((ax.set_xticks, columns), (ax.set_yticks, rows)):
            every = -(-len(names) // NAMED)
            axis(range(0, len(names), every), names[::every])
        ax.tick_params(length=0)
        if values.shape[1] <= COUNTED:
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    dark = value - low > 0.6 * (high - low)
                    color = "white" if dark else INK
                    ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
        figure.colorbar(image, ax=ax, shrink=0.8, aspect=24).outline.set_visible(False)
    return figure


def scatter(predicted: NDArray[Any], true: NDArray[Any]) -> Figure:
    """Predicted against true values, a panel a column, with the line where both are equal.

    Args:
        predicted: ``[N, K]``.
        true: ``[N, K]``.
    """
    with styled():
        figure, axes = grid(true.shape[1], width=3.6, height=3.4)
        for k, ax in enumerate(axes):
            ends = [min(true[:, k].min(), predicted[:, k].min()), max(true[:, k].max(), predicted[:, k].max())]
            ax.plot(ends, ends, color=INK, alpha=0.45, linewidth=0.9, zorder=1)
            alpha = min(0.8, max(0.15, 200 / len(true)))
            ax.scatter(true[:, k], predicted[:, k], s=12, color=COLORS[0], alpha=alpha, linewidths=0)
            ax.set(xlabel="true", ylabel="predicted")
            ax.set_title(f"column {k}" if true.shape[1] > 1 else f"{len(true):,} samples")
    return figure


def clouds(planes: Mapping[str, NDArray[Any]], first: int, names: tuple[str, str]) -> Figure:
    """Two kinds of samples in the plane, a panel for each of several times.

    Args:
        planes: ``[N, 2]`` each, by the panel's title.
        first: how many rows, from the first, are of the one kind.
        names: of the two kinds.
    """
    with styled():
        figure, axes = grid(len(planes), width=3.8, height=3.6)
        for ax, (title, plane) in zip(axes, planes.items(), strict=True):
            for name, part, color in zip(names, (plane[:first], plane[first:]), COLORS, strict=False):
                ax.scatter(part[:, 0], part[:, 1], s=9, color=color, alpha=0.5, linewidths=0, label=name)
            ax.set(xlabel="first principal component", ylabel="second")
            ax.set_title(fitting(title))
            ax.legend()
    return figure


def dots(found: Comparison, metric: str) -> Figure:
    """A metric of a comparison: a dot a run, the mean and its 95 % interval."""
    with styled():
        figure, (ax,) = grid(1, width=4.6, height=_height(found))
        _dots(ax, found, metric)
    return figure


def bands(found: Comparison) -> dict[str, Figure]:
    """Validation metrics over steps: mean and 95 % interval over the runs of each row."""
    rows, names = _validated(found)
    figures = {}
    with styled():
        for name in names:
            figures[f"val/{name}"], (ax,) = grid(1, width=4.6, height=3.0)
            _bands(ax, rows, name)
    return figures


def overview(found: Comparison) -> Figure:
    """What :func:`dots` and :func:`bands` draw, in one figure."""
    from matplotlib.figure import Figure

    rows, names = _validated(found)
    heights = [_height(found)] * -(-len(found.metrics) // 2) + [3.0] * -(-len(names) // 2)
    with styled():
        figure = Figure(figsize=(9.2, sum(heights)), layout="constrained")
        cells = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
        above = -(-len(found.metrics) // 2)
        for metric, ax in zip_longest(found.metrics, cells[:above].flat):
            _dots(ax, found, metric) if metric else ax.set_axis_off()
        for name, ax in zip_longest(names, cells[above:].flat):
            _bands(ax, rows, name) if name else ax.set_axis_off()
    return figure


def _height(found: Comparison) -> float:
    return 1.0 + 0.42 * len(found.rows)


def _dots(ax: Axes, found: Comparison, metric: str) -> None:
    for at, row in enumerate(found.rows):
        color, estimate = COLORS[at % len(COLORS)], row.estimate(metric)
        if estimate is None:
            continue
        if estimate.interval:
            values = [*row.values[metric].values()]
            ax.scatter(values, [at - 0.24] * len(values), s=16, color=color, alpha=0.6, linewidths=0)
            ax.plot(estimate.interval, [at, at], color=color, linewidth=2.2)
        ax.scatter([estimate.mean], [at], s=46, marker="D", color=color, linewidths=0, zorder=3)
    ax.set_ylim(len(found.rows) - 0.4, -0.6)
    ax.set_yticks(range(len(found.rows)), [fitting(row.name, 40) for row in found.rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_title(fitting(metric))
    if any(len(row.members) > 1 for row in found.rows):
        ax.set_xlabel("dots: runs · line: 95 % interval of the mean", fontsize=8)


def _bands(ax: Axes, rows: Mapping[str, list[dict[tuple[str, str], Curve]]], name: str) -> None:
    reached: list[float] = []
    for at, (row, runs) in enumerate(rows.items()):
        curves = [run["val", name] for run in runs if ("val", name) in run]
        steps, means, lower, upper = _averaged(curves)
        reached += [value for _, values in curves for value in values]
        if steps:
            color = COLORS[at % len(COLORS)]
            ax.plot(steps, means, color=color, label=fitting(row, 40), marker="o" if len(steps) == 1 else None)
            ax.fill_between(steps, lower, upper, color=color, alpha=0.18, linewidth=0)
    margin = 0.05 * (max(reached) - min(reached)) or 0.05
    ax.set_ylim(min(reached) - margin, max(reached) + margin)  # a symmetric interval may leave what a metric can be
    _label(ax, f"val/{name}", legend=True)


def _averaged(curves: Sequence[Curve]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, means, lower and upper ends of the intervals; where one run only got there, all three are its value."""
    at: dict[float, list[float]] = {}
    for steps, values in curves:
        for step, value in zip(*_thinned(steps, values), strict=True):
            at.setdefault(step, []).append(value)
    found = [(step, statistics.estimate(at[step])) for step in sorted(at)]
    ends = [estimate.interval or (estimate.mean, estimate.mean) for _, estimate in found]
    return [s for s, _ in found], [e.mean for _, e in found], [low for low, _ in ends], [high for _, high in ends]


def _validated(found: Comparison) -> tuple[dict[str, list[dict[tuple[str, str], Curve]]], list[str]]:
    """The curves of every row's runs, and the validation metrics among them that are shown."""
    rows = {row.name: _curves_of(row) for row in found.rows}
    known = {key: curve for runs in rows.values() for run in runs for key, curve in run.items() if key[0] == "val"}
    return rows, _panels(known)


def _curves_of(row: Row) -> list[dict[tuple[str, str], Curve]]:
    return [_read(member.run.stage(row.stage) / "metrics.csv") for member in row.members]


def _read(path: Path) -> dict[tuple[str, str], Curve]:
    """The finite values of ``train/…`` and ``val/…`` by split and metric; plain modules write ``val_acc``."""
    found: dict[tuple[str, str], Curve] = {}
    if not path.is_file():  # a pipe would be waited for
        return found
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            splits = {c: m.groups() for c in reader.fieldnames or () if (m := re.fullmatch(r"(train|val)[/_](.+)", c))}
            for line in reader:
                for column, (split, name) in splits.items():
                    step, value = _number(line.get("step")), _number(line.get(column))
                    if step is not None and value is not None:
                        steps, values = found.setdefault((split, name), ([], []))
                        steps.append(step)
                        values.append(value)
    except (OSError, ValueError, csv.Error):  # none, or damaged: the rest of the run can be shown
        return found
    return found


def _number(cell: str | None) -> float | None:
    try:
        value = float(cell or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _panels(read: Mapping[tuple[str, str], Any]) -> list[str]:
    """The metrics to show: the loss first, those that are validated before the others."""
    names = dict.fromkeys(name for _, name in read)
    return sorted(names, key=lambda name: (name != "loss", ("val", name) not in read))[:PANELS]


def _thinned(steps: list[float], values: list[float]) -> Curve:
    every = -(-len(steps) // POINTS)
    return steps[::every], values[::every]


def _label(ax: Axes, name: str, *, legend: bool) -> None:
    ax.set_title(fitting(name))
    ax.set_xlabel("step")
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend()


def grid(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with as many axes, at most two beside each other."""
    from matplotlib.figure import Figure

    columns, rows = min(count, 2), -(-count // 2)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def fitting(name: str, longest: int = 60) -> str:
    """A name, cut in the middle where it is too long."""
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-(longest // 2 - 1) :]}"


@contextmanager
def styled() -> Iterator[None]:
    """The house's look, for a while."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _saved(figure: Figure, **options: Any) -> bytes:
    content = io.BytesIO()
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, **options)
    return content.getvalue()


def adaptation(summaries: Sequence[Mapping[str, float]], measure: str) -> Figure:
    """A test's figure after 0, 1, … n steps of adaptation: means with their intervals, and medians.

    Args:
        summaries: ``mean``, ``interval`` (half of it) and ``median``, step by step.
        measure: what they are of.
    """
    steps = range(len(summaries))
    mean, half, median = (np.array([each[key] for each in summaries]) for key in ("mean", "interval", "median"))
    with styled():
        figure, (ax,) = grid(1, width=4.6, height=3.1)
        ax.fill_between(steps, mean - half, mean + half, color=COLORS[0], alpha=0.2, linewidth=0)
        ax.plot(steps, mean, color=COLORS[0], marker="o", markersize=4, label="mean, 95 %")
        ax.plot(steps, median, color=COLORS[1], marker="o", markersize=3, linewidth=1, label="median")
        ax.set(xlabel="steps of adaptation", xticks=list(steps) if len(steps) <= COUNTED else [])
        ax.set_title(f"{measure} of unseen tasks")
        ax.legend()
    return figure


def adapted(
    points: NDArray[Any], values: NDArray[Any], asked: NDArray[Any], true: NDArray[Any], found: NDArray[Any]
) -> Figure:
    """Tasks of one number in and one out: the points that are known, the curve, and answers before and after.

    Args:
        points: ``[T, S]`` inputs of the support set.
        values: ``[T, S]``, theirs.
        asked: ``[T, Q]`` inputs of the queries.
        true: ``[T, Q]``, theirs.
        found: ``[T, 3, Q]`` answers before, after one and after all steps.
    """
    with styled():
        figure, axes = grid(len(points), width=3.6, height=2.7)
        for task, ax in enumerate(axes):
            order = asked[task].argsort()
            x = asked[task][order]
            ax.plot(x, true[task][order], color=INK, linestyle=":", linewidth=1.4, label="true")
            for place, (name, color) in enumerate(
                (("before", COLORS[7]), ("1 step", COLORS[1]), ("all steps", COLORS[0]))
            ):
                ax.plot(x, found[task, place][order], color=color, linewidth=1.2, label=name)
            ax.plot(points[task], values[task], "o", color=INK, markersize=3.5)
            ax.set_title(f"task {task + 1}")
        axes[0].legend()
    return figure
