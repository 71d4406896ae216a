"""Objectives: what a network's outputs are for. The loss to learn by, the metrics to judge by, the columns to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torchmetrics import Metric, MetricCollection

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Chart(Metric, ABC):
    """What all outputs of a test look like together: gathered batch by batch, as any metric is, and then drawn."""

    @abstractmethod
    def draw(self, gathered: Tensor, classes: Sequence[str] | None) -> dict[str, Figure]:
        """Pictures by name; none where nothing was gathered.

        Args:
            gathered: what ``compute`` gave.
            classes: the classes' names, where the data know them.
        """


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

    def chart(self) -> Chart | None:
        """A new chart, to be updated with outputs and targets of the test; None: this objective draws nothing."""
        return None
