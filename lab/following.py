"""The processes of a launch that are not the first: each starts, watches and ends a stage's process as rank 0 says."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from lab import launch, stopping
from lab.launch import Order
from lab.link import Link

APPEAR = 30.0
"""Seconds that a run's folder may take to be seen by another machine."""


def follow(link: Link) -> int:
    """Start, watch and end processes as rank 0 says; the exit code that it says at last.

    Raises:
        Gone: nothing is heard of it.
    """
    with stopping.listening(silently=True), stopping.patiently():
        hand = Hand(link)
        try:
            while True:
                said = link.leader()
                hand.obey(said)
                if (status := said.get("end")) is not None:
                    return int(status)
                time.sleep(launch.POLL)
        except stopping.Stopped as stop:  # asked twice
            return 128 + stop.number
        finally:
            hand.drop()


class Hand:
    """A follower's process, if there is one."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._child: subprocess.Popen[bytes] | None = None
        self._number, self._rank, self._told, self._asked = 0, 0, False, False
        self._order: Order | None = None
        self._until = 0.0

    def obey(self, said: dict[str, Any]) -> None:
        """Do what rank 0 says, and tell it what became of it."""
        if (asked := stopping.asked()) is not None and not self._asked:
            self._asked = True
            self._link.say(asked=asked)
        if (order := said.get("order")) is not None and order["number"] > self._number:
            self._number, self._told = order["number"], False
            self._order = Order(**{name: value for name, value in order.items() if name != "number"})
            self._rank = self._link.here.node * self._order.each + self._link.here.local
            self._until = time.monotonic() + APPEAR
        if self._order is not None and self._child is None:
            self._begin(self._order, killed=said.get("kill") == self._number)
        if self._child is None:
            return
        if (asked is not None or said.get("stop") == self._number) and not self._told:
            self._told = True
            self._child.send_signal(signal.SIGTERM)
        if said.get("kill") == self._number:
            self._child.kill()
        if (code := self._child.poll()) is not None:
            assert self._order is not None
            self._report(code, launch.said_by(Path(self._order.folder), self._rank))

    def drop(self) -> None:
        """Kill what there is."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _begin(self, order: Order, *, killed: bool) -> None:
        if killed:
            self._report(-signal.SIGKILL, None)
            return
        missing = [path for path, size in order.needs.items() if not _is_there(Path(path), size)]
        if not missing:
            try:
                self._child = launch.begin(order, self._rank)
            except OSError as cause:
                self._report(1, f"it cannot be started on {socket.gethostname()}: {cause}")
        elif time.monotonic() > self._until:
            host = socket.gethostname()
            said = f"{missing[0]} does not appear on {host} within {APPEAR:.0f} seconds"
            self._report(1, f"{said}: runs must lie on a disk that all machines share")

    def _report(self, code: int, why: str | None) -> None:
        self._order = self._child = None
        self._link.say(number=self._number, code=code, why=why)


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
