"""A run that was left goes on as if nothing had happened; a stage that was trained is not trained again."""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from lab import RecipeError, Run, fit, registry, stages
from lab.api import load_recipe
from lab.cli import main
from lab.errors import UserError
from lab.run import folders
from lab.stages import StageFailed
from lab.verification import differences

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import kills

OWN = {"optimizer": {"name": "adam", "lr": 0.01}}
RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "batch_size": 64},
    "trainer": {"max_epochs": 2, "limit_train_batches": 6},
    "callbacks": {"progress": None, "profile": None, "checkpoints": {"every_seconds": 0}, "steps": {}},
    "stages": {
        "teacher": {"module": {"name": "supervised", "network": {"name": "convnet", "width": 4}, **OWN}},
        "student": {
            "data": {"labels": 200},
            "module": {
                "name": "distill", "network": {"name": "mlp", "hidden": [8], "dropout": 0.5},
                "teacher": {"from": "teacher"}, **OWN,
            },
        },
    },
}  # fmt: skip


class Steps(Callback):
    """Counts the batches that are trained on, and breaks off where it is told to."""

    watches_only = True
    trained = 0
    breaks_at = 0

    def on_train_batch_start(self, *_: Any) -> None:
        Steps.trained += 1
        if Steps.trained == Steps.breaks_at:
            raise RuntimeError("broken off")


@pytest.fixture(autouse=True)
def counting() -> None:
    registry.callbacks.register("steps")(Steps)
    Steps.trained = Steps.breaks_at = 0


def broken_off(recipe: dict[str, Any], after: int) -> Run:
    Steps.breaks_at = Steps.trained + after + 1
    with pytest.raises(StageFailed, match="broken off") as failure:
        fit(recipe)
    Steps.breaks_at = 0
    return failure.value.run


def same(one: Run, other: Run, stage: str) -> bool:
    """Network, metrics, every row, every tensor of the last states."""
    networks = [load_file(run.stage(stage) / "network.safetensors") for run in (one, other)]
    rows = [list(csv.DictReader((run.stage(stage) / "metrics.csv").read_text().splitlines())) for run in (one, other)]
    states = [torch.load(run.stage(stage) / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    metrics = [run.results["stages"][stage]["metrics"] for run in (one, other)]
    return not any(differences(*pair) for pair in (networks, rows, states, metrics))


@pytest.mark.parametrize("after", [0, 1, 5, 6, 11, 12, 15, 18])
def test_a_run_that_broke_off_goes_on_as_if_nothing_had_happened(after: int) -> None:
    whole = fit(RECIPE, out="whole")
    run = broken_off(RECIPE, after)
    Steps.trained = 0
    assert main(["resume", str(run.folder)]) == 0
    assert Steps.trained == 24 - after
    assert run.status == "finished"
    assert all(same(whole, run, stage) for stage in ("teacher", "student"))


@pytest.mark.parametrize("phase", kills.PHASES)
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(phase: str, tmp_path: Path) -> None:
    plan, totals = load_recipe({**RECIPE, "callbacks": {**RECIPE["callbacks"], "steps": None}}), kills.Counts()

    def undisturbed() -> None:
        kills.watch(totals)
        stages.fit(plan, out=tmp_path / "whole")

    assert kills.forked(undisturbed) == 0
    fine, _ = kills.trial(plan, kills.the_run(tmp_path / "whole"), totals, phase, random.Random(len(phase)))
    assert fine


def test_a_run_that_has_ended_is_not_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(RECIPE, smoke=True)
    assert main(["resume", str(run.folder)]) == 2
    assert "has ended (finished): there is nothing to resume" in capsys.readouterr().err


def test_a_run_that_another_process_writes_is_left_to_it() -> None:
    run = broken_off(RECIPE, 3)
    with run.lock():
        assert run.busy
        with pytest.raises(UserError, match="is being written by another process"):
            stages.resume(Run(run.folder))
    assert not run.busy


def test_a_state_that_is_damaged_is_said_and_the_stage_can_be_trained_from_its_beginning() -> None:
    run = broken_off(RECIPE, 3)
    state = run.stage("teacher") / "checkpoints" / "last.ckpt"
    state.write_bytes(state.read_bytes()[:2000])
    with pytest.raises(StageFailed, match=r"last\.ckpt is damaged: remove it to train the stage from its beginning"):
        stages.resume(run)
    state.unlink()
    stages.resume(run)
    assert all(same(fit(RECIPE, out="whole"), run, stage) for stage in ("teacher", "student"))


def arrays(change: float = 0.0) -> str:
    inputs = numpy.random.default_rng(0).random((200, 1, 8, 8), dtype=numpy.float32) + change
    numpy.savez("some.npz", inputs=inputs, targets=numpy.arange(200) % 4)
    return str(Path("some.npz").resolve())


def test_data_that_changed_are_refused() -> None:
    run = broken_off({**RECIPE, "data": {"name": "arrays", "path": arrays(), "batch_size": 16}}, 3)
    arrays(change=1.0)
    with pytest.raises(StageFailed, match="the data have changed since this run began"):
        stages.resume(run)


def test_other_versions_are_told() -> None:
    run = broken_off(RECIPE, 3)
    run.note(versions={**run.manifest["versions"], "torch": "1.0"})
    with pytest.warns(UserWarning, match=r"may go on otherwise than it would have: torch was 1\.0 and is"):
        stages.resume(run)


def test_a_run_is_trained_longer_as_if_it_had_been_from_the_beginning() -> None:
    first = fit(RECIPE)
    before = (first.stage("student") / "checkpoints" / "last.ckpt").read_bytes()
    Steps.trained = 0
    assert main(["fit", str(first.folder), "stages.student.trainer.max_epochs=4"]) == 0
    longer = max((Run(folder) for folder in folders()), key=lambda run: run.id)
    assert Steps.trained == 12
    assert longer.manifest["continues"] == first.id
    assert longer.results["stages"]["teacher"]["cached"] == f"{first.id}/teacher"
    straight = load_recipe(RECIPE, ["stages.student.trainer.max_epochs=4"])
    assert same(fit(straight, out="straight"), longer, "student")
    assert (first.stage("student") / "checkpoints" / "last.ckpt").read_bytes() == before


def test_what_starts_from_a_network_that_is_trained_longer_is_trained_anew() -> None:
    first = fit(RECIPE)
    Steps.trained = 0
    longer = stages.extend(first, ["stages.teacher.trainer.max_epochs=3"])
    assert Steps.trained == 6 + 12
    straight = fit(load_recipe(RECIPE, ["stages.teacher.trainer.max_epochs=3"]), out="straight")
    assert all(same(straight, longer, stage) for stage in ("teacher", "student"))


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_a_schedule_over_the_whole_training_goes_on_over_the_longer_whole(name: str) -> None:
    schedule = {"name": name, **({"max_lr": 0.01} if name == "one_cycle" else {})}
    module = {**RECIPE["stages"]["teacher"]["module"], "scheduler": schedule}
    first = fit({**RECIPE, "stages": {"only": {"module": module}}})
    longer = stages.extend(first, ["trainer.max_epochs=4"])
    (schedule,) = torch.load(longer.stage("only") / "checkpoints" / "last.ckpt", weights_only=True)["lr_schedulers"]
    assert (schedule["total_steps"], schedule["last_epoch"]) == (24, 24)


@pytest.mark.parametrize("wrong", [[], ["data.batch_size=3"], ["trainer.max_epochs=3", "seed=1"]])
def test_only_the_trainer_of_a_finished_run_can_change(wrong: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"a run can be trained longer, as by trainer\.max_epochs=30"):
        stages.extend(fit(RECIPE, smoke=True), wrong)


def test_a_stage_that_an_earlier_run_has_finished_just_so_is_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    first = fit(RECIPE)
    Steps.trained = 0
    Path("changed.yaml").write_text(f"extends: {first.recipe}\nstages: {{student: {{module: {{temperature: 2}}}}}}\n")
    assert main(["fit", "changed.yaml"]) == 0
    assert Steps.trained == 12
    out = capsys.readouterr().out
    second = Run(Path(out.splitlines()[-1]))
    assert "cached" in out
    assert second.results["stages"]["teacher"]["cached"] == f"{first.id}/teacher"
    assert same(first, second, "teacher")
    assert not same(first, second, "student")


def test_a_stage_is_trained_where_that_is_asked_for() -> None:
    fit(RECIPE)
    Steps.trained = 0
    fit(RECIPE, fresh=True)
    assert Steps.trained == 24


def test_a_stage_whose_data_changed_is_trained() -> None:
    recipe = copy.deepcopy({**RECIPE, "data": {"name": "arrays", "path": arrays(), "batch_size": 16}})
    recipe["stages"]["student"]["data"]["labels"] = 100
    fit(recipe)
    arrays(change=1.0)
    Steps.trained = 0
    fit(recipe)
    assert Steps.trained == 24


def test_a_gate_is_judged_anew_where_a_stage_is_taken_over() -> None:
    fit(RECIPE)
    Steps.trained = 0
    run = fit({**RECIPE, "require": {"teacher.test/accuracy": ">= 0.9999"}})
    assert Steps.trained == 0
    assert run.results["stages"]["teacher"]["status"] == "gated"
    assert run.results["stages"]["student"]["status"] == "skipped"


def test_two_fits_started_at_the_same_moment_are_two_whole_folders() -> None:
    code = "import sys, lab, json; print(lab.fit(json.loads(sys.argv[1]), smoke=True).folder)"
    recipe = json.dumps({**RECIPE, "callbacks": {"progress": None, "profile": None}})
    both = [
        subprocess.Popen([sys.executable, "-c", code, recipe], stdout=subprocess.PIPE, text=True, env={**os.environ})
        for _ in range(2)
    ]
    made = [Path(process.communicate(timeout=200)[0].splitlines()[-1]) for process in both]
    assert made[0] != made[1]
    assert [Run(folder).status for folder in made] == ["finished", "finished"]
    assert all(same(Run(made[0]), Run(made[1]), stage) for stage in ("teacher", "student"))


def test_a_run_in_a_thread_is_trained_without_signals() -> None:
    made: list[Run] = []
    thread = threading.Thread(target=lambda: made.append(fit(RECIPE, smoke=True)))
    thread.start()
    thread.join()
    assert made[0].status == "finished"
