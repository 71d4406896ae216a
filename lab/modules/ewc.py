"""Elastic weight consolidation: weights that mattered to earlier tasks are held near what they were.

J. Kirkpatrick et al.: Overcoming Catastrophic Forgetting in Neural Networks, PNAS 114, 2017, arXiv:1612.00796. After
task k, with weights θ*_k and N samples x, the Fisher information's diagonal is::

    F_k = 1/N Σ_x Σ_c p_c(x) · (∂ log p_c(x) / ∂θ)²       at θ*_k: ``fisher: exact``, over all classes c

``sampled`` draws one class of each sample's p instead, ``empirical`` takes the label. With λ = ``strength`` task t
minimises::

    L_t(θ) + λ/2 Σ_{k<t} F_k (θ − θ*_k)²                   the penalties of all earlier tasks
    L_t(θ) + λ/2 F̃ (θ − θ*_{t−1})²,  F̃ ← γ F̃ + F_k         ``online``, γ = ``gamma``

(online: J. Schwarz et al.: Progress & Compress, ICML 2018, arXiv:1805.06370). The gradients are squared sample by
sample: the square of a mini-batch's mean gradient is smaller by about the batch size, and no Fisher information. Of
a sum of quadratics only its own centre and firmness matter: A ← A + F_k, m ← m + F_k / A · (θ*_k − m).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lab.distributed import summed
from lab.importance import fisher as fisher_information
from lab.modules.continual import Anchored
from lab.objectives.classification import Classification
from lab.ranges import Count, Fraction, NonNegative, checked
from lab.transforms import hashed


class EWC(Anchored):
    """Learns each task while it holds to what was important to earlier ones.

    Args:
        strength: λ in the equations above.
        fisher: how the Fisher information is found: ``exact``, ``sampled`` or ``empirical``.
        samples: of a task's training samples, how many it is found from; all where it is None.
        online: one penalty, centred on the last task's weights, instead of one a task.
        gamma: γ, how much of the information so far stays when a task is added; online only.
        seed: of what is drawn; the recipe's.

    Raises:
        ValueError: ``gamma`` without ``online``.
    """

    @checked
    def __init__(
        self,
        strength: NonNegative = 100.0,
        fisher: Literal["exact", "sampled", "empirical"] = "exact",
        *,
        samples: Count | None = None,
        online: bool = False,
        gamma: Fraction = 1.0,
        seed: int = 0,
        **continual: Any,
    ) -> None:
        super().__init__(strength=strength, **continual)
        if gamma != 1 and not online:
            raise ValueError("gamma is how online EWC forgets: say online: true too")
        self.fisher = fisher
        self.samples = samples
        self.online = online
        self.gamma = gamma
        self.seed = seed

    def penalty(self) -> Tensor | None:
        """λ/2 Σ A (θ − m)²."""
        penalty = super().penalty()
        return None if penalty is None else 0.5 * penalty

    def learnt(self, task: int) -> None:
        """Add the task's Fisher information."""
        found, weights = self.information(task), self.weights().detach()
        if self.online:
            self.importance.mul_(self.gamma).add_(found)
            self.anchor.copy_(weights)
        else:
            self.importance.add_(found)
            share = torch.where(self.importance > 0, found / self.importance, 0.0)
            self.anchor.lerp_(weights, share)

    def information(self, task: int) -> Tensor:
        """F of a task at the weights as they are, ``[P]``."""
        classes = isinstance(self.objective, Classification)
        generator = torch.Generator(self.device).manual_seed(hashed("fisher", self.seed, task, self.global_rank) >> 1)
        sums, count = fisher_information(
            self.network,
            self.on_device("train", range(task, task + 1), self.samples),
            self.fisher,
            likelihood="classification" if classes else "regression",
            active=self.active,
            generator=generator,
        )
        total, number = summed(self.vector(sums), count)
        return total / number
