"""What a recipe says of a sweep: which figure is to be best, over which values of which keys, and how they are chosen.

::

    sweep:
      maximize: student.val/accuracy      # or `minimize`; a stage's figure, of the only stage `val/accuracy`
      trials: 20
      space:
        module.optimizer.lr: {low: 1e-4, high: 1e-1, log: true}
        stages.student.module.temperature: {low: 1, high: 8}
        module.network: [{name: mlp, hidden: [64]}, {name: convnet, width: 8}]

A key of the space is what an override's would be. Whole numbers as ends make an axis of whole numbers. Nothing here
imports Optuna.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lab.document import Node, Place, Problem, RecipeError
from lab.recipe import ONLY_STAGE, kind_of, shown
from lab.registry import nearest

KEYS = ("maximize", "minimize", "trials", "seeds", "sampler", "pruner", "space")
ENDS = ("low", "high", "log", "step")
SAMPLERS = ("tpe", "random", "grid", "gp", "cma_es", "qmc")
PRUNERS = ("median", "percentile", "successive_halving", "hyperband")
MOST_TRIALS, MOST_SEEDS = 100_000, 1000


@dataclass(frozen=True)
class Axis:
    """One key of a space.

    Args:
        path: what an override's would be.
        low: the least value; None where there are choices.
        high: the largest.
        log: whether magnitudes are drawn evenly, not values.
        step: how far values are apart; None: any.
        choices: the values, any that a recipe can say.
        whole: whether values are whole numbers.
    """

    path: str
    place: Place
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    whole: bool = False

    @property
    def examples(self) -> list[Any]:
        """Values that show whether all of them are right: the choices, or both ends."""
        return list(self.choices) if self.choices else [self.low, self.high]

    @property
    def points(self) -> list[Any]:
        """The values of a grid.

        Raises:
            ValueError: they cannot be counted.
        """
        if self.choices:
            return list(self.choices)
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            raise ValueError(f"{self.path} has no step: a grid needs choices, whole numbers or a step")
        assert self.low is not None
        assert self.high is not None
        return [self.low + i * step for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]

    def override(self, value: Any) -> str:
        """What sets it, as on the command line."""
        return f"{self.path}={json.dumps(value)}"


@dataclass(frozen=True)
class Sweep:
    """A sweep as a recipe says it.

    Args:
        metric: of the stage, as ``results.json`` names it.
        stage: whose.
        maximize: whether more is better.
        trials: how many.
        seeds: runs a trial, whose mean counts.
        sampler: an entry of ``SAMPLERS``, with arguments of Optuna's class.
        pruner: one of ``PRUNERS`` likewise; None: every trial is trained to its end.
    """

    metric: str
    stage: str
    maximize: bool
    axes: tuple[Axis, ...]
    trials: int = 20
    seeds: int = 1
    sampler: tuple[str, dict[str, Any]] = ("tpe", {})
    pruner: tuple[str, dict[str, Any]] | None = None
    place: Place = field(default_factory=lambda: Place("sweep"))

    @property
    def goal(self) -> str:
        """The figure in words."""
        return self.metric if self.stage == ONLY_STAGE else f"{self.stage}.{self.metric}"

    @property
    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the axes' values, for the sampler ``grid``."""
        found: list[dict[str, Any]] = [{}]
        for axis in self.axes:
            found = [{**one, axis.path: value} for one in found for value in axis.points]
        return found

    def identity(self) -> dict[str, Any]:
        """What makes two sweeps the same: all but how many trials there are to be."""
        axes = [{**vars(axis), "place": None} for axis in self.axes]
        return {**vars(replace(self, axes=())), "place": None, "trials": None, "axes": axes}


def read(node: Node, stages: Sequence[str]) -> Sweep:
    """A recipe's ``sweep``.

    Args:
        stages: the recipe's, in the order in which they are trained.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    if not node.mapping:
        raise RecipeError([Problem(node.place, "sweep", f"expected a mapping, got {kind_of(node)}")])
    said, problems = node.mapping, _unknown(node, KEYS, "sweep")

    def taken(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except RecipeError as cause:
            problems.extend(cause.problems)
            return None

    space = said.get("space", node)
    if space is node or not space.mapping:
        problems.append(Problem(space.key or space.place, "sweep.space", "say which keys take which values"))
    found = {
        "goal": taken(_goal, node, stages),
        "trials": taken(_count, said.get("trials"), "trials", MOST_TRIALS),
        "seeds": taken(_count, said.get("seeds"), "seeds", MOST_SEEDS),
        "sampler": taken(_named, said.get("sampler"), SAMPLERS, "sampler"),
        "pruner": taken(_named, said.get("pruner"), PRUNERS, "pruner"),
        "axes": [taken(_axis, path, child) for path, child in space.mapping.items()] if space is not node else [],
    }
    if problems:
        raise RecipeError(problems)
    stage, metric, maximize = found["goal"]
    given = {key: found[key] for key in ("trials", "seeds", "sampler", "pruner") if found[key] is not None}
    sweep = Sweep(metric, stage, maximize, tuple(found["axes"]), **given, place=node.key or node.place)
    return _counted(sweep, said["sampler"], "trials" in given) if sweep.sampler[0] == "grid" else sweep


def _counted(sweep: Sweep, said: Node, limited: bool) -> Sweep:
    """A grid's sweep, which has as many trials as there are points, unless it is to have fewer."""
    try:
        points = math.prod(len(axis.points) for axis in sweep.axes)
    except ValueError as cause:
        raise RecipeError([Problem(said.place, "sweep.sampler", str(cause))]) from cause
    if points > MOST_TRIALS:
        raise RecipeError([Problem(said.place, "sweep.sampler", f"{points:,} points: {MOST_TRIALS:,} at most")])
    return replace(sweep, trials=min(points, sweep.trials) if limited else points)


def misfits(sweep: Sweep, sound: Callable[[str], None]) -> Iterator[Problem]:
    """What is wrong with the values of a space in its recipe.

    Args:
        sound: checks the recipe with an override; raises RecipeError.
    """
    for axis in sweep.axes:
        for value in axis.examples:
            try:
                sound(axis.override(value))
            except RecipeError as cause:
                for problem in cause.problems:
                    mine = problem.place.source.startswith("override ")
                    yield replace(
                        problem, place=axis.place if mine else problem.place, key=f"sweep.space.{axis.path}",
                        message=f"{problem.message} (with {shown(value)})",
                    )  # fmt: skip
                break


def _unknown(node: Node, known: Sequence[str], prefix: str) -> list[Problem]:
    return [
        Problem(child.key or child.place, f"{prefix}.{key}", f"unknown key{nearest(key, known)}")
        for key, child in node.mapping.items()
        if key not in known
    ]


def _goal(node: Node, stages: Sequence[str]) -> tuple[str, str, bool]:
    """The stage and its figure, and whether more of it is better."""
    goals = [key for key in ("maximize", "minimize") if key in node.mapping]
    if len(goals) != 1:
        said = "say either `maximize: METRIC` or `minimize: METRIC`"
        raise RecipeError([Problem(node.key or node.place, "sweep", said)])
    figure, key = node.mapping[goals[0]], f"sweep.{goals[0]}"
    if not isinstance(figure.value, str) or not figure.value:
        raise RecipeError([_wrong(figure, key, "a metric such as val/accuracy")])
    stage, dot, metric = figure.value.partition(".")
    if not dot:
        return (stages[-1] if stages else ONLY_STAGE), figure.value, goals == ["maximize"]
    if stage not in stages:
        known = [name for name in stages if name != ONLY_STAGE]
        raise RecipeError([Problem(figure.place, key, f"no stage named '{stage}'{nearest(stage, known)}")])
    return stage, metric, goals == ["maximize"]


def _count(said: Node | None, key: str, most: int) -> int | None:
    if said is None:
        return None
    if type(said.value) is not int or not 1 <= said.value <= most:
        raise RecipeError([_wrong(said, f"sweep.{key}", f"a whole number from 1 to {most:,}")])
    return said.value


def _named(said: Node | None, names: Sequence[str], key: str) -> tuple[str, dict[str, Any]] | None:
    if said is None or said.value is None:
        return None
    name = said.value if isinstance(said.value, str) else said.mapping.get("name", said).value
    if not isinstance(name, str) or name not in names:
        raise RecipeError([Problem(said.place, f"sweep.{key}", f"no {key} named {shown(name)}{_of(name, names)}")])
    return name, {word: child.plain() for word, child in said.mapping.items() if word != "name"}


def _of(name: Any, names: Sequence[str]) -> str:
    hint = nearest(str(name), names)
    return hint if "did you mean" in hint else f": {', '.join(names)}"


def _axis(path: str, said: Node) -> Axis:
    key, place = f"sweep.space.{path}", said.key or said.place
    if not all(path.split(".")) or path.partition(".")[0] in ("seed", "sweep", "extends", "description", "require"):
        raise RecipeError([Problem(place, key, "a path into data, module, trainer, callbacks or stages")])
    if isinstance(said.value, list):
        choices = tuple(said.plain())
        if len(choices) < 2 or len({json.dumps(choice) for choice in choices}) < len(choices):
            raise RecipeError([_wrong(said, key, "two different values at least")])
        return Axis(path, place, choices=choices)
    if not said.mapping:
        raise RecipeError([_wrong(said, key, "a list of values, or {low: 1e-4, high: 1e-1, log: true}")])
    problems = _unknown(said, ENDS, key)
    values = {word: child.value for word, child in said.mapping.items()}
    problems += [
        _wrong(said.mapping.get(word, said), f"{key}.{word}", "a finite number")
        for word in ("low", "high", "step")
        if not (_number(values.get(word)) or (word == "step" and word not in values))
    ]
    if not isinstance(values.get("log", False), bool):
        problems.append(_wrong(said.mapping["log"], f"{key}.log", "true or false"))
    if problems:
        raise RecipeError(problems)
    low, high, step, log = values["low"], values["high"], values.get("step"), bool(values.get("log", False))
    wrong = (
        f"low {low} is not below high {high}" if low >= high  # type: ignore[operator]  # numbers, as seen above
        else f"step {step} is not above 0" if step is not None and step <= 0  # type: ignore[operator]
        else f"log needs low above 0, got {low}" if log and low <= 0  # type: ignore[operator]
        else "either log or step" if log and step is not None
        else None
    )  # fmt: skip
    if wrong:
        raise RecipeError([Problem(place, key, wrong)])
    whole = all(isinstance(value, int) for value in (low, high, step) if value is not None)
    return Axis(path, place, low, high, log, step, whole=whole)  # type: ignore[arg-type]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(said: Node, key: str, allowed: str) -> Problem:
    return Problem(said.place, key, f"expected {allowed}, got {kind_of(said) if said.mapping else shown(said.plain())}")
