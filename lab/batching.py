"""The same batch whatever it is trained on: a global batch is shared out among processes and accumulated.

At another size of it, learning rates follow by a rule that the recipe names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lab import nodes
from lab.document import Node
from lab.plan import BATCH_SIZE, Component, Stage, Value, sized
from lab.trainer import processes

RATES = ("lr", "max_lr", "min_lr", "base_lr", "warmup_lr", "eta_min")
"""What optimizers and schedules call rates; what else schedules take is relative to them, or counts steps."""


def shares(total: int, count: int, most: int | None, accumulated: int | None) -> tuple[int, int]:
    """How many samples a process takes at once, and how many times before a step.

    Args:
        total: samples of a step, of all processes together.
        count: processes.
        most: samples that a process can take at once; None: as many as it must.
        accumulated: times before a step that are asked for; None: as few as there can be.

    Raises:
        ValueError: the samples cannot be shared out evenly.
    """
    if most is not None and accumulated is not None:
        raise ValueError(
            "data.batch_size and trainer.accumulate_grad_batches leave nothing to choose: leave one of the three out"
        )
    if total % (count * (accumulated or 1)):
        often = f", {accumulated} times each" if accumulated not in (None, 1) else ""
        raise ValueError(f"{total} samples cannot be shared out evenly among {count} processes{often}")
    each = total // count
    if most is None:
        return each // (accumulated or 1), accumulated or 1
    times = next(times for times in range(-(-each // most), each + 1) if each % times == 0)
    return each // times, times


def settled(stage: Stage) -> Stage:
    """A stage with the width of its launch, and the data, trainer and learning rates that its global batch comes to.

    Raises:
        ValueError: the samples cannot be shared out evenly.
    """
    stage = nodes.filled(stage)
    together = stage.global_batch
    if together is None or (data := sized(stage.data)) is None:
        return stage
    trainer, said = stage.trainer, data.arguments.get(BATCH_SIZE)
    accumulated = trainer.mapping.get("accumulate_grad_batches")
    size, times = shares(
        together.size,
        processes(trainer.plain())[0],
        said.plain() if isinstance(said, Node) else None,
        accumulated.plain() if accumulated is not None else None,
    )
    place = together.place
    return replace(
        stage,
        module=stage.module if together.factor == 1 else _scaled(stage.module, together.factor),
        data=with_size(stage.data, Node(size, place)),
        trainer=replace(trainer, value={**trainer.mapping, "accumulate_grad_batches": Node(times, place)}),
    )


def with_size(data: Component | None, size: Node) -> Component | None:
    """Data, or what they are made of, with so many samples that a process takes at once."""
    if data is None:
        return None
    key, value = (
        (BATCH_SIZE, size) if BATCH_SIZE in data.signature.parameters else ("source", data.arguments.get("source"))
    )
    if isinstance(value, Component):
        value = with_size(value, size)
    assert value is not None
    return replace(data, arguments={**data.arguments, key: value})


def learning_rates(stage: Stage) -> list[float]:
    """Those of the optimizers that a stage's module is given in its recipe."""
    return [
        float(rate.plain())
        for part in stage.module.components()
        if isinstance(part, Component) and part.kind == "optimizers"
        if isinstance(rate := part.arguments.get("lr"), Node)
    ]


def _scaled(component: Component, factor: float) -> Component:
    """A component with the learning rates of all optimizers and schedules in it multiplied."""
    arguments = {name: _scaled_within(value, factor) for name, value in component.arguments.items()}
    if component.kind in ("optimizers", "schedulers"):
        arguments |= {name: _times(rate, factor) for name, rate in _rates(component)}
    return replace(component, arguments=arguments)


def _scaled_within(value: Value, factor: float) -> Value:
    if isinstance(value, Component):
        return _scaled(value, factor)
    if isinstance(value, list):
        return [_scaled_within(child, factor) for child in value]
    if isinstance(value, dict):
        return {name: _scaled_within(child, factor) for name, child in value.items()}
    return value


def _rates(component: Component) -> Iterator[tuple[str, Node]]:
    """The rates that an optimizer or a schedule is given, or has as it comes."""
    for name in RATES:
        said, parameter = component.arguments.get(name), component.signature.parameters.get(name)
        if isinstance(said, Node):
            yield name, said
        elif said is None and parameter is not None and isinstance(parameter.literal, int | float):
            yield name, Node(parameter.literal, component.place)


def _times(rate: Node, factor: float) -> Node:
    """A rate, or one for each group of parameters, multiplied; what is no number stays, for others to refuse."""
    if rate.items:
        return Node([_times(item, factor) for item in rate.items], rate.place, rate.key)
    is_number = isinstance(rate.value, int | float) and not isinstance(rate.value, bool)
    return Node(rate.value * factor, rate.place, rate.key) if is_number else rate  # type: ignore[operator]
