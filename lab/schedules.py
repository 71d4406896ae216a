"""Learning-rate schedules over the length of training: lab's own, with timm's names for things."""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lab.ranges import Count, NonNegative, Positive, checked


class _WarmUp(LRScheduler):
    """A linear rise from ``warmup_lr`` to the optimizer's rate, then a fall to ``min_lr`` at the training's last step.

    Moves at every step. Every parameter group keeps its own highest rate; ``warmup_lr`` and ``min_lr`` are of all.

    Args:
        optimizer: its learning rates are the highest.
        total_steps: of the training; the trainer's where it is left out.
        epoch_steps: steps an epoch; the trainer's where it is left out.
        warmup_epochs: the rise's length; may be a part of an epoch. A shorter training ends within it.
        warmup_lr: where it begins.
        min_lr: where the fall ends.
    """

    @checked
    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: Count,
        epoch_steps: Count,
        *,
        warmup_epochs: NonNegative = 0.0,
        warmup_lr: NonNegative = 0.0,
        min_lr: NonNegative = 0.0,
    ) -> None:
        self.total_steps = total_steps
        self.warmup_steps = round(warmup_epochs * epoch_steps)
        self.warmup_lr = warmup_lr
        self.min_lr = min_lr
        super().__init__(optimizer)

    @abstractmethod
    def part(self, progress: float) -> float:
        """How much of the way from ``min_lr`` to the highest rate is left, after a part of the fall in [0, 1]."""

    @override
    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        if step < self.warmup_steps:
            return [self.warmup_lr + (base - self.warmup_lr) * step / self.warmup_steps for base in self.base_lrs]
        left = self.part(min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0))
        return [self.min_lr + (base - self.min_lr) * left for base in self.base_lrs]


class Cosine(_WarmUp):
    """Half a cosine, after a warm-up.

    I. Loshchilov and F. Hutter: SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017, arXiv:1608.03983.
    """

    @override
    def part(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class WarmUpLinear(_WarmUp):
    """A straight line down, after a warm-up: what transformers are usually fine-tuned with."""

    @override
    def part(self, progress: float) -> float:
        return 1 - progress


class InverseDecay(LRScheduler):
    """μ₀ / (1 + α p)^β, with p the part of the training that is done; Caffe's policy ``inv``, by that part.

    Y. Ganin et al.: Domain-Adversarial Training of Neural Networks, JMLR 17, 2016, arXiv:1505.07818, section 5.2.2.
    Moves at every step; μ₀ is each parameter group's own rate.

    Args:
        optimizer: its learning rates are μ₀.
        total_steps: of the training; the trainer's where it is left out.
        alpha: how soon it falls.
        beta: how far: at the end (1 + α)^−β of the rate is left.
    """

    @checked
    def __init__(
        self, optimizer: Optimizer, total_steps: Count, *, alpha: Positive = 10.0, beta: Positive = 0.75
    ) -> None:
        self.total_steps = total_steps
        self.alpha = alpha
        self.beta = beta
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[float | Tensor]:
        left = (1 + self.alpha * self.last_epoch / self.total_steps) ** -self.beta
        return [base * left for base in self.base_lrs]
