"""A stage on several processes: started together, watched, and ended together.

Each process is ``python -m lab.stages RUN STAGE`` with what torch.distributed wants to know in its environment. One
that dies ends all: the others would wait for it for ever. Those of a launch over several machines are started and
watched there, by :mod:`lab.nodes`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from lab import stopping
from lab.errors import UserError
from lab.stopping import Stopped

if TYPE_CHECKING:
    from lab.link import Link, Remote

    Child: TypeAlias = subprocess.Popen[bytes] | Remote

POLL = 0.1
"""Seconds between two looks at the processes."""
GRACE = 10.0
"""Seconds that the others have to end by themselves when one has failed."""


class ProcessFailed(UserError):
    """A process of a stage died."""

    exit_code = 1


@dataclass(frozen=True)
class Order:
    """What every process of a stage is started with.

    Args:
        arguments: of ``python -m lab.stages``.
        folder: the stage's; errors and logs go there.
        processes: of all machines together.
        each: of every machine.
        address: where the processes meet, with ``port``.
        needs: files that must be there, with as many bytes.
    """

    arguments: Sequence[str]
    folder: str
    processes: int
    each: int
    address: str
    port: int
    needs: Mapping[str, int] = field(default_factory=dict)

    def environment(self, rank: int) -> dict[str, str]:
        """What tells a process which of how many it is, and where they meet; nothing for one alone."""
        if self.processes == 1:
            return {}
        return {
            "WORLD_SIZE": str(self.processes),
            "RANK": str(rank),
            "NODE_RANK": str(rank // self.each),
            "LOCAL_RANK": str(rank % self.each),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def launch(
    arguments: Sequence[str],
    processes: int,
    folder: Path,
    crew: Link | None = None,
    needs: Mapping[str, int] | None = None,
) -> None:
    """Run ``python -m lab.stages`` in so many processes, until all are done.

    Args:
        processes: how many; 1 where a strategy starts the others itself.
        folder: a process that fails leaves its message and traceback in ``error-RANK.txt`` there; all but the first
            write what they say to ``logs/rank-RANK.txt``.
        crew: the other supervisors of a launch, each of which starts one of the processes; without, all run here.
        needs: files that must be seen where a process starts, with as many bytes.

    Raises:
        ProcessFailed: one failed; says which, and why.
        Gone: a supervisor is not there any more.
        Stopped: a stop was asked for, and the processes have followed it.
    """
    for rank in range(processes):
        error_file(folder, rank).unlink(missing_ok=True)
    address, each = ("127.0.0.1", processes) if crew is None else (crew.address, processes // crew.here.nodes)
    port = free_port(wide=crew is not None)
    order = Order(list(arguments), str(folder.absolute()), processes, each, address, port, needs or {})
    children: list[Child] = [begin(order, rank) for rank in range(processes if crew is None else 1)]
    if crew is not None:
        children += crew.start(order)
    with stopping.patiently():
        try:
            failed = _watch(children, crew)
        finally:
            _end(children)
        number = _asked(crew)
    if failed is None:
        return
    if number is not None and (code := children[failed].returncode) in (128 + signal.SIGTERM, -signal.SIGTERM):
        raise Stopped(number, saved=code > 0)
    raise ProcessFailed(_why(failed, children, folder))


def begin(order: Order, rank: int) -> subprocess.Popen[bytes]:
    """Start one of a stage's processes on this machine.

    Raises:
        OSError: its log cannot be written.
    """
    environment = {**os.environ, **order.environment(rank)}
    command = [sys.executable, "-P", "-m", "lab.stages", *order.arguments]
    if rank == 0:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    log = log_file(Path(order.folder), rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        return subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=said, stderr=subprocess.STDOUT
        )  # fmt: skip


def needs(paths: Sequence[Path]) -> dict[str, int]:
    """Files that another machine must see before it starts, and how large they are."""
    return {str(path.absolute()): path.stat().st_size for path in paths if path.exists()}


def error_file(folder: Path, rank: int) -> Path:
    """Where a process, by its number among all, leaves the message of what made it fail."""
    return folder / f"error-{rank}.txt"


def log_file(folder: Path, rank: int) -> Path:
    """What a process has written; the first one's goes where this one's does."""
    return folder / "logs" / f"rank-{rank}.txt"


def said_by(folder: Path, rank: int) -> str | None:
    """What a process left as the message of what made it fail."""
    try:
        return error_file(folder, rank).read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None


def leave(code: int) -> NoReturn:
    """End a process of :func:`launch` with this exit code, whatever torch's threads are at.

    A process group's threads outlive the interpreter: at exit the last tensor that one holds aborts the process
    (SIGABRT, "terminate called without an active exception", pytorch/pytorch#179291), and finished work looks failed.
    A group that may still be waiting for a dead process must not be destroyed either, as that may wait too. So
    everything that Python has to say is said, and the system ends the rest.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Be asked to stop when the process that started this one dies, however it does; on Linux."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGTERM, 0, 0, 0)


def _asked(crew: Link | None) -> int | None:
    return stopping.asked() or (crew.asked() if crew is not None else None)


def _watch(children: Sequence[Child], crew: Link | None) -> int | None:
    """Wait for the processes; the rank of one that failed: the first, or of several within the grace a killed one.

    Raises:
        Gone: a supervisor is not there any more, which is why a process failed, perhaps.
    """
    told, deadline = False, None
    while True:
        if crew is not None:
            crew.check()
        if _asked(crew) is not None and not told:
            told = True
            for child in children:
                child.send_signal(signal.SIGTERM)
        codes = [child.poll() for child in children]
        if all(code == 0 for code in codes):
            return None
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and deadline is None:
            first, deadline = failed[0], time.monotonic() + GRACE
        late = deadline is not None and time.monotonic() > deadline and not any(map(_missing, children))
        if failed and (None not in codes or late):
            killed = [rank for rank in failed if (codes[rank] or 0) < 0]
            return killed[0] if killed else first
        time.sleep(POLL)


def _missing(child: Child) -> bool:
    return not isinstance(child, subprocess.Popen) and child.missing()


def _end(children: Sequence[Child]) -> None:
    """Whatever still runs is killed: it waits in a collective, and asking would not help."""
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()


def _why(rank: int, children: Sequence[Child], folder: Path) -> str:
    child, code = children[rank], children[rank].returncode or 0
    which = f"process {rank} of {len(children)}" if len(children) > 1 else "its process"
    if isinstance(child, subprocess.Popen):
        said = said_by(folder, rank)
    else:
        which, said = f"{which} on {child.host}", child.why
    log = f"; its output is in {log_file(folder, rank)}" if rank else ""
    if code < 0:
        memory = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"{which} was killed by signal {-code} ({signal.Signals(-code).name}){memory}{log}"
    return f"{which}: {said}{log}" if said is not None else f"{which} ended with exit code {code}{log}"


def free_port(*, wide: bool = False) -> int:
    """A port that nobody uses; one that other machines can reach where it is to be wide."""
    with socket.socket() as probe:
        probe.bind(("" if wide else "127.0.0.1", 0))
        return int(probe.getsockname()[1])
