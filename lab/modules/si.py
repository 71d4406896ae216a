"""Synaptic intelligence: a weight is as important as the fall of the loss that its own movement brought.

F. Zenke, B. Poole, S. Ganguli: Continual Learning Through Synaptic Intelligence, ICML 2017, arXiv:1703.04200. While a
task is learnt, with g the gradient of its loss *alone*, without the penalty, and Δθ what a step moves::

    ω ← ω − g · Δθ                                       at every optimizer step
    Ω ← Ω + max(ω, 0) / ((θ_end − θ_begin)² + ξ)         at the task's end, ξ = ``damping``; then ω ← 0
    L_t(θ) + c Σ Ω (θ − θ_end)²                          c = ``strength``, from the second task on

What a task's loss rose by is no importance: ω counts where it is positive.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lab.modules.continual import Anchored
from lab.ranges import NonNegative, Positive, checked


class SI(Anchored):
    """Learns each task while it holds to the weights that brought earlier losses down.

    Args:
        strength: c in the equations above.
        damping: ξ in the equations above, in squared units of the weights.
    """

    path: Tensor
    begin: Tensor

    @checked
    def __init__(self, strength: NonNegative = 0.1, damping: Positive = 0.1, **continual: Any) -> None:
        super().__init__(strength=strength, **continual)
        self.damping = damping
        self.register_buffer("path", torch.zeros_like(self.importance))  # ω
        self.register_buffer("begin", self.weights().detach().clone())  # θ_begin
        self._step: tuple[Tensor, Tensor] | None = None

    def on_before_optimizer_step(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Note the weights, and the gradient without the penalty's."""
        weights = self.weights().detach()
        gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad.detach()).reshape(-1) for p in self.trained()]
        )
        if self.strength and self.task and not self.stream.at_once:
            gradient = gradient - 2 * self.strength * self.importance * (weights - self.anchor)
        self._step = gradient, weights

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add what the step brought."""
        if self._step is not None:
            gradient, weights = self._step
            self.path -= gradient * (self.weights().detach() - weights)
            self._step = None

    def learnt(self, task: int) -> None:
        """Add the task's importances."""
        weights = self.weights().detach()
        self.importance += self.path.clamp(min=0) / ((weights - self.begin).square() + self.damping)
        self.anchor.copy_(weights)
        self.begin.copy_(weights)
        self.path.zero_()
