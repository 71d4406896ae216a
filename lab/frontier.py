"""What smaller and faster costs: a metric against bytes and against milliseconds, and the rows that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lab import pictures
from lab.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lab.compare import Comparison

COSTS = {"bytes": "bytes of the file that runs", "latency_ms.batch_64": "milliseconds for a batch of 64"}
"""What is paid, and what its axis says."""
FALLING = ("loss", "error", "mse", "mae", "rmse", "perplexity")
"""How metrics end of which less is better."""


def unbeaten(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """The points for which no other costs as little and is worth as much, the cheapest first.

    Args:
        costs: ``[N]``, less is better.
        values: ``[N]``, more is better.
    """
    found: list[int] = []
    for at in sorted(range(len(costs)), key=lambda n: (costs[n], -values[n])):
        if not found or values[at] > values[found[-1]]:
            found.append(at)
    return found


def frontier(found: Comparison) -> Figure:
    """The first metric of a comparison's rows against what each costs, the rows that no other beats joined by a line.

    Raises:
        UserError: fewer than two rows have the metric and a cost.
    """
    metric = found.metrics[0]
    rows = [row for row in found.rows if row.estimate(metric)]
    known = [cost for cost in COSTS if sum(cost in row.figures for row in rows) > 1]
    if not known:
        raise UserError(f"a frontier needs two stages with {metric}, and with bytes or milliseconds")
    with pictures.styled():
        figure, axes = pictures.grid(len(known), width=4.6, height=3.4)
        for cost, ax in zip(known, axes, strict=True):
            _draw(ax, found, metric, cost)
    return figure


def _draw(ax: Axes, found: Comparison, metric: str, cost: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    points = [
        (row.figures[cost], estimate, row.name)
        for row in found.rows
        if cost in row.figures and (estimate := row.estimate(metric))
    ]
    costs, means = [point[0] for point in points], [point[1].mean for point in points]
    sign = -1 if metric.lower().endswith(FALLING) else 1
    best = unbeaten(costs, [sign * mean for mean in means])
    ax.step([costs[n] for n in best], [means[n] for n in best], where="post", color=pictures.INK, alpha=0.35, zorder=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.18, y=0.14)
    for at, (x, estimate, name) in enumerate(points):
        color = pictures.COLORS[at % len(pictures.COLORS)]
        if estimate.interval:
            ax.plot([x, x], estimate.interval, color=color, linewidth=1.6)
        ax.scatter([x], [estimate.mean], s=42, color=color, linewidths=0, zorder=3, alpha=1 if at in best else 0.55)
        ax.annotate(pictures.fitting(name, 30), (x, estimate.mean), (5, 5), textcoords="offset points", fontsize=8)
    ax.set(xlabel=COSTS[cost], ylabel=metric)
