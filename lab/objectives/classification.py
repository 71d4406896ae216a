"""Classification: one of C classes.

Cross-entropy, in nats, with label smoothing ε: −Σ_c q_c log softmax(z)_c, where q is 1 − ε + ε/C at the right class and
ε/C elsewhere (C. Szegedy et al.: Rethinking the Inception Architecture, CVPR 2016, arXiv:1512.00567, section 7).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lab.batch import UNLABELLED
from lab.objectives import Objective
from lab.ranges import checked

Measure = Literal["accuracy", "f1", "precision", "recall", "auroc", "calibration", "top5"]


class Classification(Objective):
    """Cross-entropy; judged by accuracy.

    Args:
        num_classes: C.
        label_smoothing: ε, in [0, 1).
        measures: metrics to report. ``accuracy`` is always among them, as checkpoints are chosen by it; ``f1``,
            ``precision``, ``recall`` and ``auroc`` (one class against the rest) are means over the classes;
            ``calibration`` is the expected calibration error of the top class, in 15 bins; ``top5`` counts a sample
            as right whose class is among the five likeliest.

    Raises:
        ValueError: ``top5`` with five classes or fewer.
    """

    monitor = ("val/accuracy", "max")

    @checked
    def __init__(
        self,
        num_classes: Annotated[int, Ge(2)],
        label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0,
        measures: tuple[Measure, ...] = ("accuracy",),
    ) -> None:
        if "top5" in measures and num_classes <= 5:
            raise ValueError(f"top5 is always 1 with {num_classes} classes: it says something from 6 on")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.measures = measures

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits ``[B, C]`` and class indices ``[B]``, in nats, mean over the labelled samples.

        Raises:
            ValueError: the outputs are not one for each class, or the targets no class indices.
        """
        if outputs.ndim != 2 or outputs.shape[1] != self.num_classes:
            raise ValueError(
                f"the network's outputs have shape {list(outputs.shape)}, "
                f"for {self.num_classes} classes [batch, {self.num_classes}] is needed"
            )
        if targets.is_floating_point() or targets.shape != outputs.shape[:1]:
            raise ValueError(
                f"targets are {targets.dtype} {list(targets.shape)}, for classes whole numbers [{len(outputs)}] are "
                "needed; for real values there is the objective 'regression'"
            )
        total = F.cross_entropy(
            outputs, targets.long(), ignore_index=UNLABELLED, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / (targets != UNLABELLED).sum().clamp(min=1)

    def metrics(self) -> MetricCollection:
        """``accuracy`` and the other ``measures``, of logits ``[B, C]`` and class indices ``[B]``."""
        chosen = dict.fromkeys(("accuracy", *self.measures))
        # Groups share the counts that are alike after one batch: where that is all right, top5 would become recall.
        return MetricCollection(
            {name: _MEASURES[name](num_classes=self.num_classes, validate_args=False) for name in chosen},
            compute_groups=False,
        )

    def columns(self, outputs: Tensor) -> dict[str, Tensor]:
        """``prediction`` ``[B]``, the likeliest class, and ``probabilities`` ``[B, C]``."""
        return {"prediction": outputs.argmax(dim=1), "probabilities": outputs.softmax(dim=1)}


class _AUROC(MulticlassAUROC):
    """AUROC of logits: torchmetrics takes logits that happen to lie in [0, 1] for probabilities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.softmax(dim=1), target)


class _Calibration(MulticlassCalibrationError):
    """Calibration error of logits, for the same reason."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.softmax(dim=1), target)


_MEASURES: dict[Measure, Callable[..., Metric]] = {
    "accuracy": partial(MulticlassAccuracy, average="micro"),
    "f1": partial(MulticlassF1Score, average="macro"),
    "precision": partial(MulticlassPrecision, average="macro"),
    "recall": partial(MulticlassRecall, average="macro"),
    "auroc": partial(_AUROC, average="macro"),
    "calibration": partial(_Calibration, n_bins=15, norm="l1"),
    "top5": partial(MulticlassAccuracy, average="micro", top_k=5),
}
