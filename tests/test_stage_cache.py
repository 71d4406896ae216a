"""Finished stages found again, and taken over: whole or not at all."""

import os
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from lab import Run, cache, fingerprint, fit
from lab.api import load_recipe
from lab.assemble import build, open_stage
from lab.report import scoreboard

KEY, OTHER = "0" * 64, "1" * 64
RECIPE = {
    "data": "digits",
    "module": {"name": "supervised", "network": {"name": "mlp", "hidden": [8]}},
    "trainer": {"max_epochs": 1, "limit_train_batches": 2},
    "callbacks": {"progress": None, "profile": None},
}
OUT = Path("runs")


def finished(key: str = KEY) -> Run:
    """A run whose stage has a fingerprint with a key of the test's, and no other."""
    run = fit(RECIPE, fresh=True)
    for entry in (OUT / ".stages").glob("*.json"):
        if entry.stem not in (KEY, OTHER):
            entry.unlink()
    run.record("finished", {"main": {**run.results["stages"]["main"], "fingerprint": {"smoke": "false", "key": key}}})
    return run


def remembered() -> Run:
    run = finished()
    cache.remember(OUT, KEY, run.stage("main"))
    return run


def said(run: Run, **changes: Any) -> None:
    run.record("finished", {"main": {**run.results["stages"]["main"], **changes}})


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_stage_is_found_by_its_key_and_by_no_other() -> None:
    run = remembered()
    assert cache.find(OUT, KEY) == run.stage("main")
    assert cache.find(OUT, OTHER) is None


def test_a_stage_is_found_by_what_decided_it_and_is_what_training_gives() -> None:
    def key(*overrides: str) -> str:
        stage = load_recipe(RECIPE, overrides).stages["main"]
        parts = fingerprint.fingerprint(stage, build(stage), {}, smoke=False)
        assert parts is not None
        return fingerprint.key(parts)

    run = finished(key())
    cache.remember(OUT, key(), run.stage("main"))
    assert cache.find(OUT, key("seed=1")) is None
    found = cache.find(OUT, key("logger=csv"))
    assert found == run.stage("main")
    cache.link(found, target := OUT / "reused")
    one, other = (
        load_file(folder / "network.safetensors") for folder in (target, fit(RECIPE, fresh=True).stage("main"))
    )
    assert all((one[name] == other[name]).all() for name in one)


def test_a_moved_folder_of_runs_still_knows_its_stages(own_folder: Path) -> None:
    run = remembered()
    (own_folder / "runs").rename(own_folder / "elsewhere")
    found = cache.find(Path("elsewhere"), KEY)
    assert found == Path("elsewhere") / run.stage("main").relative_to(OUT)


def test_a_stage_with_a_metric_that_is_no_number_is_found_too() -> None:
    said(remembered(), metrics={"test/loss": float("nan")})
    assert cache.find(OUT, KEY) is not None


def test_a_stage_that_missed_a_gate_is_found_too() -> None:
    said(remembered(), status="gated")
    assert cache.find(OUT, KEY) is not None


def test_of_several_the_latest_is_found() -> None:
    remembered()
    assert cache.find(OUT, KEY) != (later := remembered()).folder
    assert cache.find(OUT, KEY) == later.stage("main")


DAMAGE: dict[str, Callable[[Run], object]] = {
    "the run is gone": lambda run: shutil.rmtree(run.folder),
    "the stage is gone": lambda run: shutil.rmtree(run.stage("main")),
    "its results are damaged": lambda run: (run.folder / "results.json").write_text("{"),
    "its own results are damaged": lambda run: (run.stage("main") / "results.json").write_text("[]"),
    "its manifest is damaged": lambda run: (run.folder / "manifest.json").write_text("{"),
    "it failed": lambda run: said(run, status="failed"),
    "it has another key": lambda run: said(run, fingerprint={"key": OTHER}),
    "it has no key": lambda run: said(run, fingerprint=None),
    "its network is gone": lambda run: (run.stage("main") / "network.json").unlink(),
    "its weights are cut off": lambda run: os.truncate(run.stage("main") / "network.safetensors", 100),
    "its checkpoint is gone": lambda run: (run.folder / run.results["stages"]["main"]["checkpoint"]).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_stage_that_is_not_whole_is_not_found_and_forgotten(damage: str) -> None:
    run = remembered()
    DAMAGE[damage](run)
    assert cache.find(OUT, KEY) is None
    assert not list((OUT / ".stages").iterdir())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"stage": 3}', '{"stage": "/etc"}', '{"stage": "../away/main"}'])
def test_a_damaged_entry_is_forgotten_and_leads_nowhere(content: str) -> None:
    run = remembered()
    shutil.copytree(run.folder, "away")
    (OUT / ".stages" / f"{KEY}.json").write_text(content)
    assert cache.find(OUT, KEY) is None
    assert not list((OUT / ".stages").iterdir())


def test_a_key_is_no_path() -> None:
    with pytest.raises(ValueError, match=r"a key is a SHA-256 in hexadecimal, got '\.\./x'"):
        cache.find(OUT, "../x")


def test_what_cannot_be_noted_is_a_warning_and_no_lost_run() -> None:
    run = finished()
    shutil.rmtree(OUT / ".stages", ignore_errors=True)
    (OUT / ".stages").write_text("in the way")
    with pytest.warns(UserWarning, match="will not be found again"):
        cache.remember(OUT, KEY, run.stage("main"))


def test_a_linked_stage_is_the_same_and_takes_no_room() -> None:
    run, target = finished(), OUT / "recipe" / "other" / "again"
    target.mkdir(parents=True)
    cache.link(run.stage("main"), target)
    assert files(target) == files(run.stage("main"))
    assert (target / "network.safetensors").samefile(run.stage("main") / "network.safetensors")
    for name in ("metrics.csv", "results.json"):
        assert not (target / name).samefile(run.stage("main") / name)


def test_a_linked_stage_is_a_stage_like_any_other() -> None:
    run, other = finished(), finished()
    shutil.rmtree(other.stage("main"))
    cache.link(run.stage("main"), other.stage("main"))
    shutil.rmtree(run.folder)
    built, trainer = open_stage(other, "main")
    metrics = trainer.test(built.module, datamodule=built.data, verbose=False)[0]
    assert metrics["test/accuracy"] == pytest.approx(other.results["stages"]["main"]["metrics"]["test/accuracy"])


def test_writing_to_one_stage_leaves_the_other_as_it_was() -> None:
    run = finished()
    before = files(run.stage("main"))
    cache.link(run.stage("main"), target := run.folder / "copy")
    with (target / "metrics.csv").open("a") as metrics:
        metrics.write("1,2,3\n")
    (target / "network.json").unlink()
    Run(run.folder).record("finished", {"copy": {"status": "finished"}})
    assert files(run.stage("main")) == before


def test_where_files_cannot_be_linked_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError

    run = finished()
    monkeypatch.setattr(os, "link", refused)
    cache.link(run.stage("main"), target := run.folder / "copy")
    assert files(target) == files(run.stage("main"))
    assert not (target / "network.safetensors").samefile(run.stage("main") / "network.safetensors")


def test_only_the_stages_result_is_linked_and_no_link_leads_out(own_folder: Path) -> None:
    run = finished()
    stage = run.stage("main")
    expected = {*files(stage), "checkpoints/link.ckpt"}
    (own_folder / "secret").mkdir()
    (own_folder / "secret" / "key").write_text("secret")
    (stage / "out").symlink_to(own_folder / "secret")
    (stage / "out.txt").symlink_to(own_folder / "secret" / "key")
    (stage / "nowhere").symlink_to("nothing")
    (stage / "checkpoints" / "link.ckpt").symlink_to("last.ckpt")
    (stage / "wandb" / "run").mkdir(parents=True)
    for name in ("wandb/run/log", ".network.json.1.tmp", "error.txt"):
        (stage / name).write_text("x")
    cache.link(stage, target := run.folder / "copy")
    assert set(files(target)) == expected
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_a_copy_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    run = finished()
    (target := run.folder / "copy").mkdir()
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left"):
        cache.link(run.stage("main"), target)
    assert not list(target.iterdir())
    assert {path.name for path in run.folder.iterdir() if path.is_dir()} == {"main", "copy"}


def test_nothing_is_linked_over_what_is_there() -> None:
    run = finished()
    (target := run.folder / "copy").mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        cache.link(run.stage("main"), target)
    assert files(target) == {"mine": b"mine"}


def test_tidied_keys_lead_to_a_copy_where_there_is_one() -> None:
    run, copy = remembered(), finished()
    shutil.rmtree(run.folder)
    cache.remember(OUT, OTHER, copy.stage("main"))
    cache.tidy(OUT)
    assert cache.find(OUT, KEY) == copy.stage("main")
    assert [path.stem for path in (OUT / ".stages").iterdir()] == [KEY]


def test_a_reused_stage_says_so_in_the_scoreboard_and_not_in_red() -> None:
    stage = {"status": "finished", "metrics": {"test/accuracy": 0.5}, "cached": "20260101-000000-abcdef/main"}
    console = Console(width=80, file=StringIO(), force_terminal=True)
    console.print(scoreboard({"stages": {"main": stage, "other": {**stage, "cached": None}}}))
    text = console.file.getvalue()
    assert text.count("cached") == 1
    assert "\x1b[31m" not in text
