"""Supervised learning: a network, labelled data, an objective. What every other technique is compared with.

Minimises the mean of the objective over the samples whose target is known. A technique is a subclass that overrides
:meth:`Supervised.loss`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW

from lab.batch import Labelled
from lab.objectives import Objective
from lab.optimization import OptimizerFactory, SchedulerFactory, scheduled
from lab.ranges import checked


class Terms:
    """A loss and the parts that it is made of.

    Args:
        loss: scalar, what is minimised.
        parts: scalars worth watching; logged as ``train/<name>``.
    """

    def __init__(self, loss: Tensor, **parts: Tensor) -> None:
        self.loss = loss
        self.parts = parts


class Supervised(LightningModule):
    """Trains a network on labelled data.

    Args:
        network: inputs ``[B, ...]`` to outputs ``[B, K]``.
        objective: what the outputs should be; the data's own where it is left out.
        optimizer: waits for the network's parameters.
        scheduler: waits for the optimizer; total steps come from the trainer.
    """

    consumes = Labelled
    learns_unlabelled: ClassVar[bool] = False
    """Whether inputs without a label teach this technique anything; data with few labels gives it those too."""

    @checked
    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        optimizer: OptimizerFactory = AdamW,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.val_metrics = objective.metrics().clone(prefix="val/")
        self.test_metrics = objective.metrics().clone(prefix="test/")
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self._window_end = 0

    @property
    def monitor(self) -> tuple[str, str]:
        """The metric that chooses the checkpoint, and whether ``min`` or ``max`` of it is best."""
        return self.objective.monitor

    def selectable(self, epoch: int) -> bool:
        """Whether the network as it is after ``epoch`` (from 0) may be the one that is kept."""
        return True

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs, ``[B, ...]`` to ``[B, K]``."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def loss(self, batch: Labelled) -> Terms:
        """What a batch is trained on; the one thing that a technique changes."""
        return Terms(self.objective.loss(self.network(batch.inputs), batch.targets))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch's loss."""
        terms = self.loss(Labelled.of(batch))
        self._watch(terms)
        return terms.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to ``val/loss`` and the objective's metrics."""
        self._judge(Labelled.of(batch), "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to ``test/loss`` and the objective's metrics."""
        self._judge(Labelled.of(batch), "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """What ``lab predict`` writes of every sample: its index, its target, the objective's columns."""
        batch = batch if isinstance(batch, Tensor) else Labelled.of(batch)
        if isinstance(batch, Tensor):
            return self.objective.columns(self.network(batch))
        known = {"index": batch.index} if batch.index is not None else {}
        return {**known, "target": batch.targets, **self.objective.columns(self.network(batch.inputs))}

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer over the trainable parameters, and its scheduler over the training's steps."""
        optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        if self.scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": scheduled(self.scheduler, optimizer, steps, self.monitor[0])}

    def on_train_epoch_end(self) -> None:
        """Log what the last, unfinished window of steps gave."""
        if self._summed:
            self.log_dict(self._means(), on_step=False, on_epoch=True, sync_dist=True)
            self._sums, self._summed = {}, 0

    def _watch(self, terms: Terms) -> None:
        """Sum the terms on the device, and log their means once in ``log_every_n_steps``: a log a step is slow."""
        if self.global_step >= self._window_end:
            every = max(int(getattr(self.trainer, "log_every_n_steps", 1)), 1)
            self._sums, self._summed = {}, 0
            self._window_end = (self.global_step // every + 1) * every
        for name, term in {"loss": terms.loss, **terms.parts}.items():
            value = term.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._summed += 1
        if self.global_step + 1 == self._window_end:
            self.log_dict(self._means(), on_step=True, on_epoch=False)

    def _means(self) -> dict[str, Tensor]:
        return {f"train/{name}": value / self._summed for name, value in self._sums.items()}

    def _judge(self, batch: Labelled, split: str, metrics: nn.Module) -> None:
        outputs = self.network(batch.inputs)
        known = batch.labelled
        if not bool(known.all()):
            outputs, batch = outputs[known], batch[known]
        if not len(batch):
            return
        metrics.update(outputs, batch.targets)  # type: ignore[operator]  # a MetricCollection
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(batch))  # type: ignore[arg-type]
        loss = self.objective.loss(outputs, batch.targets)
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch), sync_dist=True)
