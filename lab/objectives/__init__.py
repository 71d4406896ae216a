"""Objectives: what a network's outputs are for. The loss to learn by, the metrics to judge by, the columns to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor
from torchmetrics import MetricCollection


class Objective(ABC):
    """A loss, the metrics that go with it, and the one of them that checkpoints are chosen by.

    ``monitor`` is that metric's logged name and ``"max"`` or ``"min"``.
    """

    monitor: ClassVar[tuple[str, str]]

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar: the mean over the samples whose target is known; 0, with zero gradient, where none is.

        Raises:
            ValueError: the shapes or types don't fit this objective.
        """

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """New metrics, to be updated with the outputs and targets of samples whose target is known."""

    @abstractmethod
    def columns(self, outputs: Tensor) -> dict[str, Tensor]:
        """What is written for each sample when a run predicts: tensors ``[B]`` or ``[B, K]`` by name."""
