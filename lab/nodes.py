"""One launch of several processes, over any number of machines: `torchrun … -m lab fit` or `srun lab fit`.

Whatever torchrun or srun starts is a supervisor. That of rank 0 does what ``lab fit`` does on one machine: it checks,
creates the run, records, prints. The others follow it: for each stage every supervisor starts one process of its own
(``python -m lab.stages RUN STAGE``), watches it and reports its end. So a process that hangs in a collective, dies, or
loses its machine is noticed by one that doesn't.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lab import launch, stopping
from lab.document import Node, Problem, RecipeError
from lab.errors import UserError, plain

if TYPE_CHECKING:
    import argparse

    from lab.link import Link
    from lab.plan import Plan, Stage

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
    from lab.following import follow
    from lab.link import Link

    _Now.link = link = Link(here)
    link.join()
    if here.rank:
        return follow(link)
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
        _Now.requeues = False  # once, whatever this process runs next
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
