"""Learning without forgetting: the network of the tasks before teaches the new one to answer as it did.

Z. Li and D. Hoiem: Learning without Forgetting, ECCV 2016, arXiv:1606.09282. With the logits z of the network, those z°
of the network as it was when the task began, on the *new* task's samples, T = ``temperature`` and λ = ``strength``::

    L_t(θ) + λ T² · KL(softmax(z° / T) ‖ softmax(z / T))

over the outputs of the tasks before, where tasks have outputs of their own: in the scenario ``task`` for each of those
tasks apart.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lab.batch import Labelled
from lab.modules.continual import Continual
from lab.modules.distill import distillation_loss
from lab.modules.supervised import Terms
from lab.objectives.classification import Classification
from lab.ranges import NonNegative, Positive, checked


class LwF(Continual):
    """Learns each task while it answers as it did before.

    Args:
        strength: λ in the equation above.
        temperature: T in the equation above.

    Raises:
        ValueError: the objective is no classification.
    """

    unsharded = "the network as it was is kept whole beside it"

    @checked
    def __init__(self, strength: NonNegative = 1.0, temperature: Positive = 2.0, **continual: Any) -> None:
        super().__init__(**continual)
        if not isinstance(self.objective, Classification):
            raise ValueError(f"lwf keeps class probabilities: {type(self.objective).__name__} is no classification")
        self.strength = strength
        self.temperature = temperature
        self.old = copy.deepcopy(self.network).requires_grad_(False)

    def train(self, mode: bool = True) -> LwF:
        """Training mode, but for the old network."""
        super().train(mode)
        self.old.eval()
        return self

    def loss(self, batch: Labelled) -> Terms:
        """The task's, and that of answering otherwise than before."""
        logits: Tensor = self.network(batch.inputs)
        active = self.active(batch.task)
        task = self.hard(logits if active is None else logits.masked_fill(~active, -torch.inf), batch)
        if not self.task or not self.strength or self.stream.at_once:
            return Terms(task)
        with torch.no_grad():
            before: Tensor = self.old(batch.inputs)
        kept = torch.stack([self._differing(logits[:, h], before[:, h]) for h in self._earlier(logits.shape[1])]).sum()
        return Terms(task + self.strength * kept, task=task, kept=kept)

    def learnt(self, task: int) -> None:
        """Keep the network as it is."""
        self.old.load_state_dict(self.network.state_dict())

    def _earlier(self, outputs: int) -> list[Tensor]:
        """The outputs that were taught before, those that are asked together together."""
        if self.own is None:
            return [torch.arange(outputs)]
        if self.scenario == "class":
            return [self.own[: self.task].any(0).nonzero().squeeze(1)]
        return [head.nonzero().squeeze(1) for head in self.own[: self.task]]

    def _differing(self, logits: Tensor, before: Tensor) -> Tensor:
        return distillation_loss(logits, (before / self.temperature).softmax(1), self.temperature)
