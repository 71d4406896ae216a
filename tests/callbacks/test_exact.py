"""Trainings that are left between any two steps and taken up again by a fresh module end as if nothing had happened."""

from __future__ import annotations

import random
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits_fit import LIGHTNINGS_OWN, Classifier, loader, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lab import stopping
from lab.callbacks.checkpoints import Checkpoints
from lab.callbacks.ema import EMA
from lab.callbacks.nan_guard import NanGuard, NotFinite
from lab.stopping import Stopped
from lab.verification import differences

pytestmark = [*LIGHTNINGS_OWN, pytest.mark.filterwarnings("ignore:.*`max_epochs` was not set.*")]

EPOCHS = 2


class Leaves(Callback):
    """Asks for a stop after so many batches, and counts them."""

    watches_only = True

    def __init__(self, after: int = 0) -> None:
        self.after = after
        self.trained = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.trained += 1
        if self.trained == self.after:
            stopping.ask(signal.SIGTERM)


class Drops(Classifier):
    """Draws at every step, and keeps what plugins keep."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, 10))  # type: ignore[assignment]
        self.accuracy = MulticlassAccuracy(10)
        self.weighted = torch.ones(3)
        self.past: deque[int] = deque(maxlen=4)
        self.counts: dict[str, list[int]] = {"batches": []}
        self.draws = np.random.default_rng(0)
        self.dice = random.Random(0)
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.past.append(batch_idx)
        self.counts["batches"].append(batch_idx)
        self.weighted += 0.1
        noise = self.draws.normal() + self.dice.random() + float(torch.rand((), generator=self.generator))
        outputs = self.network(inputs)
        loss = nn.functional.cross_entropy(outputs, targets) * (1 + 0.01 * noise + 0.001 * len(self.counts["batches"]))
        self.accuracy(outputs, targets)
        self.log("train/accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/sum", loss, on_epoch=True, reduce_fx="sum")
        self.log("train/max", loss, on_epoch=True, reduce_fx="max")
        return loss * self.weighted.mean()

    def on_validation_epoch_end(self) -> None:
        """Nothing of what the test dictates."""


class Scheduled(Drops):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)  # which loads the data before a state is loaded
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plateau(Drops):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/accuracy"}}


class Validated(Drops):
    """Learns by what validations, and the check before training, computed."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.outputs.append(self.network(batch[0]).mean())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 0.1 * sum(map(float, self.outputs)))


class Manual(Drops):
    """Adds up the gradients of two batches itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer = self.optimizers()
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
        return loss


def data() -> tuple[Any, Any]:
    return loader(0, 500), loader(500, 600)


def shuffled() -> tuple[Any, Any]:
    return DataLoader(loader(0, 500).dataset, batch_size=50, shuffle=True), loader(500, 600)


class Noisy(Dataset[Any]):
    """Draws for every sample, from every generator that there is."""

    def __init__(self) -> None:
        self.samples = loader(0, 500).dataset

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.samples[index]
        return inputs + 0.1 * (torch.rand(()) + float(np.random.rand()) + random.random()), target


def noisy() -> tuple[Any, Any]:
    return DataLoader(Noisy(), batch_size=50, shuffle=True), loader(500, 600)


def worked() -> tuple[Any, Any]:
    return DataLoader(Noisy(), batch_size=50, shuffle=True, num_workers=2), loader(500, 600)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        samples = Noisy()
        yield from (samples[index] for index in torch.randperm(500).tolist())


def streamed() -> tuple[Any, Any]:
    return DataLoader(Stream(), batch_size=50), loader(500, 600)


Case = tuple[Callable[[], LightningModule], Callable[[], tuple[Any, Any]], dict[str, Any], Callable[[], list[Callback]]]
CASES: dict[str, Case] = {
    "attributes": (Drops, data, {}, list),
    "one cycle": (Scheduled, data, {}, list),
    "plateau": (Plateau, data, {}, list),
    "accumulation": (Drops, data, {"accumulate_grad_batches": 3}, list),
    "validation within": (Drops, data, {"val_check_interval": 0.5}, list),
    "manual": (Manual, data, {}, list),
    "average and early stopping": (
        Drops, data, {}, lambda: [EMA(0.9), EarlyStopping("val/accuracy", mode="max", patience=1)],
    ),
    "accumulation that changes": (Drops, data, {}, lambda: [GradientAccumulationScheduler({0: 3, 1: 2})]),
    "checked before": (Validated, data, {"num_sanity_val_steps": 2}, list),
    "shuffled": (Drops, shuffled, {}, list),
    "noisy": (Drops, noisy, {}, list),
    "workers": (Drops, worked, {}, list),
    "stream": (Drops, streamed, {}, list),
}  # fmt: skip


def train(case: Case, folder: Path, leaves: Leaves, *, left: bool = False, epochs: int = EPOCHS) -> Trainer:
    made, given, arguments, callbacks = case
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    state = folder / "checkpoints" / "last.ckpt"
    keeps = Checkpoints("val/accuracy", "max", every_seconds=1e9)
    lightning = trainer(folder, keeps, *callbacks(), leaves, epochs=epochs, **arguments)
    lightning.fit(made(), *given(), ckpt_path=state if left else None, weights_only=True)
    return lightning


def state_of(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return saved


@pytest.mark.parametrize("after", [4, 10, 13])
@pytest.mark.parametrize("name", CASES)
def test_a_training_that_was_left_ends_as_if_nothing_had_happened(name: str, after: int, tmp_path: Path) -> None:
    case = CASES[name]
    whole = train(case, tmp_path / "whole", Leaves())
    with stopping.listening(), pytest.raises(Stopped):
        train(case, tmp_path / "left", Leaves(after))
    assert state_of(tmp_path / "left")["lab"]["moment"] == "step"
    resumed = train(case, tmp_path / "left", Leaves(), left=True)
    assert differences(state_of(tmp_path / "whole"), state_of(tmp_path / "left")) == []
    assert differences(dict(whole.callback_metrics), dict(resumed.callback_metrics)) == []
    weights = [lightning.lightning_module.state_dict() for lightning in (whole, resumed)]
    assert differences(*weights) == []


def test_what_is_left_in_an_accumulation_is_left_after_its_step(tmp_path: Path) -> None:
    with stopping.listening(), pytest.raises(Stopped):
        train(CASES["accumulation"], tmp_path, Leaves(4))
    assert state_of(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 6


class Ends(Drops):
    ended = 0

    def on_train_end(self) -> None:
        Ends.ended += 1


@pytest.mark.parametrize("early", [False, True])
def test_a_training_that_had_ended_only_ends_again(early: bool, tmp_path: Path) -> None:
    stops = (lambda: [EarlyStopping("val/accuracy", mode="min", patience=0)]) if early else list
    case: Case = Ends, data, {}, stops
    Ends.ended = 0
    whole = train(case, tmp_path, Leaves(), epochs=5)
    again = Leaves()
    resumed = train(case, tmp_path, again, left=True, epochs=5)
    assert (Ends.ended, again.trained) == (2, 0)
    assert whole.current_epoch == resumed.current_epoch == (2 if early else 5)
    assert differences(whole.lightning_module.state_dict(), resumed.lightning_module.state_dict()) == []


def test_a_training_that_had_ended_goes_on_where_it_may_train_longer(tmp_path: Path) -> None:
    case = CASES["attributes"]
    whole = train(case, tmp_path / "whole", Leaves(), epochs=3)
    train(case, tmp_path / "longer", Leaves(), epochs=2)
    longer = train(case, tmp_path / "longer", Leaves(), left=True, epochs=3)
    assert differences(whole.lightning_module.state_dict(), longer.lightning_module.state_dict()) == []


def test_an_attribute_that_cannot_be_saved_is_named_after_the_first_step(tmp_path: Path) -> None:
    class Holds(Drops):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.callback = lambda: batch_idx
            return super().training_step(batch, batch_idx)

    leaves = Leaves()
    with pytest.raises(TypeError, match=r"Holds\.callback cannot be saved, .* name it in Holds\.unsaved = "):
        train((Holds, data, {}, list), tmp_path, leaves)
    assert leaves.trained == 1


class Explodes(Drops):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if (self.current_epoch, batch_idx) == (1, 3) else loss


def test_a_loss_that_is_no_number_stops_the_training_and_no_state_after_it_is_kept(tmp_path: Path) -> None:
    case: Case = Explodes, data, {}, lambda: [NanGuard()]
    with pytest.raises(NotFinite, match=r"the loss is nan at step 14 \(epoch 2, batch 4\)"):
        train(case, tmp_path, Leaves())
    assert all(bool(tensor.isfinite().all()) for tensor in state_of(tmp_path)["state_dict"].values())


def test_a_loss_that_is_no_number_is_told_once_where_it_is_allowed(tmp_path: Path) -> None:
    case: Case = Explodes, data, {}, lambda: [NanGuard(allow_nan=True)]
    with pytest.warns(UserWarning, match="the loss is nan at step 14") as told:
        train(case, tmp_path, Leaves(), epochs=3)
    assert len([one for one in told if "the loss is nan" in str(one.message)]) == 1
