"""Asked to stop: SIGTERM and Ctrl-C let the step end and be saved; asked again, everything ends at once.

Signals belong to the whole process, and so does what is kept here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 10.0
"""Seconds that a validation may still take when a stop was asked for: SLURM kills after thirty."""


class Stopped(BaseException):
    """Training was asked to stop, and did.

    Args:
        number: the signal's.
        saved: whether the state of this very step was saved.
    """

    def __init__(self, number: int, *, saved: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved


class _Asked:
    """What the process was asked for, and whether it finishes a step first."""

    number: int | None = None
    at = 0.0
    patient = False
    silent = False
    listening = False
    signals: tuple[int, ...] = SIGNALS


def asked() -> int | None:
    """The signal that came, if one did."""
    return _Asked.number


def ask(number: int) -> None:
    """Ask for a stop, as a signal would."""
    _Asked.number, _Asked.at = number, time.monotonic()


def also(number: int) -> None:
    """Take another signal for such a request too."""
    _Asked.signals = (*SIGNALS, number)


def listens() -> bool:
    """Whether signals are taken here."""
    return _Asked.listening


def overdue() -> bool:
    """Whether a stop was asked for so long ago that what is under way can't be waited for."""
    return _Asked.number is not None and time.monotonic() - _Asked.at > PATIENCE


@contextlib.contextmanager
def listening(*, silently: bool = False) -> Iterator[None]:
    """Take these signals: outside :func:`patiently` they raise :class:`Stopped` at once.

    Only the main thread of a process gets signals; elsewhere nothing changes. Within itself it does nothing more.

    Args:
        silently: say nothing when one comes: another process does.
    """
    if threading.current_thread() is not threading.main_thread() or _Asked.listening:
        yield
        return
    process = os.getpid()
    before = {number: signal.getsignal(number) for number in _Asked.signals}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # as nohup wants it
    _Asked.number, _Asked.patient, _Asked.silent, _Asked.listening = None, False, silently, True
    for number in before:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        if os.getpid() == process:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            _Asked.number, _Asked.patient, _Asked.listening = None, False, False


@contextlib.contextmanager
def patiently() -> Iterator[None]:
    """Let the code within look at :func:`asked` itself; a second signal doesn't wait for that."""
    be_patient(True)
    try:
        yield
    finally:
        be_patient(False)


def be_patient(patient: bool) -> None:
    """Whether the first signal is only noted."""
    _Asked.patient = patient


def ignore_in_worker() -> None:
    """For processes that read data: a stop that their whole group is asked for is their parent's to follow."""
    for number in _Asked.signals:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: FrameType | None) -> None:
    if _Asked.number is not None or not _Asked.patient:
        _Asked.number = number
        _Asked.patient = False
        raise Stopped(number)
    _Asked.number, _Asked.at = number, time.monotonic()
    if _Asked.silent:
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # the signal came while stderr was written
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        print(f"\nlab: {signal.Signals(number).name}: the step is finished and saved first{again}", file=sys.stderr)
