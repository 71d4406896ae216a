"""Supervised learning: a network, labelled data, an objective. What every other technique is compared with.

Minimises the mean of the objective over the samples whose target is known. A technique is a subclass that overrides
:meth:`Supervised.loss`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lab.batch import Labelled
from lab.errors import UserError
from lab.modules import Technique, counted
from lab.objectives import Objective
from lab.optimization import OptimizerFactory, SchedulerFactory, scheduled
from lab.ranges import checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Terms:
    """A loss and the parts that it is made of.

    Args:
        loss: scalar, what is minimised.
        parts: scalars worth watching; logged as ``train/<name>``.
    """

    def __init__(self, loss: Tensor, **parts: Tensor) -> None:
        self.loss = loss
        self.parts = parts

    def detached(self) -> dict[str, Tensor]:
        """All of them by name, for watching."""
        return {"loss": self.loss.detach(), **{name: part.detach() for name, part in self.parts.items()}}


def means(watched: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """``train/<name>``: the mean of each scalar over those that have it."""
    names = dict.fromkeys(name for scalars in watched for name in scalars)
    return {
        f"train/{name}": torch.stack([scalars[name] for scalars in watched if name in scalars]).mean() for name in names
    }


class Supervised(Technique):
    """Trains a network on labelled data.

    Args:
        network: inputs ``[B, ...]`` to outputs ``[B, K]``.
        objective: what the outputs should be; the data's own where it is left out.
        optimizer: waits for the network's parameters.
        scheduler: waits for the optimizer; total steps come from the trainer.
    """

    consumes: ClassVar[type] = Labelled
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
        self.test_chart = objective.chart()
        self._gathered: Tensor | None = None
        self._watched: list[dict[str, Tensor]] = []
        self._window_end = 0
        self.rounds = 1
        """Trainings of equal length in one fit, each with the whole schedule."""

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

    def answers(self, batch: Labelled) -> Tensor:
        """The network's outputs for a batch, ``[B, K]``: what it is trained by, judged by and asked for."""
        return self.forward(batch.inputs)

    def loss(self, batch: Labelled) -> Terms:
        """What a batch is trained on; the one thing that a technique changes."""
        return Terms(self.hard(self.answers(batch), batch))

    def hard(self, outputs: Tensor, batch: Labelled) -> Tensor:
        """The objective's loss of outputs ``[B, K]``, the mean over the samples whose target is known.

        Where parts of a step have unequal numbers of them, it is weighted so that the step's is the mean over all.
        """
        loss, part = self.objective.loss(outputs, batch.targets), batch.part
        if part is None or part.known_weight == part.weight:
            return loss
        return loss * (part.known_weight / part.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch's loss."""
        batch = Labelled.of(batch)
        terms = self.loss(batch)
        self._watch(terms)
        return terms.loss if batch.part is None or batch.part.weight == 1 else terms.loss * batch.part.weight

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
        return {**known, "target": batch.targets, **self.objective.columns(self.answers(batch))}

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer over the trainable parameters, and its scheduler over the training's steps."""
        return self.scheduled(self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad))

    def scheduled(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer, and the recipe's scheduler of it, as Lightning wants them."""
        if self.scheduler is None:
            return {"optimizer": optimizer}
        schedule = scheduled(self.scheduler, optimizer, self.schedule_steps, self.monitor[0])
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def schedule_steps(self) -> tuple[int, int]:
        """Optimizer steps of the training that a schedule goes through, and of an epoch.

        Raises:
            UserError: the training has no end.
        """
        steps = self.trainer.estimated_stepping_batches  # loads the data, so that an epoch's batches are known
        if math.isinf(steps):
            raise UserError(
                "a schedule over all steps of a training needs its end: say trainer.max_epochs or trainer.max_steps"
            )
        epoch_steps = -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches)
        return int(steps) // self.rounds, epoch_steps

    def on_train_epoch_end(self) -> None:
        """Log what the last, unfinished window of steps gave."""
        if self._watched:
            self.log_dict(means(self._watched), on_step=False, on_epoch=True, sync_dist=True)
            self._watched.clear()

    def on_test_epoch_start(self) -> None:
        """Begin an empty chart."""
        if self.test_chart is not None:
            self.test_chart.reset()

    def on_test_epoch_end(self) -> None:
        """Gather the chart from all processes: drawing is for one of them alone."""
        if self.test_chart is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*before the ``update`` method")  # by this process, perhaps
                self._gathered = self.test_chart.compute()

    def pictures(self) -> dict[str, Figure]:
        """What the stage's folder shows of the last test: the objective's chart."""
        if self.test_chart is None or self._gathered is None:
            return {}
        data = getattr(self.trainer, "datamodule", None)
        return self.test_chart.draw(self._gathered, getattr(data, "classes", None))

    def _watch(self, terms: Terms) -> None:
        """Keep the terms on the device, and log their means once in ``log_every_n_steps``: a log a step is slow."""
        step = self.trainer.global_step
        if step >= self._window_end:
            every = max(int(getattr(self.trainer, "log_every_n_steps", 1)), 1)
            self._watched.clear()
            self._window_end = (step // every + 1) * every
        self._watched.append(terms.detached())
        if step + 1 == self._window_end:
            self.log_dict(means(self._watched), on_step=True, on_epoch=False)

    def _judge(self, batch: Labelled, split: str, metrics: nn.Module) -> None:
        outputs = self.answers(batch)
        known = batch.labelled
        if not bool(known.all()):
            outputs, batch = outputs[known], batch[known]
        if not len(batch):
            return
        metrics.update(outputs, batch.targets)  # type: ignore[operator]  # a MetricCollection
        if split == "test" and self.test_chart is not None:
            self.test_chart.update(outputs, batch.targets)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(batch))  # type: ignore[arg-type]
        loss, number = self.objective.loss(outputs, batch.targets), counted(batch)
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, batch_size=number, sync_dist=True)
