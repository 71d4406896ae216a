"""Regression: real values, one column for each quantity.

With residuals r = output − target: ``mse`` r², ``mae`` |r|, ``huber`` r²/2 where |r| ≤ 1 and |r| − ½ elsewhere
(P. Huber: Robust Estimation of a Location Parameter, 1964), each the mean over samples and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from lab.objectives import Chart, Objective
from lab.ranges import checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = 2000
"""How many samples of each process are drawn."""
COLUMNS = 4
"""How many columns are drawn."""

_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


class Regression(Objective):
    """Squared, absolute or Huber loss; judged by the mean squared error.

    Args:
        loss: what is minimised. The metrics are ``mse``, ``mae`` and ``r2`` (mean over the columns) with all three.
    """

    monitor = ("val/mse", "min")

    @checked
    def __init__(self, loss: Literal["mse", "mae", "huber"] = "mse") -> None:
        self._loss = _LOSSES[loss]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of outputs and targets, both ``[B, K]``, over the samples none of whose targets is NaN.

        Raises:
            ValueError: the shapes differ (``[B]`` and ``[B, 1]`` would be broadcast to ``[B, B]``), or the targets
                are classes.
        """
        if outputs.shape != targets.shape:
            raise ValueError(
                f"the network's outputs have shape {list(outputs.shape)}, the targets {list(targets.shape)}: "
                "both must be [batch, columns]"
            )
        if not targets.is_floating_point():
            raise ValueError(
                f"targets are {targets.dtype}, for a regression floating point is needed; "
                "for classes there is the objective 'classification'"
            )
        known = ~targets.flatten(1).isnan().any(dim=1)  # (B)
        known = known.reshape(-1, *[1] * (targets.ndim - 1))  # (B, 1)
        reached = torch.where(known, targets, outputs.detach())  # a residual of zero: no loss and no gradient
        total = self._loss(outputs, reached, reduction="sum")
        return total / (known.sum() * targets[0].numel()).clamp(min=1)

    def metrics(self) -> MetricCollection:
        """``mse``, ``mae`` and ``r2`` of outputs and targets, both ``[B, K]``."""
        return MetricCollection(
            {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": _R2()}, compute_groups=False
        )

    def columns(self, outputs: Tensor) -> dict[str, Tensor]:
        """``prediction`` ``[B, K]``."""
        return {"prediction": outputs}

    def chart(self) -> Chart:
        """Predicted against true values."""
        return Scatter()


class Scatter(Chart):
    """The first samples' outputs and targets, ``[N, 2, 4]`` with NaN beyond K columns, for both ``[B, K]``."""

    full_state_update = False
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("pairs", default=torch.empty(0, 2, COLUMNS), dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Keep what there is still room for."""
        pairs = torch.stack([outputs.flatten(1), targets.flatten(1)], dim=1)[: SAMPLES - len(self.pairs), :, :COLUMNS]
        pairs = F.pad(pairs.float(), (0, COLUMNS - pairs.shape[2]), value=torch.nan)
        self.pairs = torch.cat([self.pairs, pairs])

    def compute(self) -> Tensor:
        """Of all processes."""
        return self.pairs

    def draw(self, gathered: Tensor, classes: Sequence[str] | None) -> dict[str, Figure]:
        """``predictions``."""
        from lab.pictures import scatter

        columns = gathered[:, :, ~gathered.isnan().all(dim=1).all(dim=0)]
        known = columns[columns.flatten(1).isfinite().all(dim=1)].cpu().numpy()
        return {"predictions": scatter(known[:, 0], known[:, 1])} if known.size else {}


class _R2(R2Score):
    """R² summed in float64: Σy² − (Σy)²/n cancels to nothing in float32 where the mean is far from zero.

    NaN for fewer than two samples.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        widest = torch.float32 if preds.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        super().update(preds.to(widest), target.to(widest))

    def compute(self) -> Tensor:
        return super().compute() if self.total > 1 else self.residual.new_tensor(torch.nan)
