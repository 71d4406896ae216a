"""Runs cleared away: the right ones, nothing else, and nothing outside."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lab import cache, clearing
from lab.cli import main
from lab.files import write_json
from lab.run import TIME, Run

OUT = Path("runs")
KEY = "0" * 64


def made(name: str, status: str = "finished", *, recipe: str = "r", days: float = 0, **manifest: Any) -> Run:
    """A run of so many days ago, with 1,000 bytes beside what says how it went."""
    folder = OUT / recipe / f"20260101-000000-{name}"
    (folder / "main").mkdir(parents=True)
    ended = time.strftime(TIME, time.localtime(time.time() - days * 86_400))
    write_json(
        folder / "manifest.json", {"run": folder.name, "recipe": recipe, "seed": 0, "started": ended, **manifest}
    )
    write_json(folder / "results.json", {"status": status, "ended": ended, "stages": {"main": {"status": status}}})
    (folder / "main" / "weights").write_bytes(b"x" * 1000)
    aged(folder, days)
    return Run(folder)


def aged(folder: Path, days: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - days * 86_400,) * 2)


def chosen(**options: Any) -> dict[str, str]:
    return {one.folder.name.rpartition("-")[2]: one.why for one in clearing.select(OUT, **options)}


def left() -> set[str]:
    return {path.name.rpartition("-")[2] for path in OUT.glob("*/*")}


def pruned(*arguments: str) -> int:
    return main(["runs", "--prune", "--yes", *arguments])


def test_what_did_not_finish_and_what_was_only_a_look_goes() -> None:
    for status in ("finished", "gated", "failed", "interrupted", "stopped", "running"):
        made(status, status, recipe=status)
    made("smoke", smoke=True)
    assert chosen() == {"failed": "failed", "interrupted": "interrupted", "stopped": "stopped", "smoke": "smoke"}
    assert pruned() == 0
    assert left() == {"finished", "gated", "running"}
    assert not (OUT / "failed").exists()


def test_finished_runs_go_by_their_age_and_recipe_where_that_is_asked() -> None:
    made("old", days=31)
    made("gated", "gated", days=31)
    made("new", days=29)
    made("other", days=31, recipe="other")
    assert chosen() == {}
    assert set(chosen(older_than=30)) == {"old", "gated", "other"}
    assert set(chosen(older_than=30, recipe="other")) == {"other"}
    assert pruned("r", "--older-than", "30") == 0
    assert left() == {"new", "other"}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"status": "failed", "stages": 3}', None])
def test_a_damaged_run_goes_unless_it_is_just_being_made(content: str | None) -> None:
    run = made("bad")
    path = run.folder / "results.json"
    path.write_text(content) if content is not None else path.unlink()
    assert chosen() == {}
    aged(run.folder, 1)
    assert chosen() == {"bad": "damaged"}


def test_a_run_that_was_left_goes_after_a_day() -> None:
    made("left", "running", days=2)
    assert chosen() == {"left": "left"}


def test_a_run_that_is_being_written_stays() -> None:
    run = made("busy", "failed", days=2)
    code = (
        "from pathlib import Path; from lab.run import Run\n"
        f"with Run(Path('{run.folder}')).lock(): print(1, flush=True); input()"
    )
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert chosen() == {}
        assert clearing.remove(OUT, [clearing.Candidate(run.folder, "failed")]) == []
        process.communicate(b"\n")
    assert chosen() == {"busy": "failed"}


@pytest.mark.parametrize("source", ["20260101-000000-aaaaaa/main", "aaaaaa/main", "../20260101-000000-aaaaaa/main"])
def test_what_another_run_took_its_network_from_stays_and_what_that_took(source: str) -> None:
    made("aaaaaa", "failed", parents=["x/20260101-000000-bbbbbb/main"])
    made("bbbbbb", "failed")
    made("cccccc", "failed")
    made("child", parents=[source])
    assert set(chosen()) == {"cccccc"}
    assert set(chosen(older_than=-1)) == {"aaaaaa", "bbbbbb", "cccccc", "child"}


def test_what_latest_meant_stays() -> None:
    made("aaaaaa", "failed")
    made("child", parents=["latest/main"], origins={"latest/main": "../20260101-000000-aaaaaa/main"})
    assert chosen() == {}


def test_only_what_is_really_freed_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    kept, one, other = made("kept"), made("one", "failed"), made("two", "failed")
    for run, source in ((one, kept), (other, one)):
        (run.folder / "main" / "shared").hardlink_to(source.folder / "main" / "weights")
    small = sum(path.stat().st_size for path in one.folder.glob("*.json"))
    sizes = {found.folder.name.rpartition("-")[2]: found.size for found in clearing.select(OUT)}
    assert sizes == {"one": small, "two": small + 2000}
    assert pruned("--json") == 0
    assert json.loads(capsys.readouterr().out)["freed"] == 2 * small + 2000
    assert (kept.folder / "main" / "weights").read_bytes() == b"x" * 1000


def test_no_link_is_followed_and_nothing_outside_is_touched(own_folder: Path) -> None:
    outside = made("outside", "failed", recipe="away").folder.parent.rename(own_folder / "away")
    (own_folder / "precious").write_text("precious")
    run = made("inside", "failed")
    (run.folder / "main" / "link").symlink_to(own_folder / "precious")
    (run.folder / "main" / "links").symlink_to(outside)
    (OUT / "recipe").symlink_to(outside)
    (OUT / "r" / "20260101-000000-linked").symlink_to(outside / "20260101-000000-outside")
    (made("lock", "failed").folder / ".lock").symlink_to(own_folder / "precious")
    (OUT / "alias").symlink_to((OUT / "r").resolve())
    (OUT / "r" / "20260101-000000-alias").symlink_to(run.folder.resolve())
    assert [one.folder for one in clearing.select(OUT)] == [run.folder]
    assert pruned() == 0
    assert not run.folder.exists()
    assert (own_folder / "precious").read_text() == "precious"
    assert (outside / "20260101-000000-outside" / "main" / "weights").exists()


def test_nothing_is_removed_without_a_yes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made("bad", "failed")
    assert main(["runs", "--prune"]) == 2
    told = capsys.readouterr()
    assert "20260101-000000-bad  r  failed  1." in told.out
    assert "1 run to remove, 1." in told.out
    assert "--yes removes" in told.err
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert main(["runs", "--prune"]) == 0
    assert left() == {"bad"}
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert main(["runs", "--prune"]) == 0
    assert "1 run removed, 1." in capsys.readouterr().out
    assert left() == set()


def test_with_nothing_to_remove_nothing_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    made("good")
    assert main(["runs", "--prune"]) == 0
    assert capsys.readouterr().out == "0 runs to remove, 0 B\n"


def test_what_an_interrupted_removal_left_is_cleared_and_never_listed(capsys: pytest.CaptureFixture[str]) -> None:
    made("good")
    made("half", "failed").folder.rename(OUT / ".removed-half-abcdef")
    assert main(["runs"]) == 0
    assert "half" not in capsys.readouterr().out
    assert pruned() == 0
    assert not list(OUT.glob(".removed-*"))
    assert left() == {"good"}


def test_stages_of_removed_runs_are_forgotten() -> None:
    cache.remember(OUT, KEY, made("bad", "failed").stage("main"))
    assert pruned() == 0
    assert not list((OUT / ".stages").iterdir())


def test_options_that_mean_nothing_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    made("good")
    assert main(["runs", "--yes"]) == 2
    assert "--older-than and --yes go with --prune" in capsys.readouterr().err
    assert pruned("--older-than", "-1") == 2
    assert "--older-than takes days, 0 at least, got -1" in capsys.readouterr().err


def test_pruning_imports_no_torch() -> None:
    code = "import sys, lab.cli; lab.cli.main(['runs', '--prune', '--yes']); sys.exit('torch' in sys.modules)"
    made("bad", "failed")
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
    assert left() == set()
