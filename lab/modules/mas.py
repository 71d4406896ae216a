"""Memory aware synapses: a weight is important if the network's answers depend on it; no labels are needed.

R. Aljundi, F. Babiloni, M. Elhoseiny, M. Rohrbach, T. Tuytelaars: Memory Aware Synapses, ECCV 2018, arXiv:1711.09601.
With the network's outputs f on a task's N training samples x, λ = ``strength``::

    Ω ← Ω + 1/N Σ_x |∂ ‖f(x)‖² / ∂θ|                     at the task's end
    L_t(θ) + λ Σ Ω (θ − θ*_{t−1})²                       from the second task on
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lab.distributed import summed
from lab.importance import per_sample
from lab.modules.continual import Anchored
from lab.ranges import NonNegative, checked


def squared_lengths(active: Tensor | None, outputs: Tensor, places: Tensor) -> Tensor:
    """‖f(x)‖², ``[b]``, over the outputs that are active.

    Args:
        active: ``[K]``, or ``[B, K]`` of the batch's samples; None: all.
        outputs: ``[b, K]``.
        places: ``[b]`` in the batch.
    """
    if active is not None:
        outputs = outputs * (active if active.ndim == 1 else active[places])
    return outputs.square().flatten(1).sum(1)


class MAS(Anchored):
    """Learns each task while it holds to the weights that its answers depend on.

    Args:
        strength: λ in the equations above.
    """

    @checked
    def __init__(self, strength: NonNegative = 1.0, **continual: Any) -> None:
        super().__init__(strength=strength, **continual)

    def learnt(self, task: int) -> None:
        """Add the task's importances."""
        total, count = torch.zeros_like(self.importance), 0
        for batch in self.on_device("train", range(task, task + 1)):
            losses = partial(squared_lengths, self.active(batch.task))
            total += self.vector(per_sample(self.network, losses, batch.inputs, power=1))
            count += len(batch)
        total, count = summed(total, count)
        self.importance += total / count
        self.anchor.copy_(self.weights().detach())
