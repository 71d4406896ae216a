"""Several trainings at once on one machine, each in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback

from lab import stages, stopping
from lab.errors import UserError
from lab.fresh import Fresh
from lab.registry import allow
from lab.run import Run

Item = TypeVar("Item")
Result = TypeVar("Result")

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
                if cause.number == signal.SIGINT:
                    raise stages.Interrupted() from cause
                raise stages.Terminated(number=cause.number) from cause
            raise


def spread(found: Sequence[Fresh], items: Iterable[Item], one: Callable[[Fresh, Item], Result]) -> Iterator[Result]:
    """Have every worker do one thing after the other; yields what came of each when it has ended.

    Args:
        items: asked for the next one when a worker is free.

    Raises:
        BaseException: what ``one`` raised; nothing is begun any more.
    """
    rest, idle = iter(items), list(found)
    with ThreadPoolExecutor(len(idle)) as pool:
        going: dict[Future[Result], Fresh] = {}
        try:
            while True:
                for item in itertools.islice(rest, len(idle)):
                    worker = idle.pop()
                    going[pool.submit(one, worker, item)] = worker
                if not going:
                    return
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    idle.append(going.pop(future))
                    yield future.result()
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


def asked(this: Run, imports: Sequence[str], more: Any = None) -> str:
    """What a worker is asked, to train a run or what is left of it.

    Args:
        more: for whoever watches it, as JSON has it.
    """
    return json.dumps({"run": str(this.folder), "imports": list(imports), "more": more})


def resume(arguments: Sequence[str], watching: Callable[[Run, Any], Sequence[Callback]]) -> None:
    """In a worker, train what :func:`asked` says.

    Args:
        watching: gives callbacks beside the recipe's.
    """
    wanted = json.loads(arguments[0])
    for package in wanted["imports"]:
        allow(package)
    this = Run(Path(wanted["run"]))
    stages.resume(this, watching=watching(this, wanted["more"]))


def main(arguments: Sequence[str]) -> None:
    """Train a run, or what is left of it."""
    resume(arguments, lambda this, more: ())


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
