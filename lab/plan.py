"""What a recipe means: stages, the components that they are built from, and where their networks come from.

A plan is data. :mod:`lab.check` makes it, statically, from a recipe; :mod:`lab.build` makes objects of it; written
out again (:meth:`Plan.resolved`) it is the recipe that a run keeps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lab.document import Node, Place
from lab.files import OR_NAME, located
from lab.gates import Gate
from lab.recipe import INHERITED, ONLY_STAGE
from lab.registry import Entry
from lab.signature import Signature
from lab.source import MISSING
from lab.space import Sweep

BATCH_SIZE = "batch_size"
"""The argument of data that says how many samples a process takes at once."""

RULES: dict[str, Callable[[float], float]] = {"linear": float, "sqrt": math.sqrt}
"""What a learning rate is multiplied by where a step has k times the samples.

``linear``: P. Goyal et al.: Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, 2017, arXiv:1706.02677,
section 2.1. ``sqrt``: A. Krizhevsky: One weird trick for parallelizing convolutional neural networks, 2014,
arXiv:1404.5997, section 5; of Adam S. Malladi et al.: On the SDEs and Scaling Rules for Adaptive Gradient Algorithms,
NeurIPS 2022, arXiv:2205.10330 (where β and ε change too, which stay here).
"""

Value: TypeAlias = "Component | From | list[Value] | dict[str, Value] | Node"

FROM_OPTIONS = {"checkpoint": ("best", "last"), "head": ("keep", "reset")}
"""What may stand beside ``from:``; the first is the default."""


@dataclass(frozen=True)
class From:
    """``{from: X}``: the network of another stage, or of a run.

    Args:
        source: the stage, or ``RUN/stage``.
        path: where in the stage it stands.
        checkpoint: ``best`` or ``last``.
        head: ``keep`` it, or ``reset`` it to the data's classes.
        folder: what a run's path is relative to.
        frozen: whether the parameter wants a ``Teacher``.
    """

    source: str
    place: Place
    path: tuple[str, ...]
    checkpoint: str = "best"
    head: str = "keep"
    folder: Path = Path()
    frozen: bool = False

    def plain(self, folder: Path | None = None) -> dict[str, str]:
        """As a recipe in ``folder`` says it."""
        options = {"checkpoint": self.checkpoint, "head": self.head}
        is_path = folder is not None and (self.folder / self.source).exists() and "/" in self.source
        source = os.path.relpath(self.folder / self.source, folder) if is_path else self.source
        return {"from": source, **{k: v for k, v in options.items() if v != FROM_OPTIONS[k][0]}}


@dataclass(frozen=True)
class Component:
    """A registered class and the arguments that the recipe gives it.

    Args:
        path: where in the stage it stands, such as ``("module", "network")``.
        arguments: what the recipe says; components and references found, everything else as it was read.
        filled: parameters that the recipe leaves out and lab fills, and from where.
        frozen: whether the parameter wants a ``Teacher``.
    """

    kind: str
    entry: Entry
    signature: Signature
    place: Place
    path: tuple[str, ...]
    arguments: dict[str, Value]
    filled: dict[str, str]
    frozen: bool = False

    @property
    def name(self) -> str:
        """The registered name."""
        return self.entry.name

    def plain(self, folder: Path | None = None) -> dict[str, Any]:
        """As a recipe says it, the literal defaults of its parameters included; what lab fills is left out.

        Args:
            folder: where the recipe will lie; paths become relative to there. Without it they stay as they were said.
        """
        result: dict[str, Any] = {"name": self.name}
        for name, parameter in self.signature.parameters.items():
            if name in self.arguments:
                is_path = any(dotted.endswith("pathlib.Path") for dotted in parameter.names)
                result[name] = _plain(self.arguments[name], folder, is_path, OR_NAME in parameter.names)
            elif name not in self.filled and parameter.literal is not MISSING:
                result[name] = list(parameter.literal) if isinstance(parameter.literal, tuple) else parameter.literal
        unknown = {name: value for name, value in self.arguments.items() if name not in self.signature.parameters}
        return {**result, **{name: _plain(value, folder, False) for name, value in unknown.items()}}

    def components(self) -> Iterator[Component | From]:
        """This component and everything nested in it, children first."""
        for value in self.arguments.values():
            yield from _components(value)
        yield self


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of a step, of all processes together.

    Args:
        rule: by which learning rates follow it; None: they are as the recipe says.
        base_size: the samples of a step that the recipe's learning rates are for.
    """

    size: int
    place: Place
    rule: str | None = None
    base_size: int | None = None

    @property
    def factor(self) -> float:
        """What learning rates are multiplied by."""
        if self.rule is None or self.base_size is None:
            return 1.0
        return RULES[self.rule](self.size / self.base_size)

    def plain(self) -> int | dict[str, Any]:
        """As a recipe says it."""
        if self.rule is None:
            return self.size
        return {"size": self.size, "scale_lr": self.rule, "base_size": self.base_size}


@dataclass(frozen=True)
class Stage:
    """One stage of a plan; everything that its training is built from."""

    name: str
    seed: int
    module: Component
    data: Component | None
    trainer: Node
    callbacks: dict[str, Component | None]
    loggers: list[Component]
    gates: list[Gate]
    global_batch: GlobalBatch | None = None
    """``lab.batching`` shares it out, and has learning rates follow it."""

    @property
    def parents(self) -> list[str]:
        """The stages that this one takes networks from: that of its own network first, then its teachers'."""
        sources = [c for c in self.module.components() if isinstance(c, From) and "/" not in c.source]
        return list(dict.fromkeys(c.source for c in sorted(sources, key=lambda c: c.frozen)))

    def components(self) -> Iterator[Component | From]:
        """Every component and reference of the stage, children first."""
        for component in (self.data, self.module, *self.callbacks.values(), *self.loggers):
            if component is not None:
                yield from component.components()

    def plain(self, folder: Path | None = None) -> dict[str, Any]:
        """As a recipe says it."""
        result: dict[str, Any] = {"seed": self.seed}
        if self.data is not None:
            result["data"] = self.data.plain(folder)
        if self.global_batch is not None:
            result["global_batch_size"] = self.global_batch.plain()
            _without_default(self.data, result.get("data"))  # said, it would be the most at once
        result["module"] = self.module.plain(folder)
        if self.trainer.mapping:
            result["trainer"] = self.trainer.plain()
        if self.callbacks:
            result["callbacks"] = {name: c.plain(folder) if c else None for name, c in self.callbacks.items()}
        if self.loggers:
            loggers = [logger.plain(folder) for logger in self.loggers]
            result["logger"] = loggers if len(loggers) > 1 else loggers[0]
        if self.gates:
            result["require"] = {gate.metric: str(gate) for gate in self.gates}
        return result


@dataclass(frozen=True)
class Plan:
    """A recipe that is statically right.

    Args:
        stages: in dependency order.
        sweep: what ``lab sweep`` looks for; a run of its own has none.
    """

    name: str
    description: str
    stages: dict[str, Stage]
    gates: dict[str, list[Gate]] = field(default_factory=dict)
    sweep: Sweep | None = None

    def resolved(self, folder: Path | None = None) -> dict[str, Any]:
        """The whole recipe as plain data that runs again: merged, with literal defaults, what is shared said once.

        Args:
            folder: where it will lie; paths in it become relative to there. Without it they stay as they were said.
        """
        result: dict[str, Any] = {"description": self.description} if self.description else {}
        if list(self.stages) == [ONLY_STAGE]:
            return {**result, **self.stages[ONLY_STAGE].plain(folder)}
        stages = {name: stage.plain(folder) for name, stage in self.stages.items()}
        first = next(iter(stages.values()))
        shared = [
            key for key in INHERITED if key in first and all(stage.get(key) == first[key] for stage in stages.values())
        ]
        own = {name: {k: v for k, v in stage.items() if k not in shared} for name, stage in stages.items()}
        return {**result, **{key: first[key] for key in shared}, "stages": own}


def sized(data: Component | None) -> Component | None:
    """The data that a batch size is given to: these, or what a stream is made of; None where nothing has one."""
    if data is None or BATCH_SIZE in data.signature.parameters:
        return data
    source = data.arguments.get("source")
    return sized(source) if isinstance(source, Component) else None


def _without_default(data: Value | None, plain: Any) -> None:
    """Drop the batch size that data have by default from data as a recipe says them."""
    if isinstance(data, Component) and isinstance(plain, dict):
        if BATCH_SIZE not in data.arguments:
            plain.pop(BATCH_SIZE, None)
        _without_default(data.arguments.get("source"), plain.get("source"))


def _components(value: Value) -> Iterator[Component | From]:
    if isinstance(value, Component):
        yield from value.components()
    elif isinstance(value, From):
        yield value
    elif isinstance(value, list | dict):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _components(child)


def _plain(value: Value, folder: Path | None, is_path: bool, or_name: bool = False) -> Any:
    if isinstance(value, Component | From):
        return value.plain(folder)
    if isinstance(value, dict):
        return {key: _plain(child, folder, is_path) for key, child in value.items()}
    if isinstance(value, list):
        return [_plain(child, folder, is_path) for child in value]
    if is_path and folder is not None and isinstance(value.value, str):
        found = located(value.value, value.place.folder, or_name=or_name)
        return os.path.relpath(found, folder) if isinstance(found, Path) else found
    if is_path and value.items:
        return [_plain(child, folder, is_path) for child in value.items]
    return value.plain()
