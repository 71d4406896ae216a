"""A sweep's study: which trials there are in its storage, and who works at each.

Several processes and machines may work at one. A process shows that it is alive by a lock in the sweep's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import secrets
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from lab import proposals, repetition
from lab import run as runs
from lab.errors import UserError
from lab.plan import Plan
from lab.space import Sweep

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

    def work_left(self) -> Iterator[FrozenTrial]:
        """Trials to train: those that were left, then new ones, until there are enough."""
        yield from self.left()
        while (trial := self.begun()) is not None:
            yield trial

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


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of all processes of this machine that work at a study, this one."""
    with (folder / ".alone").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def presence(folder: Path) -> Iterator[str]:
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
