from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digits_log import LIGHTNINGS_OWN, Classifier, fit, loader
from lightning.pytorch import Trainer
from wandb_file import read, runs_in

from lab.loggers import wandb as module
from lab.loggers.csv import CSV
from lab.loggers.wandb import WandB

pytestmark = LIGHTNINGS_OWN

RECIPE: dict[str, Any] = {
    "seed": 0,
    "data": {"name": "mnist5k", "batch_size": 64, "labels": None},
    "module": {
        "name": "distill",
        "network": {"name": "convnet", "width": 8},
        "weight": 0.1,
        "lr": 1e-3,
        "tiny": 1e-300,
    },
    "callbacks": {"progress": None, "ema": {"name": "ema", "decay": 0.999, "on": True}},
    "trainer": {},
    "sizes": [1, [2.5, None], {"deep": [{"er": "ü [red]"}]}, []],
    "a.b": "1e-3",
}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, wherever the tests run, in W&B's memory neither."""
    import wandb

    wandb.teardown()
    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-settings"))
    module._tell_offline.cache_clear()
    yield
    wandb.teardown()


def test_every_metric_of_the_csv_is_in_the_wandb_file_with_its_step(tmp_path: Path) -> None:
    logger = WandB(str(tmp_path), group="run", job_type="student", title="distill/student", tags=("a", "b"))
    fit([CSV(str(tmp_path)), logger])
    logger.finish()
    (run,) = runs_in(tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    arrived = [{name.replace("trainer/global_step", "step"): v for name, v in row.items()} for row in run.history]
    assert arrived == rows
    assert {"train/loss", "train/weights", "val/accuracy", "val/third", "test/accuracy"} <= set().union(*arrived)
    assert (run.group, run.job_type, run.title, run.project, run.tags, run.exit_code) == (
        "run", "student", "distill/student", "lab", ["a", "b"], 0,
    )  # fmt: skip


def test_the_config_is_the_recipe_though_lightning_logs_the_modules_arguments_too(tmp_path: Path) -> None:
    logger = WandB(str(tmp_path), offline=True)
    logger.log_hyperparams(RECIPE)
    fit([logger], epochs=1, test=False)
    logger.finish()
    assert runs_in(tmp_path)[0].config == RECIPE


def test_a_number_that_is_none_arrives_as_what_it_is(tmp_path: Path) -> None:
    logger = WandB(str(tmp_path), offline=True)
    logger.log_metrics({"loss": math.nan, "bound": math.inf, "exact": 0.1 + 0.2}, step=7)
    logger.finish()
    (row,) = runs_in(tmp_path)[0].history
    assert math.isnan(row["loss"])
    assert (row["bound"], row["exact"], row["trainer/global_step"]) == (math.inf, 0.1 + 0.2, 7)


def test_finish_keeps_the_next_stage_out_of_this_ones_run(tmp_path: Path) -> None:
    for stage in ("teacher", "student"):
        logger = WandB(str(tmp_path / stage), job_type=stage, offline=True)
        logger.log_metrics({f"{stage}/loss": 1.0}, step=0)
        logger.finish()
        logger.finish()
    teacher, student = runs_in(tmp_path)
    assert teacher.run_id != student.run_id
    assert [set(run.history[0]) for run in (teacher, student)] == [
        {"teacher/loss", "trainer/global_step"},
        {"student/loss", "trainer/global_step"},
    ]


def test_a_fit_that_fails_closes_its_run_as_failed(tmp_path: Path) -> None:
    class Broken(Classifier):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("broken on purpose")

    logger = WandB(str(tmp_path), offline=True)
    trainer = Trainer(
        max_epochs=1, logger=logger, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, log_every_n_steps=1, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="broken on purpose"):
        trainer.fit(Broken(), loader(0, 100), loader(500, 600))
    assert runs_in(tmp_path)[0].exit_code == 1


def test_tables_and_images_arrive(tmp_path: Path) -> None:
    logger = WandB(str(tmp_path), offline=True)
    logger.log_table("scoreboard", ["stage", "accuracy"], [["teacher", 0.976], ["student", None]])
    logger.log_image("digits", [np.zeros((8, 8), dtype=np.uint8)])
    logger.finish()
    table, image = runs_in(tmp_path)[0].history
    assert table["scoreboard/nrows"] == 2 if "scoreboard/nrows" in table else table["scoreboard"]["nrows"] == 2
    assert any(name.startswith("digits") for name in image)
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_without_a_key_runs_are_offline_and_it_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("a", "b"):
        logger = WandB(str(tmp_path / stage))
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.finish()
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "no API key" in said.err
    assert "wandb sync" in said.err
    assert said.out == ""
    assert len(runs_in(tmp_path)) == 2


@pytest.mark.parametrize(
    ("environment", "offline", "mode"),
    [
        ({"WANDB_API_KEY": "0" * 40}, None, "online"),
        ({"WANDB_API_KEY": "0" * 40}, True, "offline"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "dryrun"}, None, "offline"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, False, "online"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
        ({"WANDB_MODE": "online"}, None, "offline"),
    ],
)
def test_where_a_run_goes(
    environment: dict[str, str], offline: bool | None, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert WandB(str(tmp_path), offline=offline)._wandb_init["mode"] == mode


def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert WandB(str(tmp_path))._wandb_init["mode"] == "online"


def test_to_insist_on_online_without_a_key_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"WANDB_API_KEY.*wandb login"):
        WandB(str(tmp_path), offline=False)


def test_disabled_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandB(str(tmp_path))
    fit([logger], epochs=1)
    logger.finish()
    assert list(tmp_path.rglob("*.wandb")) == []


def test_a_process_that_logs_and_ends_prints_nothing_and_asks_nothing(tmp_path: Path) -> None:
    program = f"""
from lab.loggers.wandb import WandB
for stage in ("a", "b"):
    logger = WandB({str(tmp_path)!r} + "/" + stage, offline=True)
    logger.log_hyperparams({{"seed": 0}})
    logger.log_metrics({{"loss": 1.0}}, step=0)
    logger.finish()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert [read(path).config for path in tmp_path.rglob("*.wandb")] == [{"seed": 0}] * 2
