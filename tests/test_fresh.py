"""Processes forked from one that has only imported."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lab.fresh import Fresh

MODULE = """
import os, signal, sys
calls = []
def main(arguments):
    calls.append(1)
    kind, *rest = arguments
    if kind == "write":
        open(rest[0], "w").write(f"{len(calls)} {os.environ['GIVEN']} {sys.stdin.read()!r}")
        print("not among the answers")
    if kind == "raise":
        raise ValueError("what was wrong")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "orphan":
        os.kill(os.getppid(), signal.SIGKILL)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "called.py").write_text(MODULE, encoding="utf-8")
    return {"PYTHONPATH": str(tmp_path), "GIVEN": "a word"}


def test_every_call_begins_where_nothing_was_called_and_says_how_it_ended(
    environment: dict[str, str], tmp_path: Path
) -> None:
    said, written = tmp_path / "said", tmp_path / "written"
    with Fresh("called", environment) as fresh:
        for _ in range(2):
            assert fresh.call(["write", str(written)], said) == 0
            assert written.read_text() == "1 a word ''"
        assert fresh.call(["raise"], said) == 1
        assert said.read_text().endswith("ValueError: what was wrong\n")
        assert fresh.call(["die"], said) == -signal.SIGKILL
        assert fresh.call(["write", str(written)], said) == 0
        assert said.read_text() == ""


def test_one_that_can_start_no_more_is_an_error(environment: dict[str, str], tmp_path: Path) -> None:
    with Fresh("called", environment) as fresh, pytest.raises(RuntimeError, match="ended with -9"):
        fresh.call(["orphan"], tmp_path / "said")


def test_nothing_is_left_behind(environment: dict[str, str], tmp_path: Path) -> None:
    with Fresh("called", environment) as fresh:
        fresh.call(["write", str(tmp_path / "written")], tmp_path / "said")
        waiting = fresh._waiting.pid
    with pytest.raises(ProcessLookupError):
        os.kill(waiting, 0)
