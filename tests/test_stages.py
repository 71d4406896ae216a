"""A whole recipe, from its text to a run's folder: order, wiring, seeds, artifacts, results, other data."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import lab
from lab import RecipeError, Run
from lab.api import load_recipe
from lab.artifact import ArtifactError
from lab.assemble import build, open_stage
from lab.cli import main
from lab.stages import StageFailed

fit = partial(lab.fit, fresh=True)  # what is compared is trained, not taken over
OWN = {"optimizer": {"name": "adam", "lr": 0.01}}
TEACHER = {"module": {"name": "supervised", "network": {"name": "convnet", "width": 4}, **OWN}}
STUDENT = {
    "module": {"name": "distill", "network": {"name": "mlp", "hidden": [8]}, "teacher": {"from": "teacher"}, **OWN}
}
CONTROL = {"module": {"name": "supervised", "network": {"name": "mlp", "hidden": [8]}, **OWN}}


def recipe(**stages: Any) -> dict[str, Any]:
    quick = {"max_epochs": 2, "limit_train_batches": 6}
    return {
        "data": {"name": "digits"},
        "trainer": quick,
        "callbacks": {"progress": None, "profile": None},
        "stages": stages,
    }


def weights(run: Run, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run.stage(stage) / "network.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_order_of_stages_in_the_file_changes_nothing() -> None:
    there = fit(recipe(teacher=TEACHER, student=STUDENT, control=CONTROL))
    back = fit(recipe(control=CONTROL, student=STUDENT, teacher=TEACHER))
    for stage in ("teacher", "student", "control"):
        assert same(weights(there, stage), weights(back, stage))
        one, other = (run.results["stages"][stage]["metrics"] for run in (there, back))
        assert one == other


def test_a_stages_result_does_not_depend_on_other_stages() -> None:
    alone = fit(recipe(control=CONTROL))
    among = fit(recipe(teacher=TEACHER, student=STUDENT, control=CONTROL))
    assert same(weights(alone, "control"), weights(among, "control"))


def test_a_control_starts_from_the_weights_and_sees_the_batches_of_what_it_controls() -> None:
    first = fit(recipe(teacher=TEACHER))
    plan = load_recipe(recipe(teacher=TEACHER, student=STUDENT, control=CONTROL))
    student, control = build(plan.stages["student"], first), build(plan.stages["control"], first)
    assert same(student.network.state_dict(), control.network.state_dict())
    pairs = zip(student.data.train_dataloader(), control.data.train_dataloader(), strict=True)
    assert all(torch.equal(one.index, other.index) for one, other in pairs)


def test_two_fits_of_one_recipe_are_the_same_bit_for_bit() -> None:
    one, other = (fit(recipe(teacher=TEACHER, student=STUDENT)) for _ in range(2))
    assert one.folder != other.folder
    assert same(weights(one, "student"), weights(other, "student"))


def test_another_seed_gives_other_weights() -> None:
    one, other = (fit({**recipe(control=CONTROL), "seed": seed}) for seed in (0, 1))
    assert not same(weights(one, "control"), weights(other, "control"))


def test_a_runs_own_recipe_reproduces_it_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(recipe(teacher=TEACHER, student=STUDENT), out="elsewhere")
    folder = first.folder.resolve()
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    again = fit(folder / "recipe.yaml")
    assert again.folder.parent.name == first.folder.parent.name
    assert same(load_file(folder / "student" / "network.safetensors"), weights(again, "student"))


def test_a_network_of_another_run_is_taken_by_path_and_by_id() -> None:
    first = fit(recipe(teacher=TEACHER))
    for source in (f"{first.folder}/teacher", f"{first.id}/teacher"):
        going_on = {"module": {"name": "supervised", "network": {"from": source}, **OWN}}
        second = fit(
            {**recipe(more=going_on), "trainer": {"max_epochs": 1, "limit_train_batches": 0, "limit_val_batches": 0}}
        )
        assert same(weights(first, "teacher"), weights(second, "more"))
        assert second.manifest["parents"] == [source]


def test_a_copied_run_reads_its_parents_relative_to_itself() -> None:
    first = fit(recipe(teacher=TEACHER))
    going_on = {"module": {"name": "supervised", "network": {"from": f"{first.folder.resolve()}/teacher"}, **OWN}}
    second = fit(recipe(more=going_on))
    assert str(first.folder.resolve()) not in second.recipe.read_text()
    fit(second.recipe)


def test_a_network_goes_on_from_its_last_weights_where_that_is_asked() -> None:
    first = fit(recipe(teacher=TEACHER))
    frozen = {"max_epochs": 1, "limit_train_batches": 0, "limit_val_batches": 0}
    going_on = {
        "module": {"name": "supervised", "network": {"from": "teacher", "checkpoint": "last"}, **OWN},
        "trainer": frozen,
    }
    run = fit(recipe(teacher=TEACHER, more=going_on))
    saved = torch.load(run.stage("teacher") / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert same({key.removeprefix("network."): value for key, value in saved.items()}, weights(run, "more"))
    assert same(weights(first, "teacher"), weights(run, "teacher"))


def test_a_head_is_reset_to_the_datas_classes(tmp_path: Path) -> None:
    import numpy

    inputs = numpy.random.default_rng(0).random((60, 1, 8, 8), dtype=numpy.float32)
    numpy.savez(tmp_path / "three.npz", inputs=inputs, targets=numpy.arange(60) % 3)
    few = {
        "data": {"name": "arrays", "path": str(tmp_path / "three.npz")},
        "module": {"name": "supervised", "network": {"from": "teacher", "head": "reset"}, **OWN},
    }
    run = fit(recipe(teacher=TEACHER, few=few))
    assert weights(run, "few")["head.weight"].shape == (3, 8)
    assert json.loads((run.stage("few") / "network.json").read_text())["component"]["num_classes"] == 3


def test_a_run_holds_what_its_contract_says() -> None:
    run = fit({**recipe(teacher=TEACHER, student=STUDENT), "callbacks": {"progress": None}})
    files = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    expected = {
        "metrics.csv",
        "network.json",
        "network.safetensors",
        "results.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }
    assert {"recipe.yaml", "manifest.json", "results.json"} <= files
    assert {f"{stage}/{name}" for stage in ("teacher", "student") for name in expected} <= files
    student = run.results["stages"]["student"]
    assert run.status == "finished"
    assert student["parent"] == "teacher"
    assert student["n_test"] == 359
    assert student["parameters"] == 8 * 65 + 10 * 9
    assert student["macs"] == 8 * 64 + 10 * 8
    assert student["bytes"] == (run.stage("student") / "network.safetensors").stat().st_size
    assert set(student["latency_ms"]) == {"batch_1", "batch_64"}
    assert student["checkpoint"] == "student/checkpoints/best.ckpt"
    assert run.manifest["data"]["teacher"] == run.manifest["data"]["student"]
    assert "Checkpoints" in run.manifest["callbacks"]["student"]
    assert json.loads((run.stage("student") / "results.json").read_text()) == student


def test_the_kept_and_tested_weights_are_the_chosen_ones() -> None:
    worst = {"progress": None, "profile": None, "checkpoints": {"monitor": "val/accuracy", "mode": "min"}}
    run = fit({**recipe(teacher=TEACHER), "callbacks": worst, "trainer": {"max_epochs": 4}})
    best, last = (
        torch.load(run.stage("teacher") / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("best", "last")
    )
    kept = weights(run, "teacher")
    assert same({key.removeprefix("network."): value for key, value in best.items()}, kept)
    assert not same({key.removeprefix("network."): value for key, value in last.items()}, kept)
    rows = list(csv.DictReader((run.stage("teacher") / "metrics.csv").read_text().splitlines()))
    worst_accuracy = min(float(row["val/accuracy"]) for row in rows if row.get("val/accuracy"))
    metrics = run.results["stages"]["teacher"]["metrics"]
    assert metrics["val/accuracy"] == pytest.approx(worst_accuracy)
    built, trainer = open_stage(run, "teacher")
    again = trainer.test(built.module, datamodule=built.data, verbose=False)[0]
    assert metrics["test/accuracy"] == pytest.approx(again["test/accuracy"])


def test_what_only_watches_changes_nothing() -> None:
    dropout = {"module": {"name": "supervised", "network": {"name": "mlp", "hidden": [8], "dropout": 0.5}, **OWN}}
    watched = {"callbacks": {"learning_rate": {"logging_interval": "epoch"}}, "logger": {"name": "csv"}}
    one, other = fit(recipe(control=dropout)), fit(recipe(control={**dropout, **watched}))
    assert same(weights(one, "control"), weights(other, "control"))


def test_a_finished_run_is_tested_again_to_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(recipe(teacher=TEACHER, student=STUDENT))
    assert main(["test", f"{run.folder}/student", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["metrics"]
    expected = run.results["stages"]["student"]["metrics"]
    assert shown == {key: pytest.approx(value) for key, value in expected.items() if key.startswith("test/")}


def test_predictions_of_the_test_split_agree_with_its_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(recipe(teacher=TEACHER))
    assert main(["predict", "latest"]) == 0
    path = capsys.readouterr().out.splitlines()[-1]
    table = pyarrow.parquet.read_table(path).to_pydict()
    right = [a == b for a, b in zip(table["prediction"], table["target"], strict=True)]
    assert sum(right) / len(right) == pytest.approx(run.results["stages"]["teacher"]["metrics"]["test/accuracy"])


def test_new_data_is_predicted_sample_by_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy

    run = fit(recipe(teacher=TEACHER))
    numpy.savez(tmp_path / "new.npz", inputs=numpy.random.default_rng(0).random((17, 1, 8, 8), dtype=numpy.float32))
    assert main(["predict", str(run.folder), "data={name: arrays, path: new.npz}", "--to", "new.parquet"]) == 0
    assert pyarrow.parquet.read_table("new.parquet").num_rows == 17


def test_only_data_and_trainer_of_a_finished_run_can_change(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(recipe(teacher=TEACHER))
    assert main(["test", str(run.folder), "module.network.width=8"]) == 2
    assert "only data and trainer can change" in capsys.readouterr().err


def test_data_that_contradict_the_recipe_are_an_error() -> None:
    wrong = {"module": {"name": "supervised", "network": {"name": "convnet", "num_classes": 7}}}
    with pytest.raises(RecipeError, match=r"num_classes: the recipe says 7, the data has 10"):
        fit(recipe(teacher=wrong))


def test_a_stage_that_raises_ends_the_run_as_failed() -> None:
    with pytest.raises(
        StageFailed, match=r"stage student: the student's outputs are \(64, 4\), the teachers' \(64, 10\)"
    ):
        fit(recipe(teacher=TEACHER, student={**STUDENT, "data": {"name": "arrays", "path": _four_classes()}}))
    run = Run(next(Path("runs").glob("*/*/manifest.json")).parent)
    assert run.status == "failed"
    assert run.results["stages"]["teacher"]["status"] == "finished"
    assert "the student's outputs" in run.results["stages"]["student"]["error"]
    assert "Traceback" in (run.stage("student") / "error.txt").read_text()


def _four_classes() -> str:
    import numpy

    path = Path("four.npz").resolve()
    inputs = numpy.random.default_rng(0).random((400, 1, 8, 8), dtype=numpy.float32)
    numpy.savez(path, inputs=inputs, targets=numpy.arange(400) % 4)
    return str(path)


def test_a_gate_that_is_not_met_stops_what_depends_on_it() -> None:
    gated = {**TEACHER, "require": {"test/accuracy": ">= 0.999", "bytes": "< 1_000_000"}}
    run = fit(recipe(teacher=gated, student=STUDENT, control=CONTROL))
    stages = run.results["stages"]
    assert run.status == "gated"
    assert stages["teacher"]["status"] == "gated"
    assert stages["teacher"]["missed"][0].startswith("test/accuracy is 0.")
    assert len(stages["teacher"]["missed"]) == 1
    assert stages["student"]["status"] == "skipped"
    assert stages["control"]["status"] == "finished"


def test_an_unfinished_stage_gives_no_network() -> None:
    run = fit(recipe(teacher=TEACHER))
    (run.stage("teacher") / "network.json").unlink()
    going_on = {"module": {"name": "supervised", "network": {"from": f"{run.folder}/teacher"}}}
    with pytest.raises(StageFailed, match=r"has no network\.json"):
        fit(recipe(more=going_on))


def test_weights_of_another_network_are_refused_with_the_first_that_differ() -> None:
    run = fit(recipe(teacher=TEACHER, control=CONTROL))
    (run.stage("control") / "network.safetensors").replace(run.stage("teacher") / "network.safetensors")
    with pytest.raises(ArtifactError, match=r"another network: body\.0\.0\.weight: missing"):
        open_stage(run, "teacher")


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")))
def test_every_bundled_recipe_runs_shortened(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", name, "--smoke"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert Run(folder).status == "finished"
