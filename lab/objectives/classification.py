"""Classification: one of C classes.

Cross-entropy, in nats, with label smoothing ε: −Σ_c q_c log softmax(z)_c, where q is 1 − ε + ε/C at the right class and
ε/C elsewhere (C. Szegedy et al.: Rethinking the Inception Architecture, CVPR 2016, arXiv:1512.00567, section 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lab.batch import UNLABELLED
from lab.objectives import Chart, Objective
from lab.ranges import checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["accuracy", "f1", "precision", "recall", "auroc", "calibration", "top5"]
DRAWN = 1000
"""Up to how many classes a confusion matrix is counted: it has their number squared of cells."""


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
        """Cross-entropy of logits ``[B, C]``, in nats, mean over the labelled samples.

        Args:
            targets: ``[B]`` class indices, or ``[B, C]`` probabilities (of blended samples), NaN where unknown.

        Raises:
            ValueError: the outputs are not one for each class, or the targets neither classes nor probabilities.
        """
        if outputs.ndim != 2 or outputs.shape[1] != self.num_classes:
            raise ValueError(
                f"the network's outputs have shape {list(outputs.shape)}, "
                f"for {self.num_classes} classes [batch, {self.num_classes}] is needed"
            )
        if targets.is_floating_point() and targets.shape == outputs.shape:
            known = ~targets.isnan().any(dim=1)
            soft = targets.masked_fill(~known[:, None], 0)
            total = F.cross_entropy(outputs, soft, label_smoothing=self.label_smoothing, reduction="none")
            return (total * known).sum() / known.sum().clamp(min=1)
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

    def chart(self) -> Chart | None:
        """The confusion matrix, of up to 1,000 classes."""
        return Confusion(self.num_classes, validate_args=False) if self.num_classes <= DRAWN else None


class Confusion(MulticlassConfusionMatrix, Chart):
    """Counts ``[C, C]``, true class by predicted class, of logits ``[B, C]`` and class indices ``[B]``."""

    def draw(self, gathered: Tensor, classes: Sequence[str] | None) -> dict[str, Figure]:
        """``confusion``."""
        from lab.pictures import confusion

        counts = gathered.cpu().numpy()
        names = classes if classes and len(classes) == len(counts) else None
        return {"confusion": confusion(counts, names)} if counts.any() else {}


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
