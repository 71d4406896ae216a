from __future__ import annotations

import csv
import errno
import io
import math
import random
from pathlib import Path
from typing import Any

import pytest
from digits_log import LIGHTNINGS_OWN, fit

from lab.loggers.csv import CSV

pytestmark = LIGHTNINGS_OWN


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_fit_and_a_test_leave_every_metric_with_its_step_and_epoch(tmp_path: Path) -> None:
    fit([CSV(str(tmp_path))])
    found = rows(tmp_path)
    assert list(found[0]) == [
        "step",
        "epoch",
        "train/loss",
        "val/accuracy",
        "val/third",
        "train/weights",
        "test/accuracy",
    ]
    losses = [(int(r["step"]), int(r["epoch"])) for r in found if r["train/loss"]]
    assert losses == [(step, step // 10) for step in range(1, 30, 2)]
    assert [int(r["step"]) for r in found if r["val/accuracy"]] == [9, 19, 29]
    assert len([r for r in found if r["test/accuracy"]]) == 1
    assert not (tmp_path / "hparams.yaml").exists()


def test_numbers_keep_their_full_precision(tmp_path: Path) -> None:
    values = {f"m{i}": random.Random(i).random() * 10.0 ** (i - 10) for i in range(20)}
    values |= {"nan": math.nan, "inf": -math.inf}
    CSV(str(tmp_path)).log_metrics(values, step=2**53)
    (row,) = rows(tmp_path)
    assert {name: repr(float(row[name])) for name in values} == {name: repr(value) for name, value in values.items()}
    assert int(row["step"]) == 2**53


def test_a_row_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    logger = CSV(str(tmp_path))
    for step in range(3):
        logger.log_metrics({"loss": 0.5}, step=step)
        assert len(rows(tmp_path)) == step + 1


def test_a_new_metric_becomes_a_column_and_earlier_rows_stay(tmp_path: Path) -> None:
    logger = CSV(str(tmp_path))
    logger.log_metrics({"epoch": 0, "loss": 1.5}, step=0)
    logger.log_metrics({"epoch": 1, "a,b": 2.5, 'say "hi"': 3}, step=1)
    logger.log_metrics({"loss": 0.5}, step=2)
    assert rows(tmp_path) == [
        {"step": "0", "epoch": "0", "loss": "1.5", "a,b": "", 'say "hi"': ""},
        {"step": "1", "epoch": "1", "loss": "", "a,b": "2.5", 'say "hi"': "3"},
        {"step": "2", "epoch": "", "loss": "0.5", "a,b": "", 'say "hi"': ""},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    CSV(str(tmp_path)).log_metrics({"loss": 1.5}, step=0)
    again = CSV(str(tmp_path))
    assert again.state_dict() == {"rows": 1}
    again.log_metrics({"loss": 0.5, "val/loss": 2.5}, step=1)
    assert [(r["step"], r["loss"], r["val/loss"]) for r in rows(tmp_path)] == [("0", "1.5", ""), ("1", "0.5", "2.5")]


def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path: Path) -> None:
    CSV(str(tmp_path)).log_metrics({"loss": 1.5}, step=0)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1,,0.2")
    CSV(str(tmp_path)).log_metrics({"loss": 0.5}, step=1)
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [("0", "1.5"), ("1", "0.5")]


def test_a_saved_state_returns_to_an_earlier_number_of_rows(tmp_path: Path) -> None:
    logger = CSV(str(tmp_path))
    for step in range(5):
        logger.log_metrics({"loss": float(step), f"column{step}": 1.0}, step=step)
    CSV(str(tmp_path)).load_state_dict({"rows": 2})
    again = CSV(str(tmp_path))
    assert again.state_dict() == {"rows": 2}
    again.log_metrics({"loss": 9.0}, step=2)
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [("0", "0.0"), ("1", "1.0"), ("2", "9.0")]


def test_a_full_disk_is_an_error_with_the_path_and_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSV(str(tmp_path))
    logger.log_metrics({"loss": 1.5}, step=0)
    before = (tmp_path / "metrics.csv").read_bytes()
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if super().write(bytes(data)[:4]) < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Full(self, "ab") if mode == "ab" else opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"No space left.*earlier rows are intact.*metrics\.csv"):
        logger.log_metrics({"loss": 0.123456789}, step=1)
    assert (tmp_path / "metrics.csv").read_bytes() == before
