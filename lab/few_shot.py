"""What tasks lose and are judged by: each task on its own, ``[T]`` figures of outputs ``[T, B, K]``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.batch import Episodes
from lab.objectives import Objective
from lab.objectives.classification import Classification
from lab.objectives.regression import _LOSSES, Regression
from lab.statistics import estimate


def losses_of(objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor:
    """``[T]``: each task's mean loss of outputs ``[T, B, K]``."""
    if isinstance(objective, Classification):
        found = F.cross_entropy(
            outputs.flatten(0, 1), targets.flatten(), label_smoothing=objective.label_smoothing, reduction="none"
        )
        return found.view(targets.shape).mean(1)
    if isinstance(objective, Regression):
        return objective._loss(outputs, targets, reduction="none").flatten(1).mean(1)
    return torch.stack([objective.loss(*pair) for pair in zip(outputs, targets, strict=True)])


def figures_of(objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor:
    """``[T]``: what each task is judged by, accuracy, mean squared error, or the loss."""
    if isinstance(objective, Classification):
        return (outputs.argmax(2) == targets).to(outputs.dtype).mean(1)
    if isinstance(objective, Regression):
        return _LOSSES["mse"](outputs, targets, reduction="none").flatten(1).mean(1)
    return losses_of(objective, outputs, targets)


def nearest_neighbour(batch: Episodes) -> Tensor:
    """``[T]``: accuracy of the class of the nearest support sample, by Euclidean distance between inputs."""
    support, query = (part.inputs.flatten(2) for part in (batch.support, batch.query))
    nearest = torch.cdist(query, support).argmin(2)  # (T, Q)
    return (batch.support.targets.gather(1, nearest) == batch.query.targets).to(support.dtype).mean(1)


def summary(values: list[float]) -> dict[str, float]:
    """The mean of episodes' figures, half its 95 % interval, and the median."""
    found = estimate(values)
    ordered, middle = sorted(values), len(values) // 2
    median = ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"mean": found.mean, "interval": found.half if found.half is not None else math.nan, "median": median}
