"""Tables that stages leave: whole CSV files, whose names and rows are what they should be."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lab.tables import Table, keep


def test_a_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = keep(tmp_path / "tables", "costs", Table(("name", "bits"), [("a, b", 8), ('say "c"', 4)]))
    assert path == tmp_path / "tables" / "costs.csv"
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "bits"], ["a, b", "8"], ['say "c"', "4"]]


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [("../x", [], "a name is letters"), ("x/y", [], "a name is letters"), ("x", [(1, 2, 3)], "a row of 3 cells")],
)
def test_what_is_no_table_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, rows: list[tuple[int, ...]], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        keep(tmp_path / "tables", name, Table(("a", "b"), rows))
    assert not list(tmp_path.rglob("*.csv"))
