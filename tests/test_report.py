"""The scoreboard: stages side by side, with differences to the parent."""

from io import StringIO
from typing import Any

from rich.console import Console

from lab.report import met, missed, rows, scoreboard

RESULTS: dict[str, Any] = {
    "run": "a-run",
    "stages": {
        "teacher": {
            "status": "finished", "bytes": 1000,
            "metrics": {"test/loss": 0.1, "test/accuracy": 0.97, "val/accuracy": 0.5},
            "parameters": 200, "met": ["bytes is 1000, <= 1000 is required"],
            "macs": 3_000_000, "latency_ms": {"batch_1": 0.5, "batch_64": 2.0}, "train_seconds": 3.0,
        },
        "student": {
            "status": "gated", "metrics": {"test/accuracy": 0.95, "test/loss": 0.2}, "parent": "teacher", "bytes": 250,
            "parameters": 50, "missed": ["bytes is 250, < 200 is required"],
        },
    },
}  # fmt: skip


def shown(results: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, file=StringIO())
    console.print(scoreboard(results))
    return console.file.getvalue()


def test_figures_stand_beside_their_difference_to_the_parent() -> None:
    text = shown(RESULTS)
    assert "0.9500" in text
    assert "-0.0200" in text
    assert "-75%" in text
    assert "3M" in text


def test_a_stage_that_missed_a_gate_says_so() -> None:
    assert "gated" in shown(RESULTS)
    assert missed(RESULTS) == ["student: bytes is 250, < 200 is required"]
    assert met(RESULTS) == ["teacher: bytes is 1000, <= 1000 is required"]


def test_zeros_have_a_column_where_there_are_many() -> None:
    for number, expected in ((200, False), (199, False), (20, True)):
        stages = {"a": {"parameters": 200, "nonzero_parameters": number, "metrics": {"test/accuracy": 0.5}}}
        assert ("non-zero" in shown({"run": "r", "stages": stages})) == expected


def test_it_fits_eighty_columns() -> None:
    assert max(len(line) for line in shown(RESULTS, 80).splitlines()) <= 80


def test_markup_in_names_is_shown_not_obeyed() -> None:
    stages = {"[red]x[/red]": RESULTS["stages"]["teacher"]}
    assert "[red]x[/red]" in shown({"run": "[bold]", "stages": stages})


def test_rows_are_plain_for_loggers() -> None:
    columns, values = rows(RESULTS)
    assert columns[:4] == ["stage", "parent", "test/accuracy", "test/loss"]
    assert values[1][:4] == ["student", "teacher", 0.95, 0.2]
    assert values[1][columns.index("latency_ms.batch_1")] is None
