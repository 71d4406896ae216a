"""A loss that is no number ends the training where it was, and nothing that came after it is ever kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_fit import LIGHTNINGS_OWN, Classifier, fit, loader, trainer
from lightning.pytorch import Callback
from torch import Tensor

from lab.callbacks.checkpoints import Checkpoints
from lab.callbacks.nan_guard import NanGuard, NotFinite
from lab.verification import differences

pytestmark = LIGHTNINGS_OWN

ALWAYS, NEVER = 0.0, 1e9  # seconds between two writes
SAID = r"the loss is nan at step 15 \(epoch 2, batch 5\)"


class Explodes(Classifier):
    """Its loss is no number in the fifth batch of the second epoch, once."""

    unsaved = ("loss",)

    def __init__(self, loss: float = math.nan) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * self.loss if (self.current_epoch, batch_idx) == (1, 4) else loss


class SaysMore(Explodes):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "beside": "more"}


def state(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return saved


def finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.parametrize("make", [Explodes, SaysMore])
@pytest.mark.parametrize("every_n_steps", [1, 3, 25])
def test_the_first_loss_that_is_no_number_is_named_however_rarely_losses_are_looked_at(
    tmp_path: Path, every_n_steps: int, make: type[Explodes]
) -> None:
    with pytest.raises(NotFinite, match=f"{SAID}: a lower learning rate or trainer.gradient_clip_val may help"):
        fit(make(), tmp_path, NanGuard(every_n_steps=every_n_steps))


def test_an_infinite_loss_is_one_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"the loss is inf at step 15"):
        fit(Explodes(math.inf), tmp_path, NanGuard())


def test_the_training_ends_with_the_step_where_every_step_is_looked_at(tmp_path: Path) -> None:
    class Counts(Callback):
        batches = 0

        def on_train_batch_start(self, *_: Any) -> None:
            self.batches += 1

    counts = Counts()
    with pytest.raises(NotFinite):
        fit(Explodes(), tmp_path, NanGuard(every_n_steps=1), counts)
    assert counts.batches == 15


@pytest.mark.parametrize("order", [lambda *pair: pair, lambda *pair: pair[::-1]], ids=["guard first", "guard last"])
@pytest.mark.parametrize("every_seconds", [ALWAYS, NEVER])
def test_no_state_that_came_after_it_is_kept(tmp_path: Path, every_seconds: float, order: Callable[..., Any]) -> None:
    callbacks = order(NanGuard(every_n_steps=1000), Checkpoints("val/accuracy", "max", every_seconds=every_seconds))
    module = Explodes()
    with pytest.raises(NotFinite):
        fit(module, tmp_path, *callbacks)
    assert not finite(module.state_dict())
    assert finite(state(tmp_path)["state_dict"])
    assert state(tmp_path)["global_step"] == (14 if every_seconds == ALWAYS else 1)


def test_the_training_can_be_resumed_from_before_it(tmp_path: Path) -> None:
    whole = fit(Classifier(), tmp_path / "whole", NanGuard(), Checkpoints())
    with pytest.raises(NotFinite):
        fit(Explodes(), tmp_path / "left", NanGuard(), Checkpoints(every_seconds=ALWAYS))
    resumed = trainer(tmp_path / "left", NanGuard(), Checkpoints())
    last = tmp_path / "left" / "checkpoints" / "last.ckpt"
    resumed.fit(Explodes(1.0), loader(0, 500), loader(500, 600), ckpt_path=last, weights_only=True)
    assert differences(whole.lightning_module.state_dict(), resumed.lightning_module.state_dict()) == []


def test_it_can_be_allowed_and_is_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"{SAID}$") as told:
        made = fit(Explodes(), tmp_path, NanGuard(allow_nan=True, every_n_steps=1))
    assert made.global_step == 40
    assert len([one for one in told if "the loss is nan" in str(one.message)]) == 1


def test_a_training_without_losses_of_its_own_is_let_alone(tmp_path: Path) -> None:
    class Silent(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(Silent(), tmp_path, NanGuard(every_n_steps=1), epochs=1)


def test_what_it_waits_for_is_checked_at_construction() -> None:
    with pytest.raises(ValueError, match="every_n_steps"):
        NanGuard(every_n_steps=0)
