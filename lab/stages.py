"""Running a plan: its stages in dependency order, each built, trained, tested and kept.

A stage on one process is trained in this one; a stage on several in a process tree of its own, started from the run's
folder (``python -m lab.stages RUN STAGE``), because every process of a distributed strategy starts the program again
and would run the other stages too.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lab import cache, document, failures, fingerprint, launch, nodes, recipe, run, stopping, trainer, training
from lab.check import check
from lab.document import Place, Problem, RecipeError
from lab.errors import UserError
from lab.plan import Plan
from lab.registry import allow
from lab.run import ENDED, Run
from lab.types import check_types

ERROR = "error.txt"
"""The file in a stage's folder that has the traceback of what made it fail."""
LEFT = 120.0
"""Seconds that a lock may outlive its process, as on a network disk when a machine is lost."""


class StageFailed(RuntimeError):
    """A stage's training raised; the cause is chained, and its traceback is in the stage's ``error.txt``."""

    def __init__(self, message: str, run: Run) -> None:
        super().__init__(message)
        self.run = run


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: what there was is saved, and the run can be resumed."""

    def __init__(self, run: Run | None = None) -> None:
        super().__init__()
        self.run = run


class Terminated(SystemExit):
    """SIGTERM, or what a cluster sends instead: what there was is saved, and the run can be resumed."""

    def __init__(self, run: Run | None = None, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.run = run
        self.number = number


def fit(
    plan: Plan,
    *,
    out: Path | None = None,
    smoke: bool = False,
    fresh: bool = False,
    command: Sequence[str] = (),
    imports: Sequence[str] = (),
    group: str | None = None,
) -> Run:
    """Train every stage of a plan in a new run; a stage that an earlier run has finished just so is taken over.

    A job that was requeued, and processes that torchrun has restarted, go on with the run that they began instead.

    Args:
        smoke: a few batches of every stage.
        fresh: take nothing over.
        group: what runs that belong together share.

    Raises:
        RecipeError: an argument has the wrong type or range; nothing was written.
        StageFailed: a stage raised; the run's folder has what there is.
        Interrupted: Ctrl-C.
        Terminated: SIGTERM.
    """
    check_types(plan)
    nodes.check(plan)
    if group is None and (begun := _begun(plan, out, {"smoke": smoke, "fresh": fresh})) is not None:
        print(f"lab: goes on with {begun.folder}", file=sys.stderr, flush=True)
        return begun if begun.status in ENDED else resume(begun)
    this = run.create(plan, out, command, imports, group)
    this.note(smoke=smoke, fresh=fresh, **({"job": job} if (job := nodes.job()) else {}))
    return _train_all(this, plan)


def _begun(plan: Plan, out: Path | None, flags: dict[str, bool]) -> Run | None:
    """The run of this very recipe that this launch began before it was started again."""
    if (crew := nodes.crew()) is not None and crew.begun is not None:
        return Run(Path(crew.begun))
    if not nodes.restarted():
        return None
    for folder in sorted(((out or run.RUNS) / plan.name).glob("*/manifest.json")):
        found = Run(folder.parent)
        with contextlib.suppress(UserError, OSError):  # damaged ones, and those that are removed meanwhile
            said = {"job": nodes.job(), **flags}
            same = found.recipe.read_text(encoding="utf-8") == document.dump(plan.resolved(found.folder))
            if same and found.status not in ENDED and said == {key: found.manifest.get(key) for key in said}:
                until = time.monotonic() + LEFT
                while found.busy and time.monotonic() < until:
                    time.sleep(1)
                return found
    return None


def resume(this: Run, *, watching: Sequence[Callback] = ()) -> Run:
    """Go on with a run where it was left: finished stages stay, an unfinished one goes on from its last state.

    Args:
        watching: callbacks beside the recipe's, of stages on one process.

    Raises:
        UserError: the run has ended, or another process writes to it.
        RecipeError, StageFailed, Interrupted, Terminated: as :func:`fit`.
    """
    if this.status in ENDED:
        raise UserError(f"{this.folder} has ended ({this.status}): there is nothing to resume")
    plan = check(recipe.load(this.recipe))
    check_types(plan)
    nodes.check(plan)
    for line in run.changed_since(this):
        rank_zero_warn(f"the run may go on otherwise than it would have: {line}")
    return _train_all(this, plan, watching)


def extend(source: Run, overrides: Sequence[str], *, command: Sequence[str] = (), imports: Sequence[str] = ()) -> Run:
    """Train a finished run longer, as a new run beside it: where it ended, its trainings go on.

    A stage whose trainer is as it was is taken over; one that starts from a network which is trained longer is trained
    anew. A learning-rate schedule over the whole training goes on as one over the longer whole.

    Args:
        overrides: ``trainer.max_epochs=30``, or of one stage ``stages.NAME.trainer.max_epochs=30``.

    Raises:
        UserError: the run has not finished.
        RecipeError: an override is wrong, or changes something else than the trainer.
        StageFailed, Interrupted, Terminated: as :func:`fit`.
    """
    if source.status not in ENDED:
        raise UserError(f"{source.folder} has not finished ({source.status}): `lab resume` goes on with it")
    wrong = [text for text in overrides if not re.match(r"(stages\.\w+\.)?trainer[.=]", text)]
    if wrong or not overrides:
        message = "a run can be trained longer, as by trainer.max_epochs=30; for all else there is its recipe.yaml"
        raise RecipeError([Problem(Place(f"override {wrong[0]}" if wrong else str(source.folder)), "", message)])
    before, plan = check(recipe.load(source.recipe)), check(recipe.load(source.recipe, overrides))
    check_types(plan)
    nodes.check(plan)
    this = run.create(plan, source.folder.parent.parent, command, imports)
    parents = [*this.manifest["parents"], source.folder.name]
    this.note(smoke=bool(source.manifest.get("smoke")), fresh=False, continues=source.id, parents=parents)
    longer: set[str] = set()
    for name, stage in plan.stages.items():
        alike = stage.trainer.plain() == before.stages[name].trainer.plain()
        if longer & set(stage.parents):
            longer.add(name)
        elif not alike:
            longer.add(name)
            cache.link(source.stage(name), this.stage(name))
            for result in ("results.json", *cache.ARTIFACT):
                (this.stage(name) / result).unlink(missing_ok=True)
    return _train_all(this, plan)


def _train_all(this: Run, plan: Plan, watching: Sequence[Callback] = ()) -> Run:
    """Every stage that has not finished; a stage that missed a gate closes all that need it, but in a shortened run."""
    if (crew := nodes.crew()) is not None:
        crew.say(run=str(this.folder.absolute()))
    with this.lock(), stopping.listening():
        fingerprint.pin(plan)
        known = this.results["stages"]
        this.record("running")
        closed: set[str] = set()
        for name, stage in plan.stages.items():
            if closed & set(stage.parents):
                closed.add(name)
                this.record("running", {name: {"status": "skipped", "parents": stage.parents}})
                continue
            result = known.get(name, {})
            if result.get("status") not in ENDED:
                result = _run_stage(this, plan, name, watching)
            if result["missed"] and not this.manifest.get("smoke"):
                closed.add(name)
        this.record("gated" if closed else "finished")
    return this


def train_stage(this: Run, plan: Plan, name: str, *, watching: Sequence[Callback]) -> dict[str, Any]:
    """One stage alone, whatever became of the others; for checks.

    Args:
        watching: callbacks beside the recipe's.

    Raises:
        StageFailed, Interrupted, Terminated: as :func:`fit`.
    """
    with this.lock(), stopping.listening():
        return _run_stage(this, plan, name, watching)


def _run_stage(this: Run, plan: Plan, name: str, watching: Sequence[Callback] = ()) -> dict[str, Any]:
    """One stage, here or in processes of its own; records its result, also when it fails or is stopped."""
    folder = this.stage(name)
    folder.mkdir(exist_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    try:
        if not (folder / training.STATE).exists():
            training.clear(folder)
        prepared = training.prepare(this, plan, name)
        if (reused := _reused(this, plan, prepared)) is not None:
            return reused
        processes, by_itself = trainer.processes(prepared.built.stage.trainer.plain())
        if processes == 1:
            return training.train(this, plan, prepared, watching)
        del prepared  # each process has its own
        flags = [f"--import={package}" for package in this.manifest["imports"]]
        if (wide := nodes.width()) is not None:
            flags.append(f"--width={wide.nodes}x{wide.each}")
        launch.launch(
            [str(this.folder.absolute()), name, *flags], 1 if by_itself else processes, folder, nodes.crew(),
            launch.needs([this.recipe, folder / training.STATE]),
        )  # fmt: skip
        return dict(this.results["stages"][name])
    except (Exception, stopping.Stopped, KeyboardInterrupt) as cause:  # whatever a technique, plugin or disk may raise
        parents = plan.stages[name].parents
        if (number := _signal(cause)) is not None:
            status = "interrupted" if number == signal.SIGINT else "stopped"
            this.record(status, {name: {"status": status, "parents": parents}})
            raise (Interrupted(this) if number == signal.SIGINT else Terminated(this, number)) from cause
        said = failures.said(cause)
        with contextlib.suppress(OSError):  # a disk that is full, perhaps: what went wrong first has to be told
            (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
            this.record("failed", {name: {"status": "failed", "error": said, "parents": parents}})
        if isinstance(cause, RecipeError):
            raise
        raise StageFailed(f"stage {name}: {said}", this) from cause


def _reused(this: Run, plan: Plan, prepared: training.Prepared) -> dict[str, Any] | None:
    """The result of a stage that an earlier run has finished just so, its folder taken over; None where none has."""
    stage = prepared.built.stage
    name, folder, out = stage.name, this.stage(stage.name), this.folder.parent.parent
    if prepared.key is None or this.manifest.get("fresh") or (folder / training.STATE).exists():
        return None
    if (source := cache.find(out, prepared.key)) is None:
        return None
    try:
        cache.link(source, folder)
    except OSError as cause:  # it has gone meanwhile, or there is no room
        rank_zero_warn(f"{source} could not be taken over, so {name} is trained: {cause}")
        return None
    earlier = Run(source.parent)
    result = dict(earlier.results["stages"][source.name])
    checkpoint = result["checkpoint"] and Path(name, *Path(result["checkpoint"]).parts[1:]).as_posix()
    result |= {"cached": result.get("cached", f"{earlier.id}/{source.name}"), "checkpoint": checkpoint}
    result |= {"parent": stage.parents[0] if stage.parents else None, "parents": stage.parents}
    result |= training.judged(stage, result, this.results.get("stages", {}))
    noted = {key: {**this.manifest[key], name: earlier.manifest[key].get(source.name)} for key in ("data", "callbacks")}
    this.note(**noted)
    this.record("running", {name: result})
    print(f"{plan.name}/{name}  cached from {result['cached']}", file=sys.stderr)
    return result


def _signal(cause: BaseException) -> int | None:
    """The signal that ended a stage; a worker that died of it, too, may have been what was noticed first."""
    if isinstance(cause, KeyboardInterrupt):
        return signal.SIGINT
    return cause.number if isinstance(cause, stopping.Stopped) else stopping.asked()


def main(arguments: Sequence[str]) -> None:
    """``python -m lab.stages RUN STAGE [--import=PACKAGE] [--width=2x8]``: train one stage of a run made for it."""
    folder, name, *flags = arguments
    launch.die_with_parent()
    this = Run(Path(folder))
    try:
        with stopping.listening(silently=True):
            for flag in flags:
                option, _, value = flag.partition("=")
                {"--import": allow, "--width": nodes.set_width}[option](value)
            plan = check(recipe.load(this.recipe))
            training.train(this, plan, training.prepare(this, plan, name))
    except stopping.Stopped as stop:
        launch.leave(128 + stop.number)
    except Exception as cause:  # the parent tells it, the first of several
        note = launch.error_file(this.stage(name), int(os.environ.get("RANK", "0")))
        note.write_text(f"{failures.said(cause)}\n\n{traceback.format_exc()}", encoding="utf-8")
        launch.leave(1)
    launch.leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
