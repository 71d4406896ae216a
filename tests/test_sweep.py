"""Sweeps: trials that are neither lost nor doubled, whoever works at them, and what is said of them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lab.cli import main
from lab.document import RecipeError
from lab.errors import UserError
from lab.run import Run
from lab.study import Sweeping, Work, presence
from lab.sweep import carry_out, prepare
from lab.trials import important, label, rows

BASE = """\
data: {name: digits, batch_size: 64}
trainer: {max_epochs: 2}
callbacks: {progress: null, profile: null, checkpoints: {every_seconds: 0.2}}
logger: csv
module: {name: supervised, network: {name: mlp, hidden: [8]}, optimizer: {name: adamw, lr: 0.01}}
sweep:
  maximize: val/accuracy
"""
SPACE = "  space: {module.optimizer.lr: {low: 1e-3, high: 1e-1, log: true}, module.network.hidden: [[8], [32]]}\n"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(more: str = SPACE, trials: int = 3, name: str = "r.yaml") -> str:
    Path(name).write_text(f"{BASE}  trials: {trials}\n{more}", encoding="utf-8")
    return name


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lab", "sweep", *arguments], env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def whole(work: Work, trials: int) -> None:
    """Every trial is there once, finished, with one run that says what it is."""
    found = Sweeping(work).trials
    assert [trial.number for trial in found] == list(range(trials))
    assert Counter(trial.state.name for trial in found) == {"COMPLETE": trials}
    folders = [folder for trial in found for folder in trial.user_attrs["runs"]]
    assert sorted(folders) == sorted(path.parent.name for path in Path("runs/r").glob("*/manifest.json"))
    for trial, folder in zip(found, folders, strict=True):
        run = Run(Path("runs/r") / folder)
        assert (run.status, run.manifest["group"], run.manifest["sweep"]["trial"]) == (
            "finished",
            work.name,
            trial.number,
        )
        assert run.results["stages"]["main"]["metrics"]["val/accuracy"] == pytest.approx(trial.value)


def test_trials_are_runs_of_a_group_and_the_table_has_the_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", written()]) == 0
    out = capsys.readouterr().out
    work = prepare("r.yaml")
    whole(work, 3)
    found = rows(Sweeping(work))
    reached = [row.value.mean for row in found if row.value]
    assert reached == sorted(reached, reverse=True)
    best = out.splitlines()[-1]
    assert best.startswith("lab fit r.yaml module.optimizer.lr=")
    with (work.folder / "trials.csv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [row["trial"] for row in listed] == ["1", "2", "3"]
    assert {float(row["val/accuracy"]) for row in listed} == set(reached)
    assert (work.folder / "parallel.png").exists()
    assert not list(work.folder.glob(".owner-*"))
    assert main(["sweep", "r.yaml", "--json"]) == 0  # it has ended: nothing is trained
    assert [row["trial"] for row in json.loads(capsys.readouterr().out)] == [row.number + 1 for row in found]
    assert main(["sweep", "r.yaml", "sweep.trials=4"]) == 0  # the same study goes on
    whole(prepare("r.yaml", ["sweep.trials=4"]), 4)
    assert "sweep." not in capsys.readouterr().out.splitlines()[-1]


def test_a_sweep_that_was_killed_goes_on_with_its_trials_where_they_were() -> None:
    written(trials=5)
    sweeping = command("r.yaml", "--jobs", "2", "trainer.max_epochs=12")
    while len(list(Path("runs/r").glob("*/main/checkpoints/last.ckpt"))) < 3:
        assert sweeping.poll() is None, sweeping.communicate()[0]
        time.sleep(0.05)
    os.kill(sweeping.pid, signal.SIGKILL)
    sweeping.communicate()
    work = prepare("r.yaml", ["trainer.max_epochs=12"])
    left = [trial.user_attrs["runs"][0] for trial in Sweeping(work).trials if trial.state.name == "RUNNING"]
    assert left
    before = {folder: (Path("runs/r") / folder / "main/metrics.csv").exists() for folder in left}
    going_on = command("r.yaml", "--jobs", "2", "trainer.max_epochs=12")
    said, _ = going_on.communicate(timeout=240)
    assert going_on.returncode == 0, said
    whole(work, 5)
    assert all((Path("runs/r") / folder / "main/metrics.csv").exists() for folder in before)


def test_two_processes_on_one_storage_share_the_trials() -> None:
    written(trials=5)
    storage = f"sqlite:///{Path('shared.db').resolve()}"
    both = [command("r.yaml", "--storage", storage) for _ in range(2)]
    for process in both:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    work = prepare("r.yaml", storage=storage)
    whole(work, 5)
    assert len({trial.user_attrs["owner"] for trial in Sweeping(work).trials}) == 2


def test_a_trial_is_taken_over_only_from_a_process_that_is_gone() -> None:
    work = prepare(written())
    with presence(work.folder) as late:
        with presence(work.folder) as first:
            trial = Sweeping(work, first).begun()
            assert trial is not None
            assert Sweeping(work, late).left() == []
        assert [left.number for left in Sweeping(work, late).left()] == [trial.number]
        assert Sweeping(work, late).left() == []  # it is this one's now


def test_a_grid_is_walked_once_with_seeds_and_intervals() -> None:
    more = "  sampler: grid\n  seeds: 2\n  space: {module.network.hidden: [[8], [16]]}\n"
    work = prepare(written(more))
    found = rows(carry_out(work, tell=lambda _: None))
    assert sorted(row.values["module.network.hidden"] for row in found) == [[8], [16]]
    assert all(row.value is not None and row.value.n == 2 and row.value.half is not None for row in found)
    seeds = [Run(path).manifest["seed"] for row in found for path in row.runs]
    assert seeds == [0, 1, 0, 1]


def test_a_trial_that_does_badly_is_pruned_and_one_that_fails_is_said() -> None:
    more = (
        "  sampler: grid\n  pruner: {name: percentile, percentile: 99.0, n_startup_trials: 1}\n"
        "  space: {module.optimizer.lr: [0.01, 1e-9]}\n"
    )
    said: list[str] = []
    work = prepare(written(more), ["trainer.max_epochs=3"])
    best, pruned = rows(carry_out(work, tell=said.append))
    assert (best.status, best.values["module.optimizer.lr"]) == ("finished", 0.01)
    assert pruned.status == "pruned"
    assert Run(pruned.runs[0]).manifest["pruned"] < 2
    written(
        "  sampler: grid\n  space: {data.batch_size: [64, 65], module.network.dropout: [0.1, 0.2]}\n", name="f.yaml"
    )
    failing = prepare("f.yaml", ["trainer.gradient_clip_val=0.5", "module.optimizer.lr=1e30", "callbacks.nan_guard={}"])
    found = rows(carry_out(failing, tell=said.append))
    assert {row.status for row in found} == {"failed"}
    assert all(row.error for row in found)
    assert important(failing.sweep, {}) is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "  space: {module.optimizer.lrr: [1, 2]}\n",
            "r.yaml:9:11: sweep.space.module.optimizer.lrr: adamw has no argument 'lrr'",
        ),
        ("  space: {module.optimizer.lr: [0.1, -1]}\n", "(with -1)"),
        ("  space: {stages.x.module.optimizer.lr: [0.1, 1]}\n", "this recipe has no stages"),
        ("  sampler: {name: tpe, startup: 3}\n" + SPACE, "sweep.sampler: no argument 'startup'"),
        ("  pruner: {name: median, n_startup_trials: -1}\n" + SPACE, "sweep.pruner: "),
        ("  pruner: median\n" + SPACE, "a pruner watches trainings on one process, and main is one on 2"),
    ],
)
def test_what_cannot_be_looked_for_is_an_error_before_anything_is_trained(more: str, said: str) -> None:
    two = ["trainer.devices=2", "trainer.accelerator=cpu"] if "on 2" in said else []
    with pytest.raises(RecipeError) as raised:
        prepare(written(more), two)
    assert said in str(raised.value)
    assert not Path("runs").exists()


def test_a_storage_that_cannot_be_reached_is_named_without_its_password() -> None:
    with pytest.raises(UserError, match=r"the storage sqlite:////nowhere/at/all\.db cannot be reached: "):
        Sweeping(prepare(written(), storage="sqlite:////nowhere/at/all.db"))
    with pytest.raises(UserError, match=r"the storage postgresql://me:…@host/db cannot be reached") as raised:
        Sweeping(prepare("r.yaml", storage="postgresql://me:secret@host/db"))
    assert "secret" not in str(raised.value).partition("cannot be reached")[0]


def test_a_figure_that_no_run_has_and_a_recipe_without_a_sweep_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    written(trials=1)
    with pytest.raises(UserError, match=r"val/acc was not measured; there are .*val/accuracy"):
        carry_out(prepare("r.yaml", ["sweep.maximize=val/acc"]), tell=lambda _: None)
    assert main(["sweep", "supervised"]) == 2
    assert "supervised has no `sweep:`" in capsys.readouterr().err


def test_choices_are_short_in_pictures() -> None:
    values: list[Any] = [{"name": "mlp", "hidden": [8]}, {"name": "relu"}, 0.123456, "a" * 60]
    assert [label(value) for value in values[:3]] == ["mlp(hidden=[8])", "relu", "0.1235"]
    assert len(label(values[3])) <= 25
