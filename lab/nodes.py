"""One launch of several processes, over any number of machines: `torchrun … -m lab fit` or `srun lab fit`.

Whatever torchrun or srun starts is a supervisor. That of rank 0 does what ``lab fit`` does on one machine: it checks,
creates the run, records, prints. The others follow it: for each stage every supervisor starts one process of its own
(``python -m lab.stages RUN STAGE``), watches it and reports its end. So a process that hangs in a collective, dies, or
loses its machine is noticed by one that doesn't.

They talk through a ``torch.distributed.TCPStore``, in which each says all of its state in one key, twice a second:
nothing can be missed or come too late, and what doesn't change any more is gone. Keys are prefixed by the launch, and
both sides repeat a random token of the other's before anything counts: what a process of an earlier attempt has said
(torchrun restarts workers, and counts restarts on each machine for itself) is never taken for this one's.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lab import launch, stopping
from lab.document import Node, Problem, RecipeError
from lab.errors import UserError, plain
from lab.launch import Order

if TYPE_CHECKING:
    import argparse

    from lab.plan import Plan, Stage

PULSE = 0.5
"""Seconds between two signs of life."""
SILENCE = 20.0
"""Seconds without one after which a process is gone; torchrun kills thirty seconds after a SIGTERM."""
JOIN = 300.0
"""Seconds that all have to come: importing torch from a cold network disk takes its time."""
APPEAR = 30.0
"""Seconds that a run's folder may take to be seen by another machine."""
PARTING = 5.0
"""Seconds that rank 0 waits for the others to have read that all is over."""
CPP_LOG = "TORCH_CPP_LOG_LEVEL"
"""Read when torch is imported."""
FOR_SEVERAL = ("fit", "resume")
"""The commands that several processes can run together."""

_OF_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "LOCAL_WORLD_SIZE", "WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_OF_SRUN = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS_PER_NODE",
)  # fmt: skip


class Gone(UserError):
    """A process of the launch is not there any more, or cannot be reached."""

    exit_code = 1


class Width(NamedTuple):
    """On how many machines a launch trains, and on how many processes of each."""

    nodes: int
    each: int


@dataclass(frozen=True)
class Here:
    """Which process of a launch this is.

    Args:
        by: what started it, ``torchrun`` or ``srun``.
        rank: 0 leads; below ``size``.
        node: the machine's number, below ``nodes``.
        local: the process's among those of its machine.
        address: where the store is, with ``port``.
        served: whether someone else has a store there already; else rank 0 opens it.
        name: of the launch; the store's keys begin with it.
        job: a SLURM job's, which stays the same when it is requeued; None outside of one.
        restarted: whether the job was requeued.
    """

    by: str
    rank: int = 0
    size: int = 1
    node: int = 0
    nodes: int = 1
    local: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    served: bool = False
    name: str = ""
    job: str | None = None
    restarted: bool = False


class _Now:
    """What this process knows of its launch; there is one a process."""

    here: Here | None = None
    width: Width | None = None
    link: Link | None = None
    requeues = False


def claim() -> Here | None:
    """Which process of which launch this is; None where neither torchrun nor SLURM has started it.

    What says so is taken out of the environment, so that neither Lightning here nor a process that is started from here
    takes itself for one of the launch.
    """
    quietly = CPP_LOG not in os.environ
    if quietly:  # a store that is lost is told in a line, not with a stack of C++
        os.environ[CPP_LOG] = "ERROR"
    here = _of_torchrun() if "TORCHELASTIC_RUN_ID" in os.environ else _of_slurm()
    if quietly:
        del os.environ[CPP_LOG]
    if here is None:
        return None
    if here.by == "srun" and "SLURM_STEP_ID" not in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        print("lab: this job has several tasks, and lab was started without srun: one trains", file=sys.stderr)
    if here.by == "torchrun":
        launch.die_with_parent()  # an agent that is killed leaves its workers
    if here.job is not None:
        stopping.also(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, _before_training)
    drop = {*_OF_TORCHRUN, *_OF_SRUN, *(name for name in os.environ if name.startswith("TORCHELASTIC_"))}
    for name in drop if here.by == "torchrun" else _OF_SRUN:
        os.environ.pop(name, None)
    _Now.here = here
    return here


def unclaimed() -> bool:
    """Whether this is one of several processes of a launch, and not as a command's."""
    here = _of_torchrun() if "TORCHELASTIC_RUN_ID" in os.environ else _of_slurm()
    return here is not None and here.size > 1


def _of_torchrun() -> Here:
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    said, slurm = TorchElasticEnvironment(), _of_slurm()
    return Here(
        "torchrun", rank=said.global_rank(), size=said.world_size(), node=said.node_rank(), local=said.local_rank(),
        nodes=int(os.environ["GROUP_WORLD_SIZE"]), address=said.main_address, port=said.main_port,
        served=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        name=f"lab/torchrun/{os.environ['TORCHELASTIC_RUN_ID']}",
        job=slurm.job if slurm is not None else None, restarted=slurm is not None and slurm.restarted,
    )  # fmt: skip


def _of_slurm() -> Here | None:
    """Of a step of srun, or of a job's script itself, which is one process; not of somebody's shell in a job."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job is None or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    alone = Here(
        "srun", job=":".join(("slurm", *filter(None, (os.environ.get("SLURM_CLUSTER_NAME"), job)))),
        restarted=os.environ.get("SLURM_RESTART_COUNT", "0") != "0",
    )  # fmt: skip
    if step is None or "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return alone

    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    number, machines = int(os.environ["SLURM_NTASKS"]), os.environ.get("SLURM_STEP_NODELIST")
    port = 15000 + (int(job) + 101 * int(step)) % 10000  # below those that systems hand out
    return replace(
        alone, rank=int(os.environ["SLURM_PROCID"]), size=number, node=int(os.environ["SLURM_NODEID"]),
        local=int(os.environ["SLURM_LOCALID"]),
        nodes=int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1),
        address=os.environ.get("MASTER_ADDR")
        or SLURMEnvironment.resolve_root_node_address(machines or os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")),
        port=int(os.environ.get("MASTER_PORT", port)), name=f"lab/{alone.job}/{step}/{_restarts()}",
    )  # fmt: skip


def _restarts() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


# --- what a launch decides of a recipe -------------------------------------------------------------------------------


def width() -> Width | None:
    """On what this process's launch trains every stage; None where the recipe decides."""
    return _Now.width


def set_width(said: str) -> None:
    """For a stage's process: as many machines and processes of each, such as ``2x8``."""
    count, each = said.split("x")
    _Now.width = Width(int(count), int(each))


def filled(stage: Stage) -> Stage:
    """A stage whose trainer has the devices and machines of the launch, where the recipe leaves them out."""
    if (wide := width()) is None:
        return stage
    said = stage.trainer.mapping
    own = {
        "devices": said["devices"] if _count(said.get("devices")) is not None else Node(wide.each, stage.trainer.place),
        "num_nodes": said.get("num_nodes") or Node(wide.nodes, stage.trainer.place),
    }
    return replace(stage, trainer=replace(stage.trainer, value={**said, **own}))


def contradictions(stage: Stage, key: str) -> Iterator[Problem]:
    """What a stage's trainer says that the launch is not.

    Args:
        key: of its ``trainer``.
    """
    if (wide := width()) is None:
        return
    for name, launched, what in (
        ("devices", wide.each, "on each machine"), ("num_nodes", wide.nodes, "machines"),
    ):  # fmt: skip
        said = stage.trainer.mapping.get(name)
        if (count := _count(said)) is not None and count != launched:
            assert said is not None
            message = f"the recipe says {count}, but {launched} {what} were launched"
            yield Problem(said.place, f"{key}.{name}", f"{message}: leave {name} out, and the launch decides")
    strategy = stage.trainer.mapping.get("strategy")
    if strategy is not None and any(word in str(strategy.value) for word in ("spawn", "fork", "notebook")):
        yield Problem(strategy.place, f"{key}.strategy", f"{strategy.value} starts its processes itself: say ddp")


def check(plan: Plan) -> None:
    """Refuse what would wait for machines that nobody has started.

    Raises:
        RecipeError: a stage wants several machines, and this is no launch.
        UserError: this is one of a launch's processes, but not as one of lab's commands.
    """
    if width() is not None:
        return
    if unclaimed():
        raise UserError("one of several processes that torchrun or srun started: start `lab fit` by it, not this")
    problems = []
    for stage in plan.stages.values():
        said = stage.trainer.mapping.get("num_nodes")
        if said is not None and (count := _count(said) or 1) > 1:
            devices = _count(stage.trainer.mapping.get("devices")) or "K"
            message = (
                f"{count} machines need a launcher; on each: torchrun --nnodes {count} --nproc-per-node {devices} "
                "--node-rank R --master-addr HOST -m lab fit RECIPE (docs/devices.md)"
            )
            problems.append(Problem(said.place, "trainer.num_nodes", message))
    if problems:
        raise RecipeError(problems)


def _count(said: Node | None) -> int | None:
    """How many devices or machines a recipe asks for; None for as many as there are."""
    if said is None or said.value in (None, "auto", -1, "-1"):
        return None
    if said.items:
        return len(said.items)
    if isinstance(said.value, str):
        parts = [part for part in said.value.split(",") if part.strip()]
        return len(parts) if len(parts) > 1 or "," in said.value else int(parts[0])
    return said.value if type(said.value) is int else None


# --- supervisors -----------------------------------------------------------------------------------------------------


def run(here: Here, command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command as its launch's process: rank 0 does it, the others follow; alone it is run as it is.

    Raises:
        UserError: the launch cannot train together, or some process of it is gone.
    """
    if here.size == 1:
        return command(options)
    if options.command not in FOR_SEVERAL or (several := _several(options)):
        if here.rank:
            return UserError.exit_code
        what = options.command if options.command not in FOR_SEVERAL else f"{options.command} {several}"
        raise UserError(f"lab {what} is not for several processes: start it without {here.by}")
    _Now.link = link = Link(here)
    link.join()
    if here.rank:
        return _follow(link)
    _Now.width = link.even()
    return command(options)


def end(status: int) -> None:
    """Tell the others of the launch that all is over, with what exit code; wait until they know. Requeue the job."""
    if (link := _Now.link) is not None:
        if sys.exc_info()[1] is not None:  # --debug
            traceback.print_exc()
        for number in (signal.SIGTERM, signal.SIGINT):  # the others end, and torchrun then asks this one to
            signal.signal(number, signal.SIG_IGN)
        link.part(status)
        link.close()
    if _Now.requeues:
        _requeue()
    if link is not None:
        launch.leave(status)


def crew() -> Link | None:
    """The other processes of a launch, for rank 0; None where there are none."""
    return _Now.link


def job() -> str | None:
    """The SLURM job that this process belongs to."""
    return _Now.here.job if _Now.here else None


def restarted() -> bool:
    """Whether the job ran before, and was requeued."""
    return _Now.here is not None and _Now.here.restarted


def requeue(stop: BaseException) -> None:
    """After a stop by SIGUSR1, which SLURM sends before a job's time is over, have the job put back into the queue."""
    here = _Now.here
    _Now.requeues = (
        getattr(stop, "number", None) == signal.SIGUSR1 and here is not None and here.job is not None and here.rank == 0
    )


def _requeue() -> None:
    number = str(job()).rpartition(":")[2]
    try:
        subprocess.run(["scontrol", "requeue", number], check=True, capture_output=True, text=True, timeout=60)
        said = f"job {number} is requeued, and goes on from there"
    except (OSError, subprocess.SubprocessError) as cause:
        why = (getattr(cause, "stderr", None) or str(cause)).strip()
        said = f"job {number} could not be requeued: {plain(why)}"
    print(f"lab: {said}", file=sys.stderr, flush=True)


class _Early(SystemExit):
    """A stop by SIGUSR1 before there was anything to save."""

    run = None

    def __init__(self, number: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.number = number


def _before_training(number: int, frame: Any) -> None:
    raise _Early(number)


def _several(options: argparse.Namespace) -> str | None:
    """The flag that asks for several runs."""
    return next((f"--{name}" for name in ("seeds", "folds", "jobs") if getattr(options, name, None) is not None), None)


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


def _follow(link: Link) -> int:
    """Start, watch and end processes as rank 0 says; the exit code that it says at last.

    Raises:
        Gone: nothing is heard of it.
    """
    with stopping.listening(silently=True), stopping.patiently():
        hand = _Hand(link)
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


class _Hand:
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


def needs(paths: Sequence[Path]) -> dict[str, int]:
    """Files that another machine must see before it starts, and how large they are."""
    return {str(path.absolute()): path.stat().st_size for path in paths if path.exists()}
