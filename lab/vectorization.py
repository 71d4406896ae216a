"""How tasks are computed: all of a chunk in one vectorised call, or one after the other; the numbers are the same.

A chunk of one task is a loop. Which chunk is fastest depends on the network, the tasks and the machine: small layers
gain from one call, large convolutions lose, as a vectorised convolution is a grouped one. It is measured once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lab.batch import Episodes, Labelled
from lab.errors import UserError
from lab.functional import Weights

TURNS = 3
"""How often each is timed, after once for nothing."""
HOPELESS = 1.5
"""How many times slower than the best one is after its first turn to be timed no more."""
PREFERRED = 0.95
"""What part of the loop's time a chunk has to take to be chosen: the loop needs least memory."""
CHECKED, TOLERANCE = 2, 1e-4
"""On how many tasks both ways are compared, and how far apart they may be."""

Tensors: TypeAlias = Sequence[Tensor]
Step: TypeAlias = Callable[[Weights, Tensors, Tensors, int], tuple[Tensor, list[Tensor]]]
Measure: TypeAlias = Callable[[int, int], Tensors]
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


class Execution:
    """Has steps of a batch of tasks computed in chunks, compiled if asked to.

    Args:
        step: a chunk's part of the mean loss and gradients, of weights, ``(support inputs, support targets, query
            inputs, query targets)``, other tensors, and how many tasks the means are over.
        way: ``vmap``, ``loop``, or ``auto``, as is fastest.
        chunk_size: tasks in one call, at most.
    """

    def __init__(self, step: Step, way: Literal["auto", "vmap", "loop"], chunk_size: int | None) -> None:
        self.step = step
        self.way = way
        self.chunk_size = chunk_size
        self._options: dict[str, Any] | None = None
        self._programs: dict[Any, Any] = {}

    def compile(self, options: dict[str, Any] | None) -> None:
        """Compile steps by ``torch.compile``'s options from now on; None: no more."""
        self._options = options
        self._programs.clear()

    @property
    def compiles(self) -> bool:
        """Whether it does."""
        return self._options is not None

    def means(
        self, weights: Weights, batch: Episodes, extra: Tensors, chunk: int, *, mode: bool | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean loss and gradients of a batch, ``chunk`` tasks at a time.

        Args:
            mode: whether units are dropped; None: never compiled.
        """
        total: Tensor | None = None
        gradients: list[Tensor] = []
        for begin in range(0, len(batch), chunk):
            part = batch[begin : begin + chunk] if len(batch) > chunk else batch
            tensors = (part.support.inputs, part.support.targets, part.query.inputs, part.query.targets)
            if self._options is None or mode is None:
                loss, found = self.step(weights, tensors, extra, len(batch))
            else:
                loss, found = self._program(weights, tensors, extra, len(batch), mode)
            total = loss if total is None else total + loss
            if gradients:
                torch._foreach_add_(gradients, found)
            else:
                gradients = list(found)
        assert total is not None
        return total, gradients

    def decided(self, weights: Weights, batch: Episodes, extra: Tensors) -> Choice:
        """How many tasks at once.

        Raises:
            UserError: in one call, as was asked for, the network's gradients are wrong or cannot be had.
        """
        whole = min(len(batch), self.chunk_size or len(batch))
        if self.way == "loop" or whole == 1:
            return Choice(1, "execution: loop" if self.way == "loop" else "one task a batch")
        batch = cloned(batch)

        def measure(tasks: int, chunk: int) -> Tensors:
            return self.means(weights, batch[:tasks], extra, chunk)[1]

        with torch.inference_mode(mode=False), torch.random.fork_rng(devices=()):
            wrong = self._difference(weights, batch, extra)
            if wrong and self.way == "vmap":
                raise UserError(f"execution: vmap does not fit this network: {wrong}; execution: loop does")
            if wrong:
                rank_zero_warn(f"tasks are computed one by one: {wrong}")
                return Choice(1, wrong)
            if self.way == "vmap":
                return Choice(whole, "execution: vmap")
            return fastest(measure, whole)

    def _difference(self, weights: Weights, batch: Episodes, extra: Tensors) -> str | None:
        """Why tasks of this network cannot be computed in one call; None: they can.

        A layer whose vectorised gradients are wrong, as torch has had several, is found here, not in the results.
        """
        wide = (
            torch.float32 if batch.support.inputs.device.type == "mps" else torch.float64
        )  # rounding is no difference

        def widened(tensor: Tensor) -> Tensor:
            return tensor.to(wide) if tensor.is_floating_point() else tensor

        some = batch[:CHECKED]
        parts = [(widened(part.inputs), widened(part.targets)) for part in (some.support, some.query)]
        precise = Episodes(*(Labelled(*part) for part in parts))
        weights, extra = {name: widened(tensor) for name, tensor in weights.items()}, tuple(map(widened, extra))
        try:
            alone, together = (self.means(weights, precise, extra, chunk)[1] for chunk in (1, CHECKED))
        except RuntimeError as cause:
            return str(cause).strip().splitlines()[0]
        off = disagreement(alone, together)
        return None if off <= TOLERANCE else f"its vectorised gradients are off by {off:.1e} of the largest"

    def _program(
        self, weights: Weights, tensors: Tensors, extra: Tensors, total: int, mode: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The same step, compiled; anew for tensors of other shapes."""
        key = *(tensor.shape for tensor in (*tensors, *extra)), tensors[0].dtype, total, mode
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._compiled(weights, tensors, extra, total)
        found: tuple[Tensor, list[Tensor]] = program(*weights.values(), *tensors, *extra)
        return found

    def _compiled(self, weights: Weights, tensors: Tensors, extra: Tensors, total: int) -> Any:
        from torch.fx.experimental.proxy_tensor import make_fx  # half a second

        names, count = list(weights), len(weights)

        def flat(*given: Tensor) -> tuple[Tensor, list[Tensor]]:
            named = dict(zip(names, given[:count], strict=True))
            return self.step(named, given[count : count + 4], given[count + 4 :], total)

        assert self._options is not None
        given = (*weights.values(), *tensors, *extra)
        try:
            program = torch.compile(make_fx(flat)(*given).forward, **self._options)
            program(*given)
        except Exception as cause:  # whatever compilers raise
            raise UserError(
                f"the step cannot be compiled: {type(cause).__name__}: {str(cause).strip().splitlines()[0]}; "
                "`callbacks: {compile: null}` trains without, and numbers are the same (on CPUs a C++ compiler such as "
                "g++ is needed)"
            ) from cause
        return program


def cloned(batch: Episodes) -> Episodes:
    """A batch that gradients can be found with, wherever it was made."""

    def one(part: Labelled) -> Labelled:
        index, task = (None if value is None else value.clone() for value in (part.index, part.task))
        return Labelled(part.inputs.clone(), part.targets.clone(), index, task)

    with torch.inference_mode(mode=False):
        return Episodes(one(batch.support), one(batch.query))
