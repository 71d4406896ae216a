"""Anyone's loader, left in the middle of an epoch and taken up elsewhere, gives the batches that were to come."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lab import stopping
from lab.callbacks.checkpoints import Checkpoints
from lab.replay import Replayed

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # would slow a tiny set
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # of torch, in Lightning's loaders
]

BATCHES = 6
NUMBERS = torch.arange(12.0).reshape(12, 1)


class Draws(Dataset[Tensor]):
    """Adds noise of all three generators to every sample."""

    def __len__(self) -> int:
        return len(NUMBERS)

    def __getitem__(self, index: int) -> Tensor:
        noise = [float(torch.rand(())), float(np.random.rand()), random.random()]  # as many do
        return torch.cat([NUMBERS[index], torch.tensor(noise)])


class Stream(IterableDataset[Tensor]):
    """Has no length; its order and its values are drawn."""

    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.randperm(len(NUMBERS)):
            yield NUMBERS[index] + torch.rand(1)


class Plain:
    """Nobody's: an iterable with a length."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        yield from NUMBERS[torch.randperm(len(NUMBERS))].split(2)


def shuffled() -> Any:
    return DataLoader(TensorDataset(NUMBERS), batch_size=2, shuffle=True)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": shuffled,
    "drawing here": lambda: DataLoader(Draws(), batch_size=2, shuffle=True),
    "drawing in workers": lambda: DataLoader(Draws(), batch_size=2, shuffle=True, num_workers=2),
    "without a length": lambda: DataLoader(Stream(), batch_size=2),
    "two": lambda: {"one": shuffled(), "other": DataLoader(Draws(), batch_size=2, shuffle=True)},
    "not torch's": Plain,
}


class Reads(LightningModule):
    """Notes what comes in; draws itself, too, as a training does."""

    def __init__(self, stop_after: int = 0) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.stop_after = stop_after
        self.came: list[Any] = []

    unsaved = ("came",)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.came.append(plain(batch))
        if len(self.came) == self.stop_after:
            stopping.ask(signal.SIGTERM)
        return self.network(torch.rand(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain(batch: Any) -> Any:
    if batch is None or isinstance(batch, Tensor):
        return None if batch is None else batch.tolist()
    return [plain(part) for part in (batch.values() if isinstance(batch, dict) else batch)]


def seed(number: int) -> None:
    torch.manual_seed(number), np.random.seed(number), random.seed(number)  # what datasets draw from


def read(
    folder: Path, loader: Any, number: int, *, stop_after: int = 0, go_on: bool = False, **arguments: Any
) -> list[Any]:
    """The batches of three epochs, or those until the stop, in a process whose generators stand elsewhere."""
    seed(number)
    module = Reads(stop_after)
    trainer = Trainer(
        callbacks=[Checkpoints(every_seconds=0.0)], default_root_dir=folder, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, max_epochs=3, **arguments,
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt" if go_on else None
    try:
        with stopping.listening():
            trainer.fit(module, loader, ckpt_path=last, weights_only=True if go_on else None)
    except stopping.Stopped:
        assert stop_after
    return module.came


@pytest.mark.parametrize("after", [2, BATCHES, BATCHES + 3], ids=lambda n: f"after_{n}")
@pytest.mark.parametrize("name", LOADERS)
def test_the_batches_to_come_are_those_that_would_have_come(tmp_path: Path, name: str, after: int) -> None:
    whole = read(tmp_path / "whole", LOADERS[name](), 1)
    left = read(tmp_path / "parted", LOADERS[name](), 1, stop_after=after)
    resumed = read(tmp_path / "parted", LOADERS[name](), 99, go_on=True)
    assert len(whole) == 3 * BATCHES
    assert (len(left), len(resumed)) == (after, len(whole) - after)
    assert left + resumed == whole


def sometimes_longer(mode: str) -> Any:
    """One of six batches and one without a length, of four."""
    return CombinedLoader({"one": shuffled(), "other": DataLoader(Stream(), batch_size=3)}, mode)


@pytest.mark.parametrize("after", [3, 4, 5], ids=lambda n: f"after_{n}")
@pytest.mark.parametrize(
    ("make", "arguments", "batches"),
    [
        (LOADERS["without a length"], {"limit_train_batches": 4}, 4),
        (LOADERS["without a length"], {"limit_train_batches": 400}, 6),
        (lambda: sometimes_longer("max_size_cycle"), {}, 6),
        (lambda: sometimes_longer("max_size"), {}, 6),
        (lambda: sometimes_longer("min_size"), {}, 4),
    ],
    ids=["limited", "limited beyond its end", "until all have ended", "without what has ended", "until one has ended"],
)
def test_a_batch_that_was_fetched_ahead_or_not_is_neither_lost_nor_read_twice(
    tmp_path: Path, make: Callable[[], Any], arguments: dict[str, Any], batches: int, after: int
) -> None:
    whole = read(tmp_path / "whole", make(), 1, **arguments)
    left = read(tmp_path / "parted", make(), 1, stop_after=after, **arguments)
    resumed = read(tmp_path / "parted", make(), 99, go_on=True, **arguments)
    assert len(whole) == 3 * batches
    assert left + resumed == whole


def test_a_second_break_in_the_same_epoch_changes_nothing(tmp_path: Path) -> None:
    make = LOADERS["drawing here"]
    whole = read(tmp_path / "whole", make(), 1)
    came = read(tmp_path / "parted", make(), 1, stop_after=2)
    came += read(tmp_path / "parted", make(), 98, stop_after=2, go_on=True)
    came += read(tmp_path / "parted", make(), 99, go_on=True)
    assert came == whole


def test_an_epoch_of_which_nothing_came_begins_anew() -> None:
    first, again = Replayed(shuffled()), Replayed(shuffled())
    iter(first)
    again.load_state_dict(first.state_dict())
    seed(1)
    expected = [plain(batch) for batch in shuffled()]
    seed(1)
    assert [plain(batch) for batch in again] == expected


def test_only_the_epoch_that_was_left_is_read_again() -> None:
    seed(1)
    first = Replayed(shuffled())
    batches = iter(first)
    next(batches)
    again = Replayed(shuffled())
    again.load_state_dict(first.state_dict())
    assert len(list(again)) == BATCHES - 1
    assert len(list(again)) == BATCHES


def test_what_is_asked_of_a_loader_is_answered_by_the_loader() -> None:
    loader = shuffled()
    replayed = Replayed(loader)
    assert len(replayed) == BATCHES
    assert (replayed.batch_size, replayed.dataset) == (2, loader.dataset)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = replayed.no_such_thing


def test_a_loader_that_says_its_own_state_is_left_alone(tmp_path: Path) -> None:
    class Counts:
        """Goes on by itself."""

        def __init__(self) -> None:
            self.next = self.given = 0
            self.loaded: set[int] = set()

        def __len__(self) -> int:
            return BATCHES

        def __iter__(self) -> Iterator[Tensor]:
            first, self.next = self.next, 0
            for self.given in range(first + 1, BATCHES + 1):
                yield torch.tensor([float(self.given)])

        def state_dict(self) -> dict[str, int]:
            return {"given": self.given}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.next = state["given"]
            self.loaded.add(self.next)

    left, loader = read(tmp_path, Counts(), 1, stop_after=4), Counts()
    resumed = read(tmp_path, loader, 99, go_on=True)
    assert left + resumed == [[float(n)] for n in range(1, BATCHES + 1)] * 3
    assert loader.loaded == {4}
