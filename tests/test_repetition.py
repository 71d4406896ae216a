"""One recipe with several seeds and folds: ordinary runs in a group, whatever becomes of each of them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lab import Run, jobs, registry, repeat, stages
from lab.cli import main
from lab.errors import UserError
from lab.repetition import variants
from lab.run import folders, locate

NETWORK = {"name": "mlp", "hidden": [8]}
RECIPE: dict[str, Any] = {
    "seed": 3,
    "data": {"name": "digits"},
    "trainer": {"max_epochs": 1, "limit_train_batches": 3},
    "callbacks": {"progress": None, "profile": None},
    "module": {"name": "supervised", "network": NETWORK},
}


def written(**changes: Any) -> str:
    Path("quick.yaml").write_text(json.dumps({**RECIPE, **changes}))
    return "quick.yaml"


def runs() -> list[Run]:
    return [Run(path) for path in sorted(folders(), key=lambda folder: folder.name)]


def test_seeds_are_ordinary_runs_in_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", written(), "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert sorted(run.manifest["seed"] for run in runs()) == [3, 4]
    (group,) = {run.manifest["group"] for run in runs()}
    assert out.splitlines()[-1] == group
    assert "±" in out
    assert main(["compare", group, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["seeds"] == [3, 4]


def test_a_run_of_several_is_the_run_of_its_seed_alone() -> None:
    several = repeat(RECIPE, seeds=2)
    (alone,) = repeat({**RECIPE, "seed": 4}, seeds=1, fresh=True)
    assert several[1].results["stages"] == {
        "main": {**alone.results["stages"]["main"], "train_seconds": pytest.approx(0, abs=60)}
    }


def test_stages_with_seeds_of_their_own_keep_them_apart() -> None:
    module = RECIPE["module"]
    plans = variants(
        {**RECIPE, "module": None, "stages": {"a": {"module": module, "seed": 10}, "b": {"module": module}}}, seeds=2
    )
    assert [[stage.seed for stage in variant.plan.stages.values()] for variant in plans] == [[10, 3], [11, 4]]


def test_each_fold_is_tested_on_its_own_part() -> None:
    found = repeat(RECIPE, folds=3)
    assert sum(run.results["stages"]["main"]["n_test"] for run in found) == 1797
    assert len({run.manifest["data"]["main"] for run in found}) == 3


def test_seeds_and_folds_together_are_every_pair() -> None:
    labels = [variant.label for variant in variants(RECIPE, seeds=2, folds=2)]
    assert labels == ["seed 3, fold 0", "seed 3, fold 1", "seed 4, fold 0", "seed 4, fold 1"]


def test_a_failed_run_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    class Fails(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if "seed: 4" in (Path(trainer.default_root_dir).parent / "recipe.yaml").read_text():
                raise RuntimeError("out of luck")

    registry.callbacks.register("fails")(Fails)
    recipe = written(callbacks={**RECIPE["callbacks"], "fails": {}})
    assert main(["fit", recipe, "--seeds", "3"]) == 1
    said = capsys.readouterr()
    assert [run.status for run in runs()].count("finished") == 2
    assert "seed 4 failed: stage main: RuntimeError: out of luck" in said.err
    assert "1 of 3 runs failed" in said.err
    assert "not finished in 1 of 3 runs" in said.out


def test_runs_at_once_are_those_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", written(), "--seeds", "3", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    found = runs()
    assert len({run.manifest["group"] for run in found}) == 1
    assert {run.status for run in found} == {"finished"}
    by_seed = {run.manifest["seed"]: run for run in found}
    assert [Path(line).name for line in out.splitlines()[-4:-1]] == [by_seed[seed].id for seed in (3, 4, 5)]
    alone = repeat(RECIPE, seeds=3, fresh=True)
    for run in alone:
        other = by_seed[run.manifest["seed"]]
        assert run.results["stages"]["main"]["metrics"] == other.results["stages"]["main"]["metrics"]


def test_a_process_of_several_takes_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    parts = [jobs._share(number, 3) for number in range(3)]
    assert [part["OMP_NUM_THREADS"] for part in parts] == ["2", "2", "2"]
    assert [part["CUDA_VISIBLE_DEVICES"] for part in parts] == ["2", "5", "2"]
    assert jobs._share(0, 1).keys() == {"PYTHONPATH"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "OMP_NUM_THREADS" not in jobs._share(0, 3)


def test_a_run_that_fails_in_a_process_of_its_own_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unlucky.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Fails(Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        if 'seed: 4' in open(trainer.default_root_dir + '/../recipe.yaml').read():\n"
        "            raise RuntimeError('out of luck')\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = written(callbacks={**RECIPE["callbacks"], "fails": {"name": "unlucky.Fails"}})
    assert main(["fit", recipe, "--import", "unlucky", "--seeds", "3", "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert sorted(run.status for run in runs()) == ["failed", "finished", "finished"]
    assert "seed 4 failed: " in said.err
    assert "stage main: RuntimeError: out of luck" in said.err
    assert "1 of 3 runs failed" in said.err


def test_runs_at_once_that_are_asked_to_stop_save_their_step(own_folder: Path) -> None:
    recipe = written(trainer={"max_epochs": 2000})
    fitting = subprocess.Popen(
        [sys.executable, "-m", "lab", "fit", recipe, "--seeds", "2", "--jobs", "2"], text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while len(list(own_folder.glob("runs/quick/*/main/checkpoints/last.ckpt"))) < 2:
        assert fitting.poll() is None, fitting.communicate()[0]
        time.sleep(0.05)
    fitting.terminate()
    said, _ = fitting.communicate(timeout=120)
    assert fitting.returncode == 143, said
    assert {run.status for run in runs()} == {"stopped"}


def test_runs_that_miss_a_gate_are_told_by_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", written(require={"test/accuracy": ">= 0.999"}), "--seeds", "2"]) == 3
    assert capsys.readouterr().err.count("required, and not met") == 2


def test_an_interrupt_stops_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = stages.fit

    def fit(plan: Any, **options: Any) -> Run:
        if plan.stages["main"].seed == 4:
            raise stages.Interrupted
        return real(plan, **options)

    monkeypatch.setattr(stages, "fit", fit)
    assert main(["fit", written(), "--seeds", "3"]) == 130
    assert len(runs()) == 1
    assert f"1 of 3 runs had ended: lab compare {runs()[0].manifest['group']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "seeds must be 1 at least, got 0"),
        (["--folds", "1"], "folds must be 2 at least, got 1"),
        (
            ["--seeds", "2", "seed=4294967295"],
            "a seed is 4294967295 at most; the last of these runs would have 4294967296",
        ),
        (["--folds", "3", "data={name: digitss}"], "no datamodule named 'digitss'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", written(), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert runs() == []


def test_a_group_elsewhere_is_found_by_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", written(), "--seeds", "2", "--smoke", "--out", "there"]) == 0
    reference = capsys.readouterr().out.splitlines()[-1]
    assert main(["compare", reference]) == 0
    assert reference.startswith("there/quick/group-")


def test_runs_of_several_are_found_as_any_run() -> None:
    (run,) = repeat(RECIPE, seeds=1, smoke=True)
    assert locate(run.id) == (run, None)
    with pytest.raises(UserError, match="seeds must be 1"):
        repeat(RECIPE, seeds=0)
