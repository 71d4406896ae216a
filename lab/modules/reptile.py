"""Reptile: weights move towards those that tasks are learnt with.

A. Nichol, J. Achiam, J. Schulman: On First-Order Meta-Learning Algorithms, arXiv:1803.02999, algorithm 2. A task's
weights φ_i come from n = ``inner_steps`` of gradient descent from θ, α = ``inner_lr``, on *all* its samples, support
and query sets alike, ``inner_batch`` of them at a step (all where it is None), one after the other; with T tasks::

    θ ← θ + ε 1/T Σ_i (φ_i − θ)

−(φ − θ) stands for the gradient, so that ε is the optimizer's learning rate with ``sgd``; other optimizers take it as
they take any gradient. There is no loss that it is the gradient of: what is logged is the mean loss over the inner
steps. In evaluation a task is learnt from its support set alone, by ``test_steps`` with all of it each. Departure: the
inner optimizer is plain gradient descent, in the paper Adam without momentum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab.batch import Episodes, Labelled
from lab.few_shot import losses_of
from lab.functional import Weights
from lab.modules.maml import MAML, network_parameters
from lab.ranges import Count, Positive, checked


class Reptile(MAML):
    """Moves weights towards those of the tasks, without a gradient of a gradient.

    Args:
        inner_lr: α.
        inner_steps: n in training.
        test_steps: n in validation, test and prediction; ``inner_steps`` where it is None.
        inner_batch: samples of each inner step in training; all of a task's where it is None.
    """

    @checked
    def __init__(
        self,
        inner_lr: Positive = 0.01,
        inner_steps: Count = 5,
        test_steps: Count | None = None,
        *,
        inner_batch: Count | None = None,
        **meta_learner: Any,
    ) -> None:
        super().__init__(inner_lr=inner_lr, inner_steps=inner_steps, test_steps=test_steps, **meta_learner)
        self.inner_batch = inner_batch

    def given(self, parameters: Weights, batch: Episodes, *extra: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The sum over tasks of the mean loss of the inner steps, and of −(φ − θ)."""
        inputs = torch.cat([batch.support.inputs, batch.query.inputs], 1)
        targets = torch.cat([batch.support.targets, batch.query.targets], 1)
        names = [name for name, _ in network_parameters(self.network, self.adapts)]
        start = {name: parameters[f"network.{name}"].detach() for name in names}
        theta = {name: weight.expand(len(batch), *weight.shape) for name, weight in start.items()}
        size = min(self.inner_batch or inputs.shape[1], inputs.shape[1])
        total = inputs.new_zeros(())
        for step in range(self.inner_steps):
            which = torch.arange(step * size, (step + 1) * size, device=inputs.device) % inputs.shape[1]
            part = Labelled(inputs[:, which], targets[:, which])
            theta = {name: weight.detach().requires_grad_() for name, weight in theta.items()}
            outputs = self.support_outputs(parameters, theta, Episodes(part, part))
            loss = losses_of(self.objective, outputs, part.targets).sum()
            gradients = torch.autograd.grad(loss, list(theta.values()), allow_unused=True, materialize_grads=True)
            theta = {
                name: weight - self.inner_lr * gradient
                for (name, weight), gradient in zip(theta.items(), gradients, strict=True)
            }
            total = total + loss.detach() / self.inner_steps
        moved = {f"network.{name}": (start[name] - theta[name].detach()).sum(0) for name in names}
        return total, [moved[name] for name in self._trainable]
