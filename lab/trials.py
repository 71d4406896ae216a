"""What a sweep has found: its trials as a table, and as pictures of where good values lie and what matters."""

from __future__ import annotations

import csv
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from lab.files import write_text
from lab.gates import figure
from lab.pictures import COLORS, fitting, grid, keep, styled
from lab.recipe import shown
from lab.run import Run
from lab.space import Axis, Sweep
from lab.statistics import Estimate, estimate
from lab.study import ERROR, RUNS, Sweeping
from lab.sweep import short, values_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 20
"""How many trials a table has."""
LABEL = 24
"""How many letters a choice has in a picture."""
FEWEST = 4
"""How many trials say anything of what matters."""
STATES = {
    TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
    TrialState.RUNNING: "running", TrialState.WAITING: "waiting",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A trial.

    Args:
        value: its runs' figure with its interval; None where there is none yet.
        values: by the paths of the space.
        runs: its runs' folders.
    """

    number: int
    status: str
    value: Estimate | None
    values: dict[str, Any]
    runs: list[Path]
    error: str | None


def rows(sweeping: Sweeping) -> list[Row]:
    """The trials, the best first, those without a value last."""
    sweep = sweeping.work.sweep
    found = [_row(sweeping, trial) for trial in sweeping.trials]
    sign = -1 if sweep.maximize else 1
    rank = {"finished": 0, "pruned": 1}
    return sorted(
        found,
        key=lambda row: (rank.get(row.status, 2), sign * row.value.mean if row.value else math.inf, row.number),
    )


def _row(sweeping: Sweeping, trial: FrozenTrial) -> Row:
    work = sweeping.work
    folders = [work.folder.parent / name for name in trial.user_attrs.get(RUNS, [])]
    figures = [value for folder in folders if (value := _reached(folder, work.sweep)) is not None]
    if not figures and trial.value is not None:  # its runs are on another machine
        figures = [trial.value]
    reached = estimate(figures) if figures else None
    values, error = dict(values_of(work.sweep, trial)), trial.user_attrs.get(ERROR)
    return Row(trial.number, STATES[trial.state], reached, values, folders, error)


def _reached(folder: Path, sweep: Sweep) -> float | None:
    if not (folder / "results.json").is_file():
        return None
    return figure(Run(folder).results["stages"].get(sweep.stage, {}), sweep.metric)


def as_dict(row: Row) -> dict[str, Any]:
    """A trial as JSON has it."""
    value = None if row.value is None else {"mean": row.value.mean, "interval": row.value.half, "n": row.value.n}
    said = {"trial": row.number + 1, "status": row.status, "value": value, "values": row.values}
    return {**said, "runs": [run.name for run in row.runs], "error": row.error}


def table(sweep: Sweep, found: list[Row]) -> Table:
    """The best trials, a row each."""
    result = Table("trial", sweep.goal, *(axis.path for axis in sweep.axes), "", "run")
    for row in found[:SHOWN]:
        cells = [label(row.values[axis.path]) if axis.path in row.values else "–" for axis in sweep.axes]
        status = "" if row.status == "finished" else row.status
        run = row.runs[0].name + (f" and {len(row.runs) - 1} more" if len(row.runs) > 1 else "") if row.runs else "–"
        result.add_row(str(row.number + 1), _said(row.value), *cells, status, run)
    if len(found) > SHOWN:
        result.caption = f"{len(found) - SHOWN} more are in trials.csv"
    return result


def _said(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.5g}" + (f" ± {value.half:.2g}" if value.half is not None else "")


def keep_all(sweeping: Sweeping, found: list[Row]) -> list[Path]:
    """Write ``trials.csv`` and the pictures into the sweep's folder."""
    folder, sweep = sweeping.work.folder, sweeping.work.sweep
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", "status", sweep.goal, "interval", *(axis.path for axis in sweep.axes), "runs", "error"])
    for row in sorted(found, key=lambda row: row.number):
        value = (row.value.mean, row.value.half) if row.value else ("", "")
        cells = [shown(row.values[axis.path]) if axis.path in row.values else "" for axis in sweep.axes]
        runs = " ".join(run.name for run in row.runs)
        said = ["" if part is None else part for part in value]
        writer.writerow([row.number + 1, row.status, *said, *cells, runs, row.error or ""])
    write_text(folder / "trials.csv", text.getvalue())
    pictures = {"parallel": parallel(sweep, found), "importance": important(sweep, importances(sweeping))}
    return [keep(folder, name, picture) for name, picture in pictures.items() if picture is not None]


def importances(sweeping: Sweeping) -> dict[str, float]:
    """How much of what the figure varies by each key explains, by fANOVA; empty of few trials, or equal ones.

    F. Hutter, H. Hoos, K. Leyton-Brown: An Efficient Approach for Assessing Hyperparameter Importance, ICML 2014.
    """
    done = [trial for trial in sweeping.trials if trial.state == TrialState.COMPLETE]
    if len(done) < FEWEST or len({trial.value for trial in done}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(optuna.importance.get_param_importances(sweeping.study, evaluator=evaluator))


def parallel(sweep: Sweep, found: list[Row]) -> Figure | None:
    """Every trial as a line through its values, coloured by what it reached."""
    done = [row for row in found if row.value is not None and len(row.values) == len(sweep.axes)]
    if len(done) < 2:
        return None
    reached = [row.value.mean for row in done if row.value is not None]
    low, high = min(reached), max(reached)
    with styled():
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        figure_, (ax,) = grid(1, width=1.6 + 1.5 * len(sweep.axes), height=3.6)
        norm, colors = Normalize(low, high), colormaps["viridis" if sweep.maximize else "viridis_r"]
        order = sorted(zip(reached, done, strict=True), key=lambda pair: pair[0] if sweep.maximize else -pair[0])
        for value, row in order:  # the best on top
            heights = [_height(axis, row.values[axis.path]) for axis in sweep.axes]
            ax.plot(range(len(heights)), heights, color=colors(norm(value)), linewidth=1.2, marker="o", markersize=3)
        for place, axis in enumerate(sweep.axes):
            ax.axvline(place, color=COLORS[7], linewidth=0.6, zorder=0)
            for height, text in _ticks(axis):
                ax.annotate(
                    text, (place, height), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}, zorder=3,
                )  # fmt: skip
        ax.set_xticks(range(len(sweep.axes)), [axis.path.replace(".", "\n") for axis in sweep.axes])
        ax.set(xlim=(-0.3, len(sweep.axes) - 0.4), ylim=(-0.05, 1.05), yticks=[])
        figure_.colorbar(ScalarMappable(norm, colors), ax=ax, label=sweep.goal)
    return figure_


def label(choice: Any) -> str:
    """A choice in few words: of a component its name and arguments."""
    if isinstance(choice, dict) and "name" in choice:
        arguments = ", ".join(f"{key}={shown(value)}" for key, value in choice.items() if key != "name")
        return fitting(f"{choice['name']}({arguments})", LABEL) if arguments else str(choice["name"])
    return fitting(short(choice), LABEL)


def important(sweep: Sweep, found: dict[str, float]) -> Figure | None:
    """What part of the figure's variance each key explains."""
    if not found:
        return None
    with styled():
        figure_, (ax,) = grid(1, width=5.2, height=0.9 + 0.35 * len(found))
        names, values = list(found)[::-1], list(found.values())[::-1]
        ax.barh(names, values, color=COLORS[0])
        ax.set(xlabel=f"part of the variance of {sweep.goal}", xlim=(0, 1))
    return figure_


def _height(axis: Axis, value: Any) -> float:
    """Where a value is on its axis, from 0 to 1."""
    if axis.choices:
        return list(axis.choices).index(value) / (len(axis.choices) - 1)
    assert axis.low is not None
    assert axis.high is not None
    scale = math.log if axis.log else float
    return (scale(value) - scale(axis.low)) / (scale(axis.high) - scale(axis.low))


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    if axis.choices:
        return [(_height(axis, choice), label(choice)) for choice in axis.choices]
    return [(0.0, f"{axis.low:g}"), (1.0, f"{axis.high:g}")]
