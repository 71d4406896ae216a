"""What proposes the values of a sweep's trials, and what ends a trial early: Optuna's, by names that recipes say."""

from __future__ import annotations

import inspect
import json
import random
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from typing_extensions import override

from lab.registry import nearest
from lab.space import Axis, Sweep


def drawn(trial: optuna.trial.Trial, axis: Axis) -> Any:
    """A trial's value on an axis; choices are kept as JSON, as they may be anything that a recipe can say."""
    if axis.choices:
        return json.loads(trial.suggest_categorical(axis.path, [json.dumps(choice) for choice in axis.choices]))
    assert axis.low is not None
    assert axis.high is not None
    if axis.whole:
        step = 1 if axis.step is None else int(axis.step)
        return trial.suggest_int(axis.path, int(axis.low), int(axis.high), step=step, log=axis.log)
    return trial.suggest_float(axis.path, axis.low, axis.high, step=axis.step, log=axis.log)


class _Grid(optuna.samplers.BaseSampler):
    """The points of a grid by trials' numbers: none twice, whoever asks."""

    def __init__(self, points: list[dict[str, Any]], axes: dict[str, Axis]) -> None:
        self.points = points
        self.axes = axes

    @override
    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    @override
    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    @override
    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        value = self.points[trial.number % len(self.points)][param_name]
        return json.dumps(value) if self.axes[param_name].choices else value


def sampler(sweep: Sweep, number: int) -> optuna.samplers.BaseSampler:
    """What proposes the values of a trial; what it draws is a function of the trial's number.

    Raises:
        TypeError, ValueError: arguments that it doesn't have.
        ImportError: a package that it needs is missing.
    """
    name, arguments = sweep.sampler
    if name == "grid":
        return _Grid(sweep.grid, {axis.path: axis for axis in sweep.axes})
    seed = random.Random(f"{arguments.get('seed', 0)} {number}").randrange(2**31)
    classes: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
        "tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler, "gp": optuna.samplers.GPSampler,
        "cma_es": optuna.samplers.CmaEsSampler, "qmc": optuna.samplers.QMCSampler,
    }  # fmt: skip
    own = arguments.get("seed", 0) if name == "qmc" else seed  # a sequence is one over all trials
    found: optuna.samplers.BaseSampler = _made(classes[name], {**arguments, "seed": own})
    return found


def pruner(name: str, arguments: dict[str, Any]) -> optuna.pruners.BasePruner:
    """What ends a trial that does badly.

    Raises:
        TypeError, ValueError: arguments that it doesn't have.
    """
    classes: dict[str, Callable[..., optuna.pruners.BasePruner]] = {
        "median": optuna.pruners.MedianPruner, "percentile": optuna.pruners.PercentilePruner,
        "successive_halving": optuna.pruners.SuccessiveHalvingPruner, "hyperband": optuna.pruners.HyperbandPruner,
    }  # fmt: skip
    found: optuna.pruners.BasePruner = _made(classes[name], arguments)
    return found


def _made(factory: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    known = inspect.signature(factory).parameters
    if unknown := [word for word in arguments if word not in known]:
        raise TypeError(f"no argument '{unknown[0]}'{nearest(unknown[0], known)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is experimental
        return factory(**arguments)
