"""Fresh processes at the price of a fork: one process has imported what they need, and has done nothing else.

Importing torch and Lightning takes seconds, and nothing of them is changed by it: a process forked from one that has
only imported starts from where a new one would be after its imports.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

from lab.launch import die_with_parent, leave

LOOKS_ONLY = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Looking for GPUs must not begin to use them, which a forked process could not go on with."""


class Fresh:
    """Calls a module's ``main(arguments)``, each time in a process where nothing was called before.

    Args:
        module: its dotted name.
        environment: what the processes find in their environment beside this one's.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._waiting = subprocess.Popen(
            [sys.executable, "-P", "-m", "lab.fresh", module],
            env={**os.environ, **LOOKS_ONLY, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Have the process that waits end, and whatever it is at before it."""
        self.end()
        assert self._waiting.stdin is not None
        assert self._waiting.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._waiting.stdin.close()
        self._waiting.wait()
        self._waiting.stdout.close()

    def end(self) -> None:
        """Have a call that is going on stopped, as by SIGTERM, and none begun any more."""
        if self._waiting.poll() is None:
            self._waiting.terminate()

    def call(self, arguments: Sequence[str], said: Path) -> int:
        """The exit code of ``main(arguments)``, 1 where it raised; ``said`` gets what it wrote to stderr.

        Raises:
            RuntimeError: the process that waits is gone.
        """
        assert self._waiting.stdin is not None
        assert self._waiting.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._waiting.stdin.write(json.dumps([*arguments, str(said)]) + "\n")
            self._waiting.stdin.flush()
        answer = self._waiting.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that fresh ones are forked from ended with {self._waiting.wait()}")
        return int(answer)


def _wait(module: str) -> None:
    """Import a module; fork, for every request, a process that calls it, until asked to end."""
    child = 0

    def end(*_: object) -> None:
        if not child:
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        sys.stdin.close()

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that it waits for hears it too, and says how it ended
    signal.signal(signal.SIGTERM, end)
    main = importlib.import_module(module).main
    while not sys.stdin.closed and (line := sys.stdin.readline()):
        *arguments, said = json.loads(line)
        child = os.fork()
        if not child:
            _be(main, arguments, said)
        _, status = os.waitpid(child, 0)
        child = 0
        with contextlib.suppress(BrokenPipeError):  # who asked has gone
            print(os.waitstatus_to_exitcode(status), flush=True)


def _be(main: Callable[[Sequence[str]], object], arguments: Sequence[str], said: str) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    nothing, errors = os.open(os.devnull, os.O_RDWR), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, file in enumerate((nothing, nothing, errors)):
        os.dup2(file, stream)
    code = 0
    try:
        main(arguments)
    except BaseException:  # whatever it is, the process that waits is not to go on in it
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    _wait(sys.argv[1])
