"""A stage on several processes of this machine: started together, watched, and ended together.

Each process is ``python -m lab.stages RUN STAGE`` with what torch.distributed wants to know in its environment. One
that dies ends all: the others would wait for it for ever.
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
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lab import stopping
from lab.errors import UserError
from lab.stopping import Stopped

POLL = 0.1
"""Seconds between two looks at the processes."""
GRACE = 10.0
"""Seconds that the others have to end by themselves when one has failed."""


class ProcessFailed(UserError):
    """A process of a stage died."""

    exit_code = 1


def launch(arguments: Sequence[str], processes: int, errors: Path) -> None:
    """Run ``python -m lab.stages`` in so many processes, until all are done.

    Args:
        processes: how many; 1 where a strategy starts the others itself.
        errors: a folder; a process that fails leaves its message and traceback in ``error-RANK.txt`` there.

    Raises:
        ProcessFailed: one failed; says which, and why.
        Stopped: a stop was asked for, and the processes have followed it.
    """
    for rank in range(processes):
        error_file(errors, rank).unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "lab.stages", *arguments]
    shared = {
        "WORLD_SIZE": str(processes),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    children = []
    for rank in range(processes):
        distributed = {**shared, "LOCAL_RANK": str(rank)} if processes > 1 else {}
        children.append(subprocess.Popen(command, env={**os.environ, **distributed}, start_new_session=True))
    with stopping.patiently():
        try:
            failed = _watch(children)
        finally:
            _end(children)
    if failed is not None and children[failed].returncode == 128 + signal.SIGTERM and (number := stopping.asked()):
        raise Stopped(number, saved=True)
    if failed is not None:
        raise ProcessFailed(_why(failed, children, errors))


def error_file(folder: Path, rank: int) -> Path:
    """Where a process leaves the message of what made it fail."""
    return folder / f"error-{rank}.txt"


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


def _watch(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for the processes; the rank of one that failed: the first, or of several within the grace a killed one."""
    told, deadline = False, None
    while True:
        if stopping.asked() is not None and not told:
            told = True
            for child in children:
                child.send_signal(signal.SIGTERM)
        codes = [child.poll() for child in children]
        if all(code == 0 for code in codes):
            return None
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and deadline is None:
            first, deadline = failed[0], time.monotonic() + GRACE
        if failed and (None not in codes or (deadline is not None and time.monotonic() > deadline)):
            killed = [rank for rank in failed if (codes[rank] or 0) < 0]
            return killed[0] if killed else first
        time.sleep(POLL)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Whatever still runs is killed: it waits in a collective, and asking would not help."""
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()


def _why(rank: int, children: Sequence[subprocess.Popen[bytes]], errors: Path) -> str:
    which = f"process {rank} of {len(children)}" if len(children) > 1 else "its process"
    code = children[rank].returncode
    if code < 0:
        memory = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"{which} was killed by signal {-code} ({signal.Signals(-code).name}){memory}"
    try:
        return f"{which}: {error_file(errors, rank).read_text(encoding='utf-8').splitlines()[0]}"
    except (OSError, IndexError):
        return f"{which} ended with exit code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
