"""The command ``lab``: one file a command, each with what it is called, its arguments, and what it does.

Commands import torch and lightning only when they run; ``--help``, ``list``, ``describe`` and a failing ``check``
never do.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from lab import nodes
from lab.cli.options import plain
from lab.errors import UserError

COMMANDS = (
    "fit", "resume", "test", "validate", "predict", "export", "bench", "check", "show", "list", "describe", "new",
    "runs", "compare", "sweep", "verify-resume", "verify-parallel",
)  # fmt: skip
"""Every command; ``lab/cli/<command>.py`` has it (``list`` is in ``listing.py``: the word is Python's)."""
_FILES = {"list": "listing", "verify-resume": "verify_resume", "verify-parallel": "verify_parallel"}

INTERRUPTED = 130
STOPPED = 143


def script() -> NoReturn:
    """The installed command: :func:`main`, and out."""
    status = main()
    if "torch" not in sys.modules:
        gc.freeze()  # what was read is not looked through once more at exit
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done · 1 the run failed · 2 the command or recipe is wrong · 3 a gate was not met · 130 interrupted ·
        143 asked to stop.
    """
    parser = argparse.ArgumentParser(
        prog="lab", description="Train networks from recipes: one technique or a chain of them.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"lab.cli.{_FILES.get(name, name)}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__, allow_abbrev=False)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options, extra = parser.parse_known_args(arguments)
    several = next((name for name in ("overrides", "recipes") if hasattr(options, name)), None)
    if extra and (several is None or any(text.startswith("-") for text in extra)):
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(extra)}")
    elif several is not None:  # argparse takes no more positional arguments once an option stood between them
        getattr(options, several).extend(extra)
    here = nodes.claim() if options.command in nodes.FOR_SEVERAL or nodes.unclaimed() else None
    status = 1
    try:
        status = _guarded(options, options.run if here is None else functools.partial(nodes.run, here, options.run))
    finally:
        nodes.end(status)
    return status


def _guarded(options: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Run a command; what it raises is told, and becomes an exit code."""
    try:
        return run(options)
    except (KeyboardInterrupt, SystemExit) as stop:
        if options.debug or (isinstance(stop, SystemExit) and not hasattr(stop, "run")):
            raise
        what = "interrupted" if isinstance(stop, KeyboardInterrupt) else "stopped"
        print(f"lab: {what}{_goes_on(stop)}", file=sys.stderr)
        nodes.requeue(stop)
        return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else STOPPED
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: nobody is left to tell
        return 0
    except Exception as error:  # shown as a sentence; --debug shows where
        if options.debug:
            raise
        return _tell(error, options.command)


def _tell(error: Exception, command: str) -> int:
    """Say what went wrong, in as many lines as there are problems; the exit code."""
    from lab.registry import BrokenPlugin

    if isinstance(error, UserError):
        print(plain(str(error)), file=sys.stderr)
        return error.exit_code
    if isinstance(error, BrokenPlugin):
        print(plain(str(error)), file=sys.stderr)
        return 2
    known = type(error).__name__ == "StageFailed"
    print(
        f"lab {command}: {plain(str(error)) if known else f'{type(error).__name__}: {plain(str(error))}'}",
        file=sys.stderr,
    )
    print(f"--debug shows where{_goes_on(error)}", file=sys.stderr)
    return 1


def _goes_on(error: BaseException) -> str:
    """How a run goes on that ended so; nothing where there is none yet."""
    run = getattr(error, "run", None)
    return f"; `lab resume {plain(str(run.folder))}` goes on" if run is not None else ""
