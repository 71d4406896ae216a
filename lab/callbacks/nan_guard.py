"""A training whose loss is no number any more ends where that began, instead of hours later."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lab.callbacks import Lean
from lab.errors import UserError
from lab.ranges import Count, checked


class NotFinite(UserError):
    """The loss was NaN or infinite."""

    exit_code = 1


class NanGuard(Lean):
    """Stops a training whose loss is NaN or infinite, and says at which step; no state after it is ever kept.

    Losses are looked at together once in ``every_n_steps``: to read each would make a GPU wait at every step.

    Args:
        allow_nan: go on, with one warning.
        every_n_steps: batches between two looks.
    """

    watches_only = True

    @checked
    def __init__(self, allow_nan: bool = False, every_n_steps: Count = 25) -> None:
        self.allow_nan = allow_nan
        self.every_n_steps = every_n_steps
        self._losses: list[tuple[int, int, int, Tensor]] = []
        self._told = False

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and not (self.allow_nan and self._told):
            self._losses.append((trainer.global_step, trainer.current_epoch, batch_idx, loss.detach()))
            if len(self._losses) >= self.every_n_steps:
                self.check(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Look at the losses since the last look.

        Raises:
            NotFinite: one was no finite number.
        """
        losses, self._losses = self._losses, []
        if not losses or bool(torch.stack([loss.float().mean() for *_, loss in losses]).isfinite().all()):
            return
        step, epoch, batch, loss = next(found for found in losses if not bool(found[-1].isfinite().all()))
        said = f"the loss is {float(loss.float().mean())} at step {step} (epoch {epoch + 1}, batch {batch + 1})"
        if not self.allow_nan:
            raise NotFinite(
                f"{said}: a lower learning rate or trainer.gradient_clip_val may help; "
                "`callbacks: {nan_guard: {allow_nan: true}}` goes on"
            )
        if not self._told:
            self._told = True
            rank_zero_warn(said)
