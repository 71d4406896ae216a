"""Processes of one stage: told who they are, ended together, and the one that failed first is named with its cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from lab import launch, stopping
from lab.launch import ProcessFailed
from lab.stopping import Stopped

PROCESS = """\
#!{python} -SE
import os, signal, sys, time
from pathlib import Path
*_, folder, what = sys.argv
rank = os.environ.get("LOCAL_RANK", "0")
def note(text):
    Path(folder, f"note-{{rank}}.new").write_text(str(text))
    Path(folder, f"note-{{rank}}.new").replace(Path(folder, f"note-{{rank}}.txt"))
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Launches processes that run some lines in place of a stage."""

    def start(lines: str, processes: int = 2, grace: float = 60.0) -> None:
        monkeypatch.setattr(launch, "GRACE", grace)
        program = tmp_path / "program"
        program.write_text(PROCESS.format(python=sys.executable) + dedent(lines))
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        launch.launch([str(tmp_path), "stage"], processes, tmp_path)

    return start


def noted(folder: Path, rank: int) -> str:
    return (folder / f"note-{rank}.txt").read_text()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_process_is_told_which_of_how_many_it_is_and_where_they_meet(
    started: Callable[..., None], tmp_path: Path
) -> None:
    started('note([os.environ[n] for n in ("WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")])')
    one, other = (noted(tmp_path, rank) for rank in (0, 1))
    assert one.startswith("['2', '0', '0', '127.0.0.1', ")
    assert one.replace("'0', '0'", "'0', '1'") == other  # with the same port


def test_what_all_but_the_first_say_is_kept(
    started: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    started('print("I am", rank); print("warned", rank, file=sys.stderr)')
    assert capfd.readouterr() == ("I am 0\n", "warned 0\n")
    assert sorted((tmp_path / "logs" / "rank-1.txt").read_text().splitlines()) == ["I am 1", "warned 1"]
    assert not (tmp_path / "logs" / "rank-0.txt").exists()


def test_a_process_alone_is_told_nothing(started: Callable[..., None], tmp_path: Path) -> None:
    started('note([n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") if n in os.environ])', processes=1)
    assert noted(tmp_path, 0) == "[]"


def test_ctrl_c_of_a_terminal_does_not_reach_them(started: Callable[..., None], tmp_path: Path) -> None:
    started("note(os.getsid(0) == os.getpid())")
    assert noted(tmp_path, 1) == "True"


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGKILL, r"killed by signal 9 \(SIGKILL\), as the system does when memory runs out"),
        (signal.SIGSEGV, r"killed by signal 11 \(SIGSEGV\)"),
    ],
)
def test_a_process_that_is_killed_is_named_with_the_signal_and_the_other_is_ended(
    number: int, why: str, started: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(ProcessFailed, match=rf"^process 1 of 2 was {why}; its output is in \S+/logs/rank-1.txt$"):
        started(
            f"""
            note(os.getpid())
            if rank == "1":
                os.kill(os.getpid(), {int(number)})
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(100)
            """,
            grace=0.3,
        )
    assert not any(alive(int(noted(tmp_path, rank))) for rank in (0, 1) if (tmp_path / f"note-{rank}.txt").exists())


def test_what_the_process_says_that_failed_first_is_told(started: Callable[..., None]) -> None:
    with pytest.raises(ProcessFailed, match=r"^process 1 of 2: out of luck; its output is in \S+/logs/rank-1.txt$"):
        started(
            """
            if rank == "1":
                Path(folder, "error-1.txt").write_text("out of luck\\n\\nTraceback")
                sys.exit(1)
            Path(folder, "error-0.txt").write_text("the other is gone")
            time.sleep(100)
            """,
            grace=0.3,
        )


def test_one_that_was_killed_is_the_cause_of_one_that_failed_before_that_was_seen(
    started: Callable[..., None],
) -> None:
    with pytest.raises(ProcessFailed, match=r"^process 1 of 2 was killed by signal 9"):
        started("""
            if rank == "0":
                Path(folder, "error-0.txt").write_text("the other is gone")
                sys.exit(1)
            time.sleep(0.15)
            os.kill(os.getpid(), signal.SIGKILL)
        """)


def test_a_process_that_says_nothing_is_told_by_its_exit_code_and_no_earlier_message(
    started: Callable[..., None], tmp_path: Path
) -> None:
    launch.error_file(tmp_path, 0).write_text("of an earlier time")
    with pytest.raises(ProcessFailed, match=r"^its process ended with exit code 3$"):
        started("sys.exit(3)", processes=1)


def test_a_stop_is_passed_on_once_and_followed(started: Callable[..., None], tmp_path: Path) -> None:
    def ask() -> None:
        while not all((tmp_path / f"note-{rank}.txt").exists() for rank in (0, 1)):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    with stopping.listening(silently=True):
        asking.start()
        with pytest.raises(Stopped) as stopped:
            started("""
                times = []
                signal.signal(signal.SIGTERM, lambda *_: times.append(1))
                note("ready")
                while not times:
                    time.sleep(0.005)
                time.sleep(0.25)
                note(len(times))
                sys.exit(143)
            """)
    asking.join()
    assert (stopped.value.number, stopped.value.saved) == (signal.SIGTERM, True)
    assert [noted(tmp_path, rank) for rank in (0, 1)] == ["1", "1"]


def test_a_second_stop_ends_what_does_not_follow(started: Callable[..., None], tmp_path: Path) -> None:
    def ask() -> None:
        while not (tmp_path / "note-0.txt").exists():
            time.sleep(0.005)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    asking = threading.Thread(target=ask)
    with stopping.listening(silently=True):
        asking.start()
        with pytest.raises(Stopped, match="SIGINT"):
            started(
                "signal.signal(signal.SIGTERM, signal.SIG_IGN); note(os.getpid()); time.sleep(100)",
                processes=1,
            )
    asking.join()
    assert not alive(int(noted(tmp_path, 0)))


def test_a_process_is_asked_to_stop_when_the_one_that_started_it_dies(tmp_path: Path) -> None:
    child = "import time; from lab.launch import die_with_parent as d; d(); print('ready', flush=True); time.sleep(60)"
    parent = dedent(f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(100)
    """)
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        process.kill()
    until = time.monotonic() + 20
    while running(orphan) and time.monotonic() < until:
        time.sleep(0.01)
    assert not running(orphan)


def running(process: int) -> bool:
    """Whether it is there, and not only its exit status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
