"""Several trainings at once on one machine, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from lab import stages, stopping
from lab.errors import UserError
from lab.fresh import Fresh
from lab.registry import allow
from lab.run import Run

SAID = "said.txt"
"""In a run's folder, until it has ended well: what its process wrote."""


@contextlib.contextmanager
def workers(module: str, jobs: int) -> Iterator[list[Fresh]]:
    """So many processes that call a module's ``main``; an error or a signal has each save what it is at, and end.

    Raises:
        UserError: there are to be none.
        Interrupted, Terminated: Ctrl-C, SIGTERM.
    """
    if jobs < 1:
        raise UserError(f"jobs must be 1 at least, got {jobs}")
    with stopping.listening(), contextlib.ExitStack() as held:
        found = [held.enter_context(Fresh(module, _share(number, jobs))) for number in range(jobs)]
        try:
            yield found
        except BaseException as cause:
            for worker in found:
                worker.end()
            if isinstance(cause, stopping.Stopped):
                raise (stages.Interrupted() if cause.number == signal.SIGINT else stages.Terminated()) from cause
            raise


def keep_busy(found: Iterable[Fresh], one: Callable[[Fresh], bool]) -> None:
    """Have every worker do one thing after the other, until it is told that there is none left.

    Raises:
        BaseException: what ``one`` raised; nothing is begun any more.
    """
    found = list(found)
    with ThreadPoolExecutor(len(found)) as pool:
        going: dict[Future[bool], Fresh] = {pool.submit(one, worker): worker for worker in found}
        try:
            while going:
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    worker = going.pop(future)
                    if future.result():
                        going[pool.submit(one, worker)] = worker
        except BaseException:
            for worker in found:  # the threads wait for them
                worker.end()
            raise


def told(this: Run, worker: Fresh, asked: str) -> str | None:
    """Have a worker train a run; None, or what went wrong in a line."""
    said = this.folder / SAID
    if code := worker.call([asked], said):
        return (said.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {code}"])[-1]
    said.unlink(missing_ok=True)
    return None


def asked(this: Run, imports: Sequence[str]) -> str:
    """What :func:`main` is asked, to train a run or what is left of it."""
    return json.dumps({"run": str(this.folder), "imports": list(imports)})


def main(arguments: Sequence[str]) -> None:
    """Train a run, or what is left of it."""
    wanted = json.loads(arguments[0])
    for package in wanted["imports"]:
        allow(package)
    stages.resume(Run(Path(wanted["run"])))


def _share(number: int, jobs: int) -> dict[str, str]:
    """What one of several processes takes of the machine: its part of the cores, and a GPU where there are several."""
    import torch

    found = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // jobs, 1))
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = devices.split(",") if devices else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if jobs > 1 and len(gpus) > 1:
        found["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return found
