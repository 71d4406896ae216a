"""How tasks are computed: all of a chunk in one vectorised call, or one after the other; the numbers are the same.

A chunk of one task is a loop. Which chunk is fastest depends on the network, the tasks and the machine: small layers
gain from one call, large convolutions lose, as a vectorised convolution is a grouped one. It is measured once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TURNS = 3
"""How often each is timed, after once for nothing."""
HOPELESS = 1.5
"""How many times slower than the best one is after its first turn to be timed no more."""
PREFERRED = 0.95
"""What part of the loop's time a chunk has to take to be chosen: the loop needs least memory."""
CHECKED, TOLERANCE = 2, 1e-4
"""On how many tasks both ways are compared, and how far apart they may be."""

Measure = Callable[[int, int], Sequence[Tensor]]
"""The gradients of so many tasks, in chunks of a size."""


@dataclass
class Choice:
    """How many tasks at once, and why.

    Args:
        chunk: 1: a loop.
        milliseconds: a task, by chunk, where it was measured.
        because: in words.
    """

    chunk: int
    because: str
    milliseconds: dict[str, float] = field(default_factory=dict)


def disagreement(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference of two lists of gradients, relative to the largest value."""
    largest = max((float(a.abs().max()) for a in one if a.numel()), default=0.0)
    apart = max((float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if a.numel()), default=0.0)
    return apart / largest if largest else apart


def fastest(measure: Measure, tasks: int) -> Choice:
    """The chunk whose tasks take least time.

    Args:
        measure: what is timed.
        tasks: of a batch.
    """
    chunks = sorted({tasks, *(size for size in (16, 4) if size < tasks), 1}, reverse=True)
    spent: dict[int, float] = {}
    for chunk in chunks:
        measure(chunk, chunk)  # for nothing: memory is found, kernels are chosen
        turns = []
        for _ in range(TURNS):
            began = time.perf_counter()
            measure(chunk, chunk)
            turns.append((time.perf_counter() - began) / chunk)
            if spent and turns[0] > HOPELESS * min(spent.values()):
                break
        spent[chunk] = min(turns)
    best = min(spent, key=lambda chunk: spent[chunk])
    if spent[best] > PREFERRED * spent[1]:
        best = 1
    return Choice(best, "measured", {str(chunk): round(1e3 * value, 3) for chunk, value in spent.items()})


def trace(step: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
    """A function of tensors, its gradients included, as one compiled program for arguments of these shapes."""
    from torch.fx.experimental.proxy_tensor import make_fx  # half a second

    compiled: Callable[..., Any] = torch.compile(make_fx(step)(*arguments).forward, **options)
    return compiled
