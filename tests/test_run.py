"""Run folders: made once, found by path, id or `latest`, never mistaken."""

import json
from pathlib import Path

import pytest

from lab.api import load_recipe
from lab.errors import UserError
from lab.run import Run, RunNotFound, create, locate

RECIPE = {"data": "digits", "module": {"name": "supervised", "network": "mlp"}}


def made(**options: object) -> Run:
    return create(load_recipe(RECIPE), **options)


def test_two_runs_of_one_moment_have_two_folders() -> None:
    assert len({made().folder for _ in range(20)}) == 20


def test_a_run_is_found_by_path_id_short_id_and_as_latest() -> None:
    run = made()
    for reference in (str(run.folder), run.id, run.id.rpartition("-")[2], "latest"):
        assert locate(reference) == (run, None)


def test_latest_is_the_one_made_last() -> None:
    older = made()
    newer = Run(older.folder.rename(older.folder.with_name("20000101-000000-abcdef")))
    run = made()
    assert locate("latest")[0] == run != newer


def test_a_stage_is_found_after_a_slash() -> None:
    run = made()
    run.stage("main").mkdir()
    assert locate(f"{run.folder}/main") == (run, "main")
    assert locate("latest/main") == (run, "main")


def test_an_unknown_stage_is_an_error_with_the_stages_there_are() -> None:
    run = made()
    run.stage("main").mkdir()
    with pytest.raises(RunNotFound, match=r"no stage 'mian' \(did you mean 'main'\?\)"):
        locate("latest/mian")


def test_a_folder_that_is_no_run_says_what_it_lacks(own_folder: Path) -> None:
    (own_folder / "here").mkdir()
    with pytest.raises(RunNotFound, match=r"here is a folder, but no run \(it has no manifest\.json\)"):
        locate("here")


def test_an_unknown_id_is_no_run() -> None:
    with pytest.raises(RunNotFound, match="nowhere is no run"):
        locate("nowhere")


def test_a_place_that_cannot_be_written_is_named_with_the_remedy(own_folder: Path) -> None:
    (own_folder / "file").write_text("")
    with pytest.raises(UserError, match=r"file/recipe/.* cannot be made: Not a directory; .*--out"):
        made(out=own_folder / "file")


def test_the_manifest_says_what_the_run_was_made_of() -> None:
    manifest = made(command=["lab", "fit", "x"]).manifest
    assert manifest["command"] == ["lab", "fit", "x"]
    assert manifest["versions"]["torch"]
    assert manifest["hardware"]["cpus"] >= 1
    assert manifest["group"] == manifest["run"]


def test_uncommitted_changes_are_kept_with_the_run(own_folder: Path) -> None:
    import subprocess

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)

    git("init")
    (own_folder / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-m", "one")
    (own_folder / "code.py").write_text("a = 2\n")
    run = made()
    assert run.manifest["git"]["dirty"]
    assert "+a = 2" in (run.folder / "uncommitted.patch").read_text()


def test_results_are_added_to_stage_by_stage() -> None:
    run = made()
    run.record("running", {"one": {"status": "finished"}})
    run.record("finished", {"two": {"status": "finished"}})
    assert list(json.loads((run.folder / "results.json").read_text())["stages"]) == ["one", "two"]
    assert run.status == "finished"
