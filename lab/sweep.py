"""Many runs of one recipe that look for its best values: Optuna proposes them, and keeps what came of them.

A sweep is a study in a storage (SQLite beside the runs, or any that Optuna knows), which several processes and machines
may work on together. Its trials are ordinary runs that share a group. Each is trained in a process of its own; one that
was left in the middle, however that came, is taken up by the next ``lab sweep`` of the same recipe and goes on exactly.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lab import proposals, recipe, repetition, stages
from lab import run as runs
from lab.callbacks import Lean
from lab.check import check
from lab.document import Problem, RecipeError
from lab.errors import UserError
from lab.fresh import Fresh
from lab.gates import figure
from lab.jobs import keep_busy, told, workers
from lab.plan import Plan
from lab.recipe import shown
from lab.registry import allow
from lab.run import Run
from lab.space import Sweep, misfits
from lab.trainer import processes
from lab.types import check_types

try:
    import optuna
    from optuna.trial import FrozenTrial, TrialState
except ImportError as cause:  # pragma: no cover  # it is there where tests run
    raise UserError("lab sweep needs Optuna: pip install 'lightning-lab[sweep]'") from cause

STUDY = "study.db"
RUNS, OWNER, ERROR, SURPLUS = "runs", "owner", "error", "surplus"
"""Attributes of a trial: its runs' folders, who works at it, what made it fail, and that it is one too many."""
PRESENCE = ".owner-"
"""How the locks of processes that work at a study begin."""
GONE = 60.0
"""Seconds after which a trial that is nobody's is held to be deserted."""


@dataclass(frozen=True)
class Work:
    """What a sweep is made of.

    Args:
        source: the recipe: a file, or a bundled recipe's name.
        overrides: of all trials.
        sweep: what the recipe says of it.
        name: of the study.
        folder: where its pictures, locks and own storage lie.
    """

    source: Any
    overrides: list[str]
    sweep: Sweep
    name: str
    folder: Path
    storage: str
    out: Path | None = None
    command: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)

    def plans(self, values: dict[str, Any]) -> list[Plan]:
        """A plan for each seed of a trial."""
        texts = [axis.override(values[axis.path]) for axis in self.sweep.axes]
        found = repetition.variants(self.source, [*self.overrides, *texts], seeds=self.sweep.seeds)
        return [variant.plan for variant in found]


def prepare(
    source: Any,
    overrides: Iterable[str] = (),
    *,
    storage: str | None = None,
    study: str | None = None,
    out: Path | None = None,
    command: Sequence[str] = (),
    imports: Sequence[str] = (),
) -> Work:
    """A recipe's sweep, checked: every key of its space, with its first and its last value.

    Args:
        storage: an URL that Optuna knows; a SQLite file among the runs where it is left out.
        study: its name in the storage; the recipe's and a digest of what it says where it is left out.

    Raises:
        RecipeError: the recipe or its sweep is wrong.
        UserError: it has none.
    """
    overrides = list(overrides)
    plan = check(recipe.load(source, overrides))
    check_types(plan)
    if plan.sweep is None:
        raise UserError(f"{source} has no `sweep:` that says what to look for, and where: docs/sweep.md")
    if problems := list(_misfits(source, overrides, plan.sweep)):
        raise RecipeError(problems)
    _choosable(plan, plan.sweep)
    content = json.dumps([plan.resolved(), plan.sweep.identity()], sort_keys=True, default=str)
    name = study or f"sweep-{plan.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    folder = (out if out is not None else runs.RUNS) / plan.name / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise UserError(
            f"{folder} cannot be made: {cause.strerror or cause}; choose another place with --out"
        ) from cause
    url = storage or f"sqlite:///{(folder / STUDY).resolve()}"
    return Work(source, overrides, plan.sweep, name, folder, url, out, list(command), list(imports))


def _choosable(plan: Plan, sweep: Sweep) -> None:
    """Whether the sampler and the pruner can be had, as the recipe says them."""
    for key, made in (
        ("sampler", lambda: proposals.sampler(sweep, 0)),
        ("pruner", lambda: proposals.pruner(*sweep.pruner) if sweep.pruner is not None else None),
    ):
        try:
            made()
        except ImportError as cause:
            name = cause.name or "its package"
            said = f"{sweep.sampler[0]} needs {name}: pip install {name}"
            raise RecipeError([Problem(sweep.place, f"sweep.{key}", said)]) from cause
        except (TypeError, ValueError) as cause:
            raise RecipeError([Problem(sweep.place, f"sweep.{key}", " ".join(str(cause).split()))]) from cause
    if sweep.pruner is not None and (count := processes(plan.stages[sweep.stage].trainer.plain())[0]) > 1:
        said = f"a pruner watches trainings on one process, and {sweep.stage} is one on {count}"
        raise RecipeError([Problem(sweep.place, "sweep.pruner", said)])


def _misfits(source: Any, overrides: Sequence[str], sweep: Sweep) -> Iterator[Problem]:
    def sound(text: str) -> None:
        check_types(check(recipe.load(source, [*overrides, text])))

    yield from misfits(sweep, sound)


class Sweeping:
    """A study, its storage, and who this process is in it.

    Raises:
        UserError: the storage cannot be reached, or the study looks for something else.
    """

    def __init__(self, work: Work, owner: str = "") -> None:
        self.work = work
        self.owner = owner
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        direction: Literal["maximize", "minimize"] = "maximize" if work.sweep.maximize else "minimize"
        try:
            with _alone(work.folder):  # two that begin a database at the same moment are in each other's way
                self.storage = optuna.storages.get_storage(work.storage)
                self.study = optuna.create_study(
                    storage=self.storage, study_name=work.name, direction=direction, load_if_exists=True
                )
        except Exception as cause:  # whatever a database's driver raises
            said = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
            raise UserError(f"the storage {_without_password(work.storage)} cannot be reached: {said}") from cause
        if self.study.direction.name.lower() != direction:
            raise UserError(f"the study {work.name} is there already, and is to {self.study.direction.name.lower()}")

    @property
    def every(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.study.get_trials(deepcopy=False)

    @property
    def trials(self) -> list[FrozenTrial]:
        """Without those that two processes began beyond the last one."""
        return [trial for trial in self.every if not trial.user_attrs.get(SURPLUS)]

    def note(self, trial: FrozenTrial, **attributes: Any) -> None:
        """Keep something with a trial."""
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def begun(self) -> FrozenTrial | None:
        """A new trial with its values and its runs' folders; None where there are enough."""
        if len(self.trials) >= self.work.sweep.trials:
            return None
        self.study.sampler = proposals.sampler(self.work.sweep, len(self.every))
        number = self.study.ask().number
        trial = self.every[number]
        if number >= self.work.sweep.trials:  # another process was faster
            self.note(trial, **{SURPLUS: True})
            self.study.tell(number, state=TrialState.FAIL)
            return None
        self.note(trial, **{OWNER: self.owner})
        return self.set_up(trial)

    def set_up(self, found: FrozenTrial) -> FrozenTrial:
        """A trial with its values, which follow from its number, and its runs' folders."""
        work = self.work
        self.study.sampler = proposals.sampler(work.sweep, found.number)
        trial = optuna.trial.Trial(self.study, found._trial_id)
        values = {axis.path: proposals.drawn(trial, axis) for axis in work.sweep.axes}
        folders = []
        for plan in work.plans(values):
            this = runs.create(plan, work.out, work.command, work.imports, work.name)
            this.note(smoke=False, fresh=False, sweep={"trial": found.number, "values": values})
            folders.append(this.id)
        self.note(found, **{RUNS: folders})
        return self.every[found.number]

    def left(self) -> list[FrozenTrial]:
        """Trials that nobody works at any more, taken over; those of a machine with other folders are left to it."""
        found = []
        with _alone(self.work.folder):
            for trial in self.every:
                if trial.state != TrialState.RUNNING or not self._deserted(trial):
                    continue
                self.note(trial, **{OWNER: self.owner})
                found.append(trial if RUNS in trial.user_attrs else self.set_up(trial))
        return found

    def leave(self) -> None:
        """Leave no trace of this process, or of dead ones, but where it shows that a trial is deserted."""
        needed = {trial.user_attrs.get(OWNER) for trial in self.every if not trial.state.is_finished()}
        for lock in self.work.folder.glob(f"{PRESENCE}*"):
            owner = lock.name.removeprefix(PRESENCE)
            if owner not in needed and (owner == self.owner or not _held(lock)):
                lock.unlink(missing_ok=True)

    def _deserted(self, trial: FrozenTrial) -> bool:
        if OWNER not in trial.user_attrs:  # it died in the moment in between
            begun = trial.datetime_start
            return begun is not None and time.time() - begun.timestamp() > GONE
        lock = _lock(self.work.folder, trial.user_attrs[OWNER])
        return lock.exists() and not _held(lock)


def carry_out(
    work: Work, *, jobs: int = 1, tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> Sweeping:
    """Train trials until there are as many as there are to be; first those that were left in the middle.

    Args:
        jobs: how many at once, a process each.
        tell: is given a line for every trial.

    Raises:
        UserError: the storage cannot be reached; a trial's results do not have the figure.
    """
    with contextlib.ExitStack() as held:
        sweeping = Sweeping(work, held.enter_context(_presence(work.folder)))
        held.callback(sweeping.leave)
        left, turn = iter(sweeping.left()), threading.Lock()

        def one(worker: Fresh) -> bool:
            with turn:
                trial = next(left, None) or sweeping.begun()
            if trial is None:
                return False
            tell(train(sweeping, trial, worker))
            return True

        keep_busy(held.enter_context(workers("lab.sweep", jobs)), one)
    return sweeping


def train(sweeping: Sweeping, trial: FrozenTrial, worker: Fresh) -> str:
    """Train a trial's runs, or what is left of them, and tell the study what came of it; a line that says so.

    Raises:
        UserError: a run's results do not have the figure.
    """
    work, began = sweeping.work, time.monotonic()
    figures, pruned = [], False
    for number, folder in enumerate(trial.user_attrs[RUNS]):
        this = Run(work.folder.parent / folder)
        ended = this.status in ("finished", "gated")
        if not ended and (last := told(this, worker, _asked(sweeping, trial, this, first=not number))):
            if this.status in ("interrupted", "stopped", "running"):  # it goes on another time
                return f"trial {trial.number + 1} was left: {last}"
            sweeping.note(trial, **{ERROR: last})
            sweeping.study.tell(trial.number, state=TrialState.FAIL)
            return f"trial {trial.number + 1} failed: {last}"
        figures.append(_figure(this, work.sweep))
        pruned = "pruned" in this.manifest
        if pruned:
            break
    if pruned:
        sweeping.study.tell(trial.number, state=TrialState.PRUNED)
    else:
        sweeping.study.tell(trial.number, sum(figures) / len(figures))
    found = sweeping.every[trial.number]
    values = ", ".join(f"{path.rpartition('.')[2]} {short(value)}" for path, value in values_of(work.sweep, found))
    reached = f"{sum(figures) / len(figures):.5g}{' (pruned)' if pruned else ''}, {time.monotonic() - began:.1f} s"
    return f"trial {trial.number + 1} of {work.sweep.trials}: {values}: {work.sweep.goal} {reached}"


def short(value: Any) -> str:
    """A value to be read: of numbers with a fraction four digits."""
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def values_of(sweep: Sweep, trial: FrozenTrial) -> list[tuple[str, Any]]:
    """A trial's values, by the paths of the space."""
    found = []
    for axis in sweep.axes:
        if axis.path in trial.params:
            value = trial.params[axis.path]
            found.append((axis.path, json.loads(value) if axis.choices else value))
    return found


def _figure(this: Run, sweep: Sweep) -> float:
    """A run's figure.

    Raises:
        UserError: it has none.
    """
    result = this.results["stages"].get(sweep.stage, {})
    value = figure(result, sweep.metric)
    if value is None:
        known = ", ".join(sorted(result.get("metrics", {})))
        raise UserError(f"{this.folder}: {sweep.goal} was not measured; there are {known or 'no metrics'}")
    return value


class Reports(Lean):
    """Tells a study what a trial has reached after each validation, and ends the training if it is not worth it."""

    watches_only = True

    def __init__(self, trial: optuna.trial.Trial, this: Run, stage: str, metric: str) -> None:
        self.trial = trial
        self.run = this
        self.stage = stage
        self.metric = metric

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            trainer.sanity_checking
            or trainer.state.fn != TrainerFn.FITTING
            or Path(trainer.default_root_dir).name != self.stage
        ):
            return
        value = trainer.callback_metrics.get(self.metric)
        if value is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an epoch that is trained again after a break was reported
            self.trial.report(float(value), trainer.current_epoch)
        if self.trial.should_prune():
            self.run.note(pruned=trainer.current_epoch)
            trainer.should_stop = True


def main(arguments: Sequence[str]) -> None:
    """Train a trial's run, or what is left of it; the one argument is JSON."""
    asked = json.loads(arguments[0])
    for package in asked["imports"]:
        allow(package)
    this, watching = Run(Path(asked["run"])), []
    if (report := asked["report"]) is not None:
        study = optuna.load_study(
            study_name=report["study"], storage=report["storage"], pruner=proposals.pruner(*report["pruner"])
        )
        watching = [Reports(optuna.trial.Trial(study, report["trial"]), this, asked["stage"], asked["metric"])]
    stages.resume(this, watching=watching)


def _asked(sweeping: Sweeping, trial: FrozenTrial, this: Run, *, first: bool) -> str:
    """What :func:`main` is asked; the first of a trial's runs is the one that a pruner judges."""
    work = sweeping.work
    report = None
    if work.sweep.pruner is not None and first:
        report = {
            "storage": work.storage, "study": work.name, "trial": trial._trial_id, "pruner": work.sweep.pruner,
        }  # fmt: skip
    asked = {"run": str(this.folder), "report": report, "stage": work.sweep.stage, "metric": work.sweep.metric}
    return json.dumps({**asked, "imports": work.imports})


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of all processes of this machine that work at a study, this one."""
    with (folder / ".alone").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _presence(folder: Path) -> Iterator[str]:
    """A name for this process, which others see to be alive as long as it is."""
    name = secrets.token_hex(4)
    with _lock(folder, name).open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield name


def _lock(folder: Path, owner: str) -> Path:
    return folder / f"{PRESENCE}{owner}"


def _held(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:…@", url)
