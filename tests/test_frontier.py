"""The picture of what smaller and faster costs: which points no other beats, and what is drawn."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from test_compare import made

from lab import compare, groups
from lab.cli import main
from lab.frontier import frontier, unbeaten


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(1, 0.5), (2, 0.9), (3, 0.8)], {(1, 0.5), (2, 0.9)}),
        ([(1, 0.9), (2, 0.9), (3, 0.9)], {(1, 0.9)}),
        ([(2, 0.9), (2, 0.95), (1, 0.1)], {(2, 0.95), (1, 0.1)}),
        ([(5, 0.1)], {(5, 0.1)}),
    ],
)
def test_points_that_no_other_beats(points: list[tuple[float, float]], best: set[tuple[float, float]]) -> None:
    for order in permutations(points):
        found = unbeaten([cost for cost, _ in order], [value for _, value in order])
        assert {order[n] for n in found} == best
        assert [order[n][0] for n in found] == sorted(order[n][0] for n in found)


def stage(accuracy: float, size: int, milliseconds: float) -> dict[str, Any]:
    return {
        "metrics": {"test/accuracy": accuracy, "test/loss": 1 - accuracy}, "bytes": size,
        "latency_ms": {"batch_1": milliseconds / 9, "batch_64": milliseconds},
    }  # fmt: skip


def test_every_stage_is_a_point_in_each_panel_and_the_line_joins_the_best() -> None:
    run = made({"dense": stage(0.96, 4000, 9.0), "worse": stage(0.9, 4500, 9.5), "small": stage(0.95, 100, 2.0)})
    figure = frontier(compare.compare([groups.Pick(run)]))
    assert [ax.get_xlabel() for ax in figure.axes] == ["bytes of the file that runs", "milliseconds for a batch of 64"]
    for ax, ends in zip(figure.axes, ([100, 4000], [2.0, 9.0]), strict=True):
        assert [text.get_text() for text in ax.texts] == ["dense", "worse", "small"]
        assert list(ax.lines[0].get_xdata()) == ends
        assert ax.get_ylabel() == "test/accuracy"
        ax.figure.canvas.draw()
        assert not any("$" in label.get_text() for label in ax.get_xticklabels(which="both"))


def test_less_loss_is_better() -> None:
    run = made({"dense": stage(0.96, 4000, 9.0), "small": stage(0.95, 100, 2.0)})
    figure = frontier(compare.compare([groups.Pick(run)], metrics=["loss"]))
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.05, 0.04])


def test_the_command_writes_a_png(tmp_path: Path) -> None:
    run = made({"dense": stage(0.96, 4000, 9.0), "small": stage(0.95, 100, 2.0)})
    path = tmp_path / "f.png"
    assert main(["compare", str(run.folder), "--frontier", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_one_point_is_no_frontier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made({"main": stage(0.96, 4000, 9.0)})
    assert main(["compare", str(run.folder), "--frontier", str(tmp_path / "f.png")]) == 2
    assert "a frontier needs two stages" in capsys.readouterr().err
    assert not (tmp_path / "f.png").exists()
