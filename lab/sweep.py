"""Many runs of one recipe that look for its best values: Optuna proposes them, and keeps what came of them.

A sweep is a study in a storage (SQLite beside the runs, or any that Optuna knows), which several processes and machines
may work on together. Its trials are ordinary runs that share a group. Each is trained in a process of its own; one that
was left in the middle, however that came, is taken up by the next ``lab sweep`` of the same recipe and goes on exactly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

from lab import proposals, recipe
from lab import run as runs
from lab.callbacks import Lean
from lab.check import check
from lab.document import Problem, RecipeError
from lab.errors import UserError
from lab.fresh import Fresh
from lab.gates import figure
from lab.jobs import asked, resume, spread, told, workers
from lab.plan import Plan
from lab.recipe import shown
from lab.run import ENDED, Run
from lab.space import Sweep, misfits
from lab.study import ERROR, RUNS, Sweeping, Work, presence
from lab.trainer import processes
from lab.types import check_types

STUDY = "study.db"


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
        sweeping = Sweeping(work, held.enter_context(presence(work.folder)))
        held.callback(sweeping.leave)
        found = held.enter_context(workers("lab.sweep", jobs))
        for line in spread(found, sweeping.work_left(), partial(train, sweeping)):
            tell(line)
    return sweeping


def train(sweeping: Sweeping, worker: Fresh, trial: FrozenTrial) -> str:
    """Train a trial's runs, or what is left of them, and tell the study what came of it; a line that says so.

    Raises:
        UserError: a run's results do not have the figure.
    """
    work, began = sweeping.work, time.monotonic()
    figures, pruned = [], False
    for number, folder in enumerate(trial.user_attrs[RUNS]):
        this = Run(work.folder.parent / folder)
        ended = this.status in ENDED
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
    """Train a trial's run, or what is left of it, as :func:`lab.jobs.asked` says; a pruner may watch."""
    resume(arguments, _watching)


def _watching(this: Run, report: dict[str, Any] | None) -> list[Callback]:
    if report is None:
        return []
    pruner = proposals.pruner(*report["pruner"])
    study = optuna.load_study(study_name=report["study"], storage=report["storage"], pruner=pruner)
    return [Reports(optuna.trial.Trial(study, report["trial"]), this, report["stage"], report["metric"])]


def _asked(sweeping: Sweeping, trial: FrozenTrial, this: Run, *, first: bool) -> str:
    """What :func:`main` is asked; the first of a trial's runs is the one that a pruner judges."""
    work, report = sweeping.work, None
    if work.sweep.pruner is not None and first:
        report = {
            "storage": work.storage, "study": work.name, "trial": trial._trial_id, "pruner": work.sweep.pruner,
            "stage": work.sweep.stage, "metric": work.sweep.metric,
        }  # fmt: skip
    return asked(this, work.imports, report)
