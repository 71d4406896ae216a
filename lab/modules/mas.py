"""Memory aware synapses: a weight is important if the network's answers depend on it; no labels are needed.

R. Aljundi, F. Babiloni, M. Elhoseiny, M. Rohrbach, T. Tuytelaars: Memory Aware Synapses, ECCV 2018, arXiv:1711.09601.
With the network's outputs f on a task's N training samples x, λ = ``strength``::

    Ω ← Ω + 1/N Σ_x |∂ ‖f(x)‖² / ∂θ|                     at the task's end
    L_t(θ) + λ Σ Ω (θ − θ*_{t−1})²                       from the second task on
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab.distributed import summed
from lab.importance import per_sample
from lab.modules.continual import Anchored
from lab.ranges import NonNegative, checked


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
        with self.evaluating():
            for batch in self.on_device("train", range(task, task + 1)):
                active = self.active(batch.task)

                def length(outputs: Tensor, active: Tensor | None = active) -> Tensor:
                    return (outputs if active is None else outputs * active).square().flatten(1).sum(1)

                total += self.vector(per_sample(self.network, length, batch.inputs, power=1))
                count += len(batch)
        total, count = summed(total, count)
        self.importance += total / count
        self.anchor.copy_(self.weights().detach())
