"""Where a run came from, through other runs, and how it is shown."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import fit
from lab.cli import main
from lab.document import dump
from lab.files import write_json, write_text
from lab.lineage import lineage
from lab.run import Run, create, locate

SUPERVISED = {"name": "supervised", "network": {"name": "mlp", "hidden": [8]}}
QUICK = {
    "data": "digits",
    "trainer": {"max_epochs": 1, "limit_train_batches": 2},
    "callbacks": {"progress": None, "profile": None},
}


def made(name: str, stages: dict[str, Any], results: dict[str, Any] | None = None, **manifest: Any) -> Run:
    """A run's folder as ``lab fit`` leaves it; each stage is what its module says."""
    folder = Path("runs") / "r" / f"20260101-000000-{name}"
    folder.mkdir(parents=True)
    run = Run(folder)
    write_text(run.recipe, dump({"data": "digits", "stages": {s: {"module": module} for s, module in stages.items()}}))
    write_json(folder / "manifest.json", {"run": run.id, "recipe": "r", "seed": 0, **manifest})
    known = {stage: {"status": "finished", "metrics": {"test/accuracy": 0.5}} for stage in stages}
    write_json(folder / "results.json", {"status": "finished", "stages": results or known})
    for stage in stages:
        run.stage(stage).mkdir()
    return run


def taken(**sources: str) -> dict[str, Any]:
    return {"name": "distill", "network": "mlp", **{name: {"from": source} for name, source in sources.items()}}


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["show", *arguments]) == 0
    return capsys.readouterr().out


def test_a_network_is_followed_through_runs_to_where_it_began(capsys: pytest.CaptureFixture[str]) -> None:
    first = fit({**QUICK, "module": SUPERVISED})
    middle = {"module": {**SUPERVISED, "network": {"from": f"{first.folder}/main"}}}
    last = {"module": {"name": "distill", "network": "mlp", "teacher": {"from": "teacher"}}}
    run = fit({**QUICK, "stages": {"teacher": middle, "student": last}})
    (teacher,) = lineage(run)["stages"]["student"]["from"]
    (origin,) = teacher["from"]
    assert (teacher["at"], teacher["run"], teacher["stage"]) == ("module.teacher", run.id, "teacher")
    assert (origin["at"], origin["run"], origin["stage"], origin["from"]) == ("module.network", first.id, "main", [])
    assert origin["value"] == first.results["stages"]["main"]["metrics"]["test/accuracy"]
    text = shown(capsys, str(run.folder))
    assert "  module.teacher from teacher: finished, test/accuracy 0." in text
    assert "    module.network from ../20" in text
    assert f"({first.id}/main): finished" in text


def test_a_run_says_what_it_was_made_of_and_how_to_make_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    results = {
        "a": {"status": "finished", "cached": "run/a", "metrics": {"test/accuracy": 0.5}, "checkpoint": "a/best.ckpt"},
        "b": {"status": "gated", "missed": ["bytes is 2, < 1 is required"]},
        "c": {"status": "failed", "error": "first line\nsecond line"},
    }
    run = made(
        "abcdef", dict.fromkeys([*results, "d"], SUPERVISED), results, command=["lab", "fit", "r"], group="group-1",
        imports=["my_package"], plugins={"plug": "1.0"}, versions={"torch": "2.1", "wandb": None}, smoke=True,
        hardware={"cpus": 2, "gpus": ["H200"]}, git={"commit": "abc", "dirty": True}, data={"a": "d" * 64},
        started="2026-01-01T00:00:00+0000",
    )  # fmt: skip
    assert shown(capsys, run.id) == (
        f"run       {run.folder}\nrecipe    r\nstatus    finished, shortened (--smoke)\nstarted   2026-01-01 00:00\n"
        "command   lab fit r\nseed      0\ngroup     group-1\ngit       abc and uncommitted changes\n"
        "versions  torch 2.1\nhardware  cpus 2, gpus H200\nplugins   plug 1.0\nimports   my_package\n\n"
        "a: finished, cached from run/a\n  test/accuracy  0.5000\n  data           dddddddddddd\n"
        "  checkpoint     a/best.ckpt\n\n"
        "b: gated\n  missed  bytes is 2, < 1 is required\n\nc: failed\n  error  first line\n\nd: not run\n\n"
        f"again: lab fit {run.recipe} --import=my_package --smoke\n"
    )


def test_the_command_to_repeat_a_run_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit({**QUICK, "module": SUPERVISED}, smoke=True)
    *_, last = shown(capsys, "latest").splitlines()
    command = last.removeprefix("again: lab ").split()
    assert main(command) == 0
    again = Run(Path(capsys.readouterr().out.splitlines()[-1]))
    assert again.folder != run.folder
    assert again.results["stages"]["main"]["metrics"] == run.results["stages"]["main"]["metrics"]


def test_one_stage_is_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("abcdef", {"a": SUPERVISED, "b": taken(teacher="a")})
    text = shown(capsys, f"{run.id}/b")
    assert "\nb: finished" in text
    assert "\na: finished" not in text
    assert "module.teacher from a: finished" in text


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("abcdef", {"a": SUPERVISED, "b": taken(teacher="a")}, git={"commit": "abc"})
    assert json.loads(shown(capsys, run.id, "--json")) == lineage(Run(run.folder))
    assert json.loads(shown(capsys, "distill", "--json"))["stages"]["student"]["module"]["temperature"] == 4.0


def test_a_missing_parent_is_said() -> None:
    first = made("aaaaaa", {"a": SUPERVISED})
    run = made("bbbbbb", {"b": taken(teacher="../20260101-000000-aaaaaa/a", network="gone/x")})
    shutil.rmtree(first.folder)
    network, teacher = sorted(lineage(run)["stages"]["b"]["from"], key=lambda origin: origin["at"])
    assert network["missing"].startswith("gone/x is no run")
    assert "aaaaaa/a is no run: no such folder" in teacher["missing"]


def test_latest_is_the_run_that_it_was() -> None:
    first = create_from("digits")
    (first.folder / "main").mkdir()
    first.record("finished", {"main": {"status": "finished"}})
    run = create_from({"from": "latest/main"})
    made("zzzzzz", {"main": SUPERVISED}).folder.rename("runs/r/29990101-000000-zzzzzz")
    assert locate("latest/main")[0] != first
    (origin,) = lineage(run)["stages"]["main"]["from"]
    assert (origin["source"], origin["run"]) == ("latest/main", first.id)


def create_from(network: Any) -> Run:
    from lab.api import load_recipe

    network = SUPERVISED["network"] if network == "digits" else network
    return create(load_recipe({"data": "digits", "module": {"name": "supervised", "network": network}}))


def test_runs_that_take_networks_from_each_other_end_somewhere() -> None:
    one = made("aaaaaa", {"a": taken(teacher="../20260101-000000-bbbbbb/b", network="../20260101-000000-bbbbbb/b")})
    made("bbbbbb", {"b": taken(teacher="../20260101-000000-aaaaaa/a")})
    first, second = lineage(one)["stages"]["a"]["from"]
    assert first["from"][0]["again"]
    assert second["again"]
    assert len(json.dumps(lineage(one))) < 5000


@pytest.mark.parametrize("file", ["manifest.json", "results.json"])
def test_a_damaged_run_is_an_error_that_names_the_file(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = made("abcdef", {"a": SUPERVISED})
    (run.folder / file).write_text("{")
    assert main(["show", run.id]) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err


def test_a_damaged_recipe_leaves_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("abcdef", {"a": SUPERVISED})
    run.recipe.write_text("{")
    assert "a: finished" in shown(capsys, run.id)


def test_a_recipe_stays_a_recipe_and_what_is_neither_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("abcdef", {"a": SUPERVISED})
    assert shown(capsys, f"{run.folder}/recipe.yaml").startswith("seed: 0\n")
    assert main(["show", "distil"]) == 2
    error = capsys.readouterr().err
    assert "distil is no run" in error
    assert "no bundled recipe of that name (did you mean 'distill' or 'distill_qat' or 'distill_ddp'?)" in error
    assert main(["show", run.id, "seed=1"]) == 2
    assert f"it takes no overrides: lab show {run.recipe} seed=1" in capsys.readouterr().err


def test_names_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("abcdef", {"a": SUPERVISED}, {"a": {"status": "\x1b[31mred", "error": "[bold]x"}}, command=["\x1b]0;x"])
    text = shown(capsys, run.id)
    assert "\\x1b[31mred" in text
    assert "[bold]x" in text
    assert "\x1b" not in text


def test_showing_a_run_imports_no_torch() -> None:
    run = made("abcdef", {"a": SUPERVISED, "b": taken(teacher="a")})
    code = f"import sys, lab.cli; lab.cli.main(['show', '{run.id}']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
