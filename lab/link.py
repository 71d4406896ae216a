"""What the processes of a launch say to each other, and whether they are all there.

They talk through a ``torch.distributed.TCPStore``, in which each says all of its state in one key, twice a second:
nothing can be missed or come too late, and what doesn't change any more is gone. Keys are prefixed by the launch, and
both sides repeat a random token of the other's before anything counts: what a process of an earlier attempt has said
(torchrun restarts workers, and counts restarts on each machine for itself) is never taken for this one's.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lab import launch
from lab.errors import UserError
from lab.nodes import Here, Width

if TYPE_CHECKING:
    from lab.launch import Order

PULSE = 0.5
"""Seconds between two signs of life."""
SILENCE = 20.0
"""Seconds without one after which a process is gone; torchrun kills thirty seconds after a SIGTERM."""
JOIN = 300.0
"""Seconds that all have to come: importing torch from a cold network disk takes its time."""
PARTING = 5.0
"""Seconds that rank 0 waits for the others to have read that all is over."""


class Gone(UserError):
    """A process of the launch is not there any more, or cannot be reached."""

    exit_code = 1


class Link:
    """What each process of a launch says of itself, and hears: rank 0 of all, the others of rank 0."""

    def __init__(self, here: Here) -> None:
        import torch

        from lab.run import versions

        self.here = here
        self.begun: str | None = None
        self._said: dict[str, Any] = {
            "token": secrets.token_hex(8), "host": socket.gethostname(), "node": here.node, "local": here.local,
            "versions": {"torch": torch.__version__, **versions("lightning-lab", "lightning")},
        }  # fmt: skip
        self._others = range(1, here.size) if here.rank == 0 else range(1)
        self._texts: dict[int, bytes] = {}
        self._heard: dict[int, dict[str, Any]] = {}
        self._at: dict[int, float] = {}
        self._passed, self._passes = time.monotonic(), 0
        self._lost: str | None = None
        self._leader: str | None = None
        self._wake, self._saying, self._closing = threading.Event(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def say(self, **changes: Any) -> None:
        """Say something more of this process, at once."""
        with self._saying:
            self._said = {**self._said, **changes}
        self._wake.set()

    def join(self) -> None:
        """Wait until all have come: rank 0 for all others, these for rank 0.

        Raises:
            Gone: some have not, or the store cannot be reached.
        """
        until = time.monotonic() + JOIN
        while not self._joined():
            if self._lost is not None or time.monotonic() > until:
                where = f"{self.here.address}:{self.here.port}"
                if self._lost is not None:
                    doing = "opened" if self.here.rank == 0 and not self.here.served else "reached"
                    raise Gone(f"{where} cannot be {doing}: {self._lost}; MASTER_ADDR and MASTER_PORT choose another")
                missing = [str(r) for r in self._others if not self._knows(r)] if self.here.rank == 0 else ["0"]
                who = f"of {self.here.size} processes {', '.join(missing)}"
                raise Gone(f"{who} did not come to {where} within {JOIN:.0f} seconds")
            time.sleep(launch.POLL)
        if self.here.rank == 0:
            self.say(knows={})

    def even(self) -> Width:
        """How wide the launch is.

        Raises:
            UserError: machines have different numbers of processes, or different versions.
        """
        mine, found = self._said, {0: self._said, **self._heard}
        counts = Counter(said["node"] for said in found.values())
        if len(set(counts.values())) > 1 or len(counts) != self.here.nodes:
            hosts = {said["node"]: said["host"] for said in found.values()}
            each = ", ".join(f"{counts[node]} on {hosts[node]}" for node in sorted(counts))
            raise UserError(f"every machine must have as many processes as every other; there are {each}")
        for rank, said in found.items():
            for name, version in said["versions"].items():
                if version != mine["versions"][name]:
                    raise UserError(
                        f"process {rank} on {said['host']} has {name} {version}, process 0 on {mine['host']} "
                        f"{mine['versions'][name]}: all must have the same"
                    )
        return Width(self.here.nodes, self.here.size // self.here.nodes)

    def check(self) -> None:
        """See whether everybody is there.

        Raises:
            Gone: someone isn't.
        """
        now = time.monotonic()
        if self.here.rank == 0 and (self._lost or now - self._passed > SILENCE):
            raise Gone(f"the store at {self.here.address}:{self.here.port} is gone: {self._lost or 'no answer'}")
        for rank in self._others:
            said = self._heard[rank]
            who = f"process {rank} on {said['host']}"
            if self._lost is not None:
                raise Gone(f"{who} is gone: {self._lost}")
            if now - self._at[rank] > SILENCE:
                raise Gone(f"{who} is gone: nothing heard for {SILENCE:.0f} seconds")
            if not self._knows(rank):
                raise Gone(f"{who} is gone: another was started in its place")

    def leader(self) -> dict[str, Any]:
        """What rank 0 says now.

        Raises:
            Gone: nothing any more.
        """
        self.check()
        return self._heard[0]

    @property
    def address(self) -> str:
        """By what name the others reach rank 0's machine."""
        return self.here.address

    def asked(self) -> int | None:
        """The signal that asked another process to stop; None where none was."""
        return next((said["asked"] for said in self._heard.values() if said.get("asked")), None)

    def start(self, order: Order) -> list[Remote]:
        """Have every other process start one of a stage; they are told apart from those of earlier stages."""
        number = self._said.get("order", {}).get("number", 0) + 1
        self.say(order={"number": number, **asdict(order)})
        found = [Remote(self, rank, number, said, order.each) for rank, said in self._heard.items()]
        return sorted(found, key=lambda remote: remote.rank)

    def heard(self, rank: int) -> dict[str, Any]:
        """What a process said last."""
        return self._heard[rank]

    def quiet(self, rank: int) -> bool:
        """Whether a process may be gone: it has missed some signs of life."""
        return time.monotonic() - self._at.get(rank, 0.0) > 6 * PULSE

    def part(self, status: int) -> None:
        """Say that all is over, with this exit code, and wait until that was heard."""
        until = time.monotonic() + PARTING
        if self.here.rank:
            self.say(ended=True)
            passes = self._passes + 2
            while self._passes < passes and not self._lost and not self.quiet(0) and time.monotonic() < until:
                time.sleep(0.02)
            return
        self.say(end=status)
        while self._lost is None and time.monotonic() < until:
            if all(self._heard[rank].get("ended") or self.quiet(rank) for rank in self._heard):
                return
            time.sleep(0.02)

    def close(self) -> None:
        """Say and hear nothing any more."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout=2 * PULSE)  # it may be waiting for a machine that doesn't answer

    def _knows(self, rank: int) -> bool:
        """Whether a process and this one have heard of each other."""
        said = self._heard.get(rank, {})
        if self.here.rank == 0:
            return bool(said.get("leader") == self._said["token"])
        return self._leader is not None and said.get("token") == self._leader

    def _joined(self) -> bool:
        return all(self._knows(rank) for rank in self._others)

    def _talk(self) -> None:
        """In a thread of its own: a machine that doesn't answer would keep the main thread waiting."""
        try:
            store = _store(self.here)
            if self.here.rank == 0 and store.check(["0"]):  # said before torchrun restarted this process
                self.begun = json.loads(store.get("0")).get("run")
            beat = 0
            while not self._closing.is_set():
                self._wake.clear()
                beat += 1
                with self._saying:
                    said = json.dumps({**self._said, "beat": beat})
                store.set(str(self.here.rank), said)
                self._hear(store)
                self._passed = time.monotonic()
                self._passes += 1
                self._wake.wait(PULSE)
        except Exception as cause:  # torch has several classes for a connection that fails
            self._lost = (str(cause).splitlines() or [type(cause).__name__])[0]

    def _hear(self, store: Any) -> None:
        there = [rank for rank in self._others if rank in self._texts or store.check([str(rank)])]
        texts = store.multi_get([str(rank) for rank in there]) if there else []
        for rank, text in zip(there, texts, strict=True):
            if text != self._texts.get(rank):
                said = json.loads(text)
                self._texts[rank], self._heard[rank], self._at[rank] = text, said, time.monotonic()
        if self.here.rank == 0 and not self._joined():
            knows = {str(rank): said["token"] for rank, said in self._heard.items()}
            if knows != self._said.get("knows"):
                self.say(knows=knows)
        elif self.here.rank and self._leader is None:
            leader = self._heard.get(0, {})
            if leader.get("knows", {}).get(str(self.here.rank)) == self._said["token"]:
                self._leader = leader["token"]
                self.say(leader=self._leader)


class Remote:
    """A stage's process that another supervisor watches; it is asked what :class:`subprocess.Popen` is."""

    def __init__(self, link: Link, follower: int, number: int, said: dict[str, Any], each: int) -> None:
        self.rank = said["node"] * each + said["local"]
        self.host = said["host"]
        self.returncode: int | None = None
        self._link, self._follower, self._number = link, follower, number

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        said = self._link.heard(self._follower)
        if said.get("number") == self._number:
            self.returncode = said["code"]
        return self.returncode

    @property
    def why(self) -> str | None:
        """What it, or its supervisor, says of what went wrong."""
        said = self._link.heard(self._follower)
        return said.get("why") if said.get("number") == self._number else None

    def missing(self) -> bool:
        """Whether nothing is heard of it now, so that it may be the one which is at fault."""
        return self.returncode is None and self._link.quiet(self._follower)

    def send_signal(self, number: int) -> None:
        """Ask it, and all others, to stop; which signal it was makes no difference."""
        self._link.say(stop=self._number)

    def kill(self) -> None:
        """Have it, and all others, killed."""
        self._link.say(kill=self._number)

    def wait(self) -> None:
        """Until it has ended, if that can be heard."""
        until = time.monotonic() + PARTING
        while self.poll() is None and not self.missing() and time.monotonic() < until:
            time.sleep(0.02)


def _store(here: Here) -> Any:
    """The store of a launch, under its name."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    socket.getaddrinfo(here.address, here.port)  # raises at once, where a store tries again and again
    opens = here.rank == 0 and not here.served
    store = TCPStore(
        here.address, here.port, None, opens, timeout=timedelta(seconds=JOIN), wait_for_workers=False
    )  # fmt: skip
    return PrefixStore(here.name, store)
