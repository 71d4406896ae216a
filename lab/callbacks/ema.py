"""Weights averaged over the steps of training: validated, selected and kept instead of the last ones."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from typing_extensions import override

from lab.ranges import OpenFraction, checked


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights and buffers, and uses it wherever the network is judged.

    After step t (from 1): average ← d·average + (1 − d)·weights, where d is ``decay``, with ``warmup`` at most
    (1 + t) / (10 + t), so that the first, random weights are forgotten (M. Tan and Q. Le's EfficientNet does so:
    TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``). Validation, the choice of the checkpoint, tests and
    the saved network are the average's; training goes on with the weights themselves.

    Args:
        decay: d, the nearer to 1 the longer the memory: about 1 / (1 − d) steps.
        warmup: whether d grows at the beginning.
    """

    unsharded = "averages are of whole weights"

    @checked
    def __init__(self, decay: OpenFraction = 0.9998, warmup: bool = True) -> None:
        self.decay = decay
        self.warmup = warmup
        super().__init__(multi_avg_fn=self._average)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._average_model is not None:
            trainer.precision_plugin.convert_module(self._average_model)  # as the module is, which was copied before

    @torch.no_grad()
    def _average(self, averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
        """In place, for tensors of one type.

        Args:
            updates: t − 1; at the first step the weights themselves were copied.
        """
        step = int(updates) + 1
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, weights, 1 - decay)
        else:  # counters
            torch._foreach_copy_(averages, weights)
