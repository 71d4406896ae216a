"""A training that is left at any moment and taken up by a fresh module ends, bit for bit, as one that never was."""

from __future__ import annotations

import random
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits_fit import LIGHTNINGS_OWN, Classifier, loader, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lab import stopping
from lab.callbacks import Lean
from lab.callbacks.checkpoints import Checkpoints
from lab.callbacks.ema import EMA
from lab.callbacks.exact import Exact
from lab.verification import Leaves, differences

pytestmark = LIGHTNINGS_OWN


class Learner(Classifier):
    """Draws a mask for every batch, so that a random generator elsewhere shows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return super().training_step((nn.functional.dropout(inputs, 0.2), targets), batch_idx)


class Accident(RuntimeError):
    """What ends a training without a word."""


class Crashes(Lean):
    """Raises in the middle of a step, after so many batches."""

    watches_only = True

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_start(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Accident


class Notes(Lean):
    """Which batches were trained, and how often training ended."""

    watches_only = True

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.ends = 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, index: int) -> None:
        self.batches.append((trainer.current_epoch, index))

    def on_train_end(self, *_: Any) -> None:
        self.ends += 1


@dataclass
class Fit:
    """One process's part of a training."""

    folder: Path
    trainer: Trainer
    module: Classifier
    notes: Notes

    def state(self, name: str = "last") -> Any:
        return torch.load(self.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)

    @property
    def metrics(self) -> dict[str, Tensor]:
        return dict(self.trainer.callback_metrics)


def train(
    folder: Path,
    module: Classifier,
    *callbacks: Callback,
    seed: int = 1,
    go_on: bool = False,
    monitor: str | None = "val/accuracy",
    **arguments: Any,
) -> Fit:
    """Ten shuffled training batches and two validation batches an epoch, in a process that drew other numbers before."""
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    notes = Notes()
    checkpoints = Checkpoints(monitor, "max", every_seconds=0.0)
    made = trainer(folder, checkpoints, notes, *callbacks, **{"epochs": 3, **arguments})
    shuffled = DataLoader(loader(0, 500).dataset, batch_size=50, shuffle=True)
    last = folder / "checkpoints" / "last.ckpt" if go_on else None
    try:
        with stopping.listening():
            made.fit(module, shuffled, loader(500, 600), ckpt_path=last, weights_only=True if go_on else None)
    except (stopping.Stopped, Accident):
        pass
    return Fit(folder, made, module, notes)


def nothing() -> Sequence[Callback]:
    return ()


def goes_on_exactly(
    folder: Path,
    after: int,
    make: Callable[[], Classifier] = Learner,
    beside: Callable[[], Sequence[Callback]] = nothing,
    leaves: Callable[[int], Callback] = Leaves,
    **arguments: Any,
) -> Fit:
    """Train once as a whole and once with a break; assert that both come to the same. The part after the break."""
    whole = train(folder / "whole", make(), *beside(), **arguments)
    left = train(folder / "parted", make(), *beside(), leaves(after), **arguments)
    resumed = train(folder / "parted", make(), *beside(), seed=99, go_on=True, **arguments)
    assert after <= len(left.notes.batches) < len(whole.notes.batches)
    assert resumed.notes.batches == whole.notes.batches[-len(resumed.notes.batches) :]
    assert len(left.notes.batches) + len(resumed.notes.batches) >= len(whole.notes.batches)
    assert differences(whole.state(), resumed.state()) == []
    assert differences(whole.metrics, resumed.metrics) == []
    assert torch.equal(whole.module.network.weight, resumed.module.network.weight)
    if (whole.folder / "checkpoints" / "best.ckpt").exists():
        assert differences(whole.state("best"), resumed.state("best")) == []
    return resumed


@pytest.mark.parametrize("leaves", [Leaves, Crashes])
@pytest.mark.parametrize("after", [1, 14, 10, 20], ids=lambda n: f"after_{n}")
def test_a_training_left_within_or_at_the_end_of_an_epoch_goes_on_as_if_it_had_not_been(
    tmp_path: Path, after: int, leaves: Callable[[int], Callback]
) -> None:
    resumed = goes_on_exactly(tmp_path, after, leaves=leaves)
    assert len(resumed.notes.batches) == 30 - after  # nothing was trained twice


@pytest.mark.parametrize("leaves", [Leaves, Crashes])
@pytest.mark.parametrize("after", [4, 9, 10, 15], ids=lambda n: f"after_{n}")
def test_gradients_that_were_being_accumulated_are_computed_again(
    tmp_path: Path, after: int, leaves: Callable[[int], Callback]
) -> None:
    goes_on_exactly(tmp_path, after, leaves=leaves, accumulate_grad_batches=3)


@pytest.mark.parametrize("after", [5, 7, 10, 15], ids=lambda n: f"after_{n}")
def test_a_validation_within_an_epoch_takes_place_once(tmp_path: Path, after: int) -> None:
    resumed = goes_on_exactly(tmp_path, after, val_check_interval=0.5)
    assert len(resumed.module.weights) == 6  # one at each validation


def test_what_two_breaks_left_is_as_if_there_had_been_none(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", Learner())
    train(tmp_path / "parted", Learner(), Leaves(4))
    train(tmp_path / "parted", Learner(), Leaves(3), seed=98, go_on=True)
    resumed = train(tmp_path / "parted", Learner(), seed=99, go_on=True)
    assert resumed.notes.batches == whole.notes.batches[7:]
    assert differences(whole.state(), resumed.state()) == []


class Manual(Learner):
    """Steps with the gradients of three batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 3)
        if batch_idx % 3 == 2:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("after", [4, 10, 14], ids=lambda n: f"after_{n}")
def test_gradients_that_a_manual_optimization_keeps_over_batches_are_part_of_the_state(
    tmp_path: Path, after: int
) -> None:
    resumed = goes_on_exactly(tmp_path, after, Manual)
    assert len(resumed.notes.batches) == 30 - after


class OneCycle(Learner):
    """Asks for the number of steps, so that the data are loaded before the checkpoint is."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, max_lr=0.5, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plateau(Learner):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train/loss_epoch"}}


@pytest.mark.parametrize("make", [OneCycle, Plateau])
@pytest.mark.parametrize("after", [14, 20], ids=lambda n: f"after_{n}")
def test_learning_rates_go_on(tmp_path: Path, after: int, make: type[Learner]) -> None:
    resumed = goes_on_exactly(tmp_path, after, make)
    assert resumed.trainer.optimizers[0].param_groups[0]["lr"] < 0.1


def averaging() -> Sequence[Callback]:
    return [EMA(decay=0.9)]


@pytest.mark.parametrize("after", [10, 14], ids=lambda n: f"after_{n}")
def test_averaged_weights_go_on_beside_those_that_are_trained(tmp_path: Path, after: int) -> None:
    resumed = goes_on_exactly(tmp_path, after, beside=averaging)
    saved = resumed.state()
    assert differences(saved["state_dict"], saved["current_model_state"]) != []


def impatient() -> Sequence[Callback]:
    return [EarlyStopping("val/score", patience=2)]


@pytest.mark.parametrize("after", [20, 25], ids=lambda n: f"after_{n}")
def test_patience_is_remembered(tmp_path: Path, after: int) -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    resumed = goes_on_exactly(tmp_path, after, lambda: Learner(scores), impatient, epochs=6)
    assert resumed.notes.batches[-1] == (2, 9)


class Keeps(Learner):
    """Weighs the loss by everything that it keeps in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.by_batch: dict[int, float] = {}
        self.counted: Counter[str] = Counter()
        self.average = torch.zeros(())
        self.recent: deque[float] = deque(maxlen=3)
        self.numpys = np.random.default_rng(5)
        self.pythons = random.Random(5)
        self.torchs = torch.Generator().manual_seed(5)
        self.history = np.zeros(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        value = float(loss)
        self.losses.append(value)
        self.by_batch[batch_idx] = self.by_batch.get(batch_idx, 0.0) + value
        self.counted["batches"] += 1
        self.average.lerp_(loss.detach(), 0.1)
        self.recent.append(value)
        self.history[batch_idx % 3] += value
        kept = [self.losses[0], self.by_batch[batch_idx], self.counted["batches"], float(self.average)]
        kept += [sum(self.recent), self.numpys.random(), self.pythons.random(), float(self.history.sum())]
        return loss * (1 + 0.01 * sum(kept) + 0.01 * float(torch.rand((), generator=self.torchs)))


def test_attributes_that_a_module_keeps_go_on(tmp_path: Path) -> None:
    resumed = goes_on_exactly(tmp_path, 14, Keeps)
    assert len(resumed.module.losses) == 30  # type: ignore[attr-defined]


class Follows(Callback):
    """Acts by what it has seen, and has no state_dict."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        self.seen.append(float(batch[0].mean()))
        trainer.optimizers[0].param_groups[0]["lr"] = 0.1 / len(self.seen)


def test_attributes_that_a_callback_keeps_go_on(tmp_path: Path) -> None:
    resumed = goes_on_exactly(tmp_path, 14, beside=lambda: [Follows()])
    assert resumed.trainer.optimizers[0].param_groups[0]["lr"] == 0.1 / 30


class Measures(Learner):
    """Logs in every way that Lightning knows, and keeps a metric that only the epoch's end asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(10)
        self.seen = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        inputs, targets = batch
        for reduction in ("mean", "sum", "max", "min"):
            self.log(f"the/{reduction}", loss, on_step=False, on_epoch=True, reduce_fx=reduction)
        self.log("the/builtin", loss, on_step=True, on_epoch=True, reduce_fx=max)
        self.log("each", loss)
        self.accuracy(self.network(inputs), targets)
        self.log("the/accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.seen.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("the/seen", self.seen.compute())
        self.seen.reset()


@pytest.mark.parametrize("after", [10, 14, 29], ids=lambda n: f"after_{n}")
def test_an_epochs_sums_are_of_all_its_batches(tmp_path: Path, after: int) -> None:
    resumed = goes_on_exactly(tmp_path, after, Measures)
    assert resumed.metrics["the/sum"] == pytest.approx(10 * float(resumed.metrics["the/mean"]))
    assert {"the/accuracy_epoch", "the/builtin_epoch", "the/seen", "each"} < set(resumed.metrics)


class Unfreezes(Learner):
    """Learns its bias from the second epoch on, and changes its mode by hand."""

    def on_train_start(self) -> None:
        self.network.bias.requires_grad_(False)
        self.network.eval()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.network.bias.requires_grad_(True)
            self.network.train()


@pytest.mark.parametrize("after", [4, 14], ids=lambda n: f"after_{n}")
def test_what_was_frozen_or_thawed_stays_so(tmp_path: Path, after: int) -> None:
    goes_on_exactly(tmp_path, after, Unfreezes)


def test_nothing_is_trained_when_a_training_that_had_ended_is_taken_up_but_its_end_is_done_again(
    tmp_path: Path,
) -> None:
    whole = train(tmp_path, Learner())
    before = whole.state()
    again = train(tmp_path, Learner(), seed=99, go_on=True)
    assert (again.notes.batches, again.notes.ends) == ([], 1)
    assert torch.equal(again.module.network.weight, whole.module.network.weight)
    assert differences(whole.metrics, again.metrics) == []
    assert differences(before, again.state()) == []


def test_nothing_is_trained_when_a_training_that_was_stopped_early_is_taken_up(tmp_path: Path) -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    whole = train(tmp_path, Learner(scores), *impatient(), epochs=6)
    again = train(tmp_path, Learner(scores), *impatient(), epochs=6, seed=99, go_on=True)
    assert (len(whole.notes.batches), again.notes.batches, again.notes.ends) == (30, [], 1)
    assert differences(whole.metrics, again.metrics) == []
    assert torch.equal(again.module.network.weight, whole.module.network.weight)


def test_a_training_that_was_stopped_early_goes_on_where_it_is_to_be_longer(tmp_path: Path) -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    straight = train(tmp_path / "whole", Learner(scores), EarlyStopping("val/score", patience=4), epochs=6)
    train(tmp_path / "parted", Learner(scores), *impatient(), epochs=6)
    patient = EarlyStopping("val/score", patience=4)
    longer = train(
        tmp_path / "parted", Learner(scores), Exact(longer=True), patient, epochs=6, seed=99, go_on=True
    )
    assert longer.notes.batches[0] == (3, 0)
    assert torch.equal(longer.module.weights[3], straight.module.weights[3])


@pytest.mark.parametrize("make", [Learner, Keeps, Measures, Manual])
def test_a_training_that_had_ended_and_may_take_more_epochs_equals_one_that_always_could(
    tmp_path: Path, make: type[Learner]
) -> None:
    straight = train(tmp_path / "whole", make(), epochs=4)
    train(tmp_path / "parted", make(), epochs=2)
    longer = train(tmp_path / "parted", make(), epochs=4, seed=99, go_on=True)
    assert longer.notes.batches == straight.notes.batches[20:]
    assert differences(straight.state(), longer.state()) == []
    assert differences(straight.metrics, longer.metrics) == []


def test_a_schedule_goes_on_as_one_over_the_longer_training(tmp_path: Path) -> None:
    straight = train(tmp_path / "whole", OneCycle(), epochs=4)
    train(tmp_path / "parted", OneCycle(), epochs=2)
    longer = train(tmp_path / "parted", OneCycle(), epochs=4, seed=99, go_on=True)
    rates = [fit.trainer.optimizers[0].param_groups[0]["lr"] for fit in (straight, longer)]
    assert rates[0] == pytest.approx(rates[1])
    assert len(longer.notes.batches) == 20


def test_a_second_stop_before_the_next_step_leaves_what_there_was(tmp_path: Path) -> None:
    class StopsAtOnce(Lean):
        watches_only = True

        def on_train_start(self, *_: Any) -> None:
            stopping.ask(signal.SIGTERM)

    whole = train(tmp_path / "whole", Learner())
    train(tmp_path / "parted", Learner(), Leaves(14))
    train(tmp_path / "parted", Learner(), StopsAtOnce(), seed=98, go_on=True)
    resumed = train(tmp_path / "parted", Learner(), seed=99, go_on=True)
    assert differences(whole.state(), resumed.state()) == []
