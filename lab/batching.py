"""The same batch whatever it is trained on: a global batch is shared out among processes and accumulated."""

from __future__ import annotations

from dataclasses import replace

from lab import nodes
from lab.document import Node
from lab.plan import BATCH_SIZE, Component, Stage, sized
from lab.trainer import processes


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
    """A stage whose trainer has the launch's width, and whose data and trainer have what its global batch comes to.

    Raises:
        ValueError: the samples cannot be shared out evenly.
    """
    stage = nodes.filled(stage)
    if stage.global_batch is None or (data := sized(stage.data)) is None:
        return stage
    trainer, said = stage.trainer, data.arguments.get(BATCH_SIZE)
    accumulated = trainer.mapping.get("accumulate_grad_batches")
    size, times = shares(
        int(stage.global_batch.plain()),
        processes(trainer.plain())[0],
        said.plain() if isinstance(said, Node) else None,
        accumulated.plain() if accumulated is not None else None,
    )
    place = stage.global_batch.place
    return replace(
        stage,
        data=_with_size(stage.data, Node(size, place)),
        trainer=replace(trainer, value={**trainer.mapping, "accumulate_grad_batches": Node(times, place)}),
    )


def _with_size(data: Component | None, size: Node) -> Component | None:
    if data is None:
        return None
    key, value = (
        (BATCH_SIZE, size) if BATCH_SIZE in data.signature.parameters else ("source", data.arguments.get("source"))
    )
    if isinstance(value, Component):
        value = _with_size(value, size)
    assert value is not None
    return replace(data, arguments={**data.arguments, key: value})
