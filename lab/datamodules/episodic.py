"""Episodes: small tasks, each with a support set to learn from and a query set to be judged on.

Which tasks an epoch has is a function of (seed, epoch, number of the task): they are drawn in blocks, each by a
generator of its own, so that a training goes on anywhere, and w processes with b/w tasks each see what one with b
sees. Tasks of validation and test are the same in every epoch, every run and for every seed.

Training takes only whole global batches; validation and test take every episode.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lab.batch import Episodes, Labelled
from lab.datamodules.loader import Positioned, seeded
from lab.errors import UserError
from lab.ranges import Count, ExistingPath, Whole, checked

Split = Literal["train", "val", "test"]
Numbers = tuple[Tensor, ...]
"""What decides tasks, each tensor ``[T, ...]``."""
BLOCK = 1024
"""Tasks that one generator draws."""


def distinct(sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``[..., count]`` different numbers from 0 to below ``sizes`` ``[...]``, each ordered choice equally likely.

    R. W. Floyd's algorithm, whose cost depends on ``count`` alone (J. Bentley and B. Floyd: A Sample of Brilliance,
    Communications of the ACM 30, 1987), and then a random order.
    """
    chosen = sizes.new_empty(*sizes.shape, 0)
    for step in range(count):
        top = sizes - count + step
        drawn = (torch.rand(sizes.shape, generator=generator, dtype=torch.float64) * (top + 1)).long()
        taken = (chosen == drawn.unsqueeze(-1)).any(-1)
        chosen = torch.cat([chosen, torch.where(taken, top, drawn).unsqueeze(-1)], -1)
    order = torch.rand(chosen.shape, generator=generator, dtype=torch.float64).argsort(-1)
    return chosen.gather(-1, order)


class EpisodeLoader(Positioned[Episodes]):
    """Batches of tasks.

    Args:
        draw: so many tasks' numbers, of a generator.
        serve: tasks of their numbers, and of the number of the first of them.
        key: of the generators, beside the epoch and the block.
        length: tasks an epoch.
        batch_size: tasks a batch and process.
        training: whether epochs differ, and have whole global batches only.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: an epoch would have no batch.
    """

    def __init__(
        self,
        draw: Callable[[torch.Generator, int], Numbers],
        serve: Callable[[Numbers, int, int], Episodes],
        key: tuple[int | str, ...],
        *,
        length: int,
        batch_size: int,
        training: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.draw, self.serve, self.key = draw, serve, key
        self.training = training
        self.rank, self.world_size = rank, world_size
        self._span = batch_size * world_size
        self._steps, rest = divmod(length, self._span)
        self._length = length - rest if training else length
        if rest >= world_size and not training:
            self._steps += 1
        if not self._steps:
            raise ValueError(
                f"{length} episodes make no batch of {batch_size} tasks on each of {world_size} processes"
                if training
                else f"{length} episodes are fewer than {world_size} processes"
            )
        self._blocks: dict[tuple[int, int], Numbers] = {}

    def __len__(self) -> int:
        return self._steps

    def _serve(self, epoch: int, first: int) -> Iterator[Episodes]:
        for step in range(first, len(self)):
            begin = step * self._span
            size = (self._length if step + 1 == len(self) else begin + self._span) - begin
            begin, end = begin + size * self.rank // self.world_size, begin + size * (self.rank + 1) // self.world_size
            yield self.serve(self._numbers(epoch if self.training else 0, begin, end), epoch, begin)

    def _numbers(self, epoch: int, begin: int, end: int) -> Numbers:
        """Those of tasks ``begin`` to ``end`` of an epoch."""
        pieces = []
        for block in range(begin // BLOCK, (end - 1) // BLOCK + 1):
            low = block * BLOCK
            numbers = self._block(epoch, block)
            pieces.append(tuple(part[max(begin - low, 0) : end - low] for part in numbers))
        if len(pieces) == 1:
            return pieces[0]
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    def _block(self, epoch: int, block: int) -> Numbers:
        found = self._blocks.get((epoch, block))
        if found is None:
            if len(self._blocks) > 1:  # a batch lies in two at most, and they come in order
                self._blocks.pop(next(iter(self._blocks)))
            found = self._blocks[epoch, block] = self.draw(seeded(*self.key, epoch, block), BLOCK)
        return found


class EpisodicData(LightningDataModule, ABC):
    """Tasks; a subclass says how they are drawn, and what they are.

    After :meth:`setup` the facts are attributes: ``num_classes`` (outputs that a network needs), ``input_shape``,
    ``in_channels``, ``objective``.

    Args:
        shots: samples of the support set, of each class where there are classes.
        queries: the same of the query set.
        eval_queries: in validation and test; ``queries`` where it is None.
        batch_size: tasks a batch and process.
        eval_batch_size: the same for validation, test and prediction.
        episodes: tasks of a training epoch.
        val_episodes: tasks to validate on; 0: no validation.
        test_episodes: tasks to test on.
        seed: of the training's tasks; the recipe's ``seed`` where it is left out.
        eval_seed: of validation's and test's.
        support: for ``lab predict``: samples of the user's own to adapt to, instead of drawn tasks.
        path: with it: the samples to predict.
    """

    yields = Episodes
    facts: ClassVar[tuple[str, ...]] = ("num_classes", "in_channels", "input_shape", "objective")

    num_classes: int
    in_channels: int
    input_shape: tuple[int, ...]
    objective: str

    @checked
    def __init__(
        self,
        *,
        shots: Count = 1,
        queries: Count = 15,
        eval_queries: Count | None = None,
        batch_size: Count = 4,
        eval_batch_size: Count = 50,
        episodes: Count = 2000,
        val_episodes: Whole = 200,
        test_episodes: Annotated[int, Ge(2)] = 1000,
        seed: int = 0,
        eval_seed: int = 0,
        support: ExistingPath | None = None,
        path: ExistingPath | None = None,
    ) -> None:
        super().__init__()
        if (support is None) != (path is None):
            raise ValueError(
                "support is a set to adapt to, path what is to be predicted then: "
                f"{'path' if path is None else 'support'} is missing"
            )
        self.shots = shots
        self.queries = queries
        self.eval_queries = eval_queries or queries
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.episodes = episodes
        self.val_episodes = val_episodes
        self.test_episodes = test_episodes
        self.seed = seed
        self.eval_seed = eval_seed
        self.support = support
        self.path = path

    @abstractmethod
    def draw(self, split: Split, generator: torch.Generator, count: int) -> Numbers:
        """The numbers that decide ``count`` tasks, drawn at random."""

    @abstractmethod
    def serve(self, split: Split, numbers: Numbers, epoch: int, first: int) -> Episodes:
        """The tasks of some numbers, the first of which is the epoch's task ``first``."""

    @abstractmethod
    def own(self, support: Path, path: Path) -> tuple[Labelled, Labelled]:
        """The user's support set ``[S, ...]``, and the samples to predict ``[N, ...]``.

        Raises:
            UserError: no task can be made of them.
        """

    def queries_of(self, split: Split) -> int:
        """Samples of a split's query sets."""
        return self.queries if split == "train" else self.eval_queries

    def train_dataloader(self) -> EpisodeLoader:
        """Batches of new tasks in every epoch."""
        return self._loader("train", self.episodes, self.batch_size)

    def val_dataloader(self) -> EpisodeLoader | list[Any]:
        """Batches of the validation's tasks, the same in every epoch; none where there are none."""
        return self._loader("val", self.val_episodes, self.eval_batch_size) if self.val_episodes else []

    def test_dataloader(self) -> EpisodeLoader:
        """Batches of the test's tasks."""
        return self._loader("test", self.test_episodes, self.eval_batch_size)

    def predict_dataloader(self) -> Any:
        """The test's tasks; or the user's own one, as many of its queries a batch as test tasks have tasks."""
        if self.support is None or self.path is None:
            return self.test_dataloader()
        with torch.inference_mode(mode=False):  # files are read by threads, which are in no such mode
            support, query = self.own(self.support, self.path)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return _Own(support, query, self.eval_batch_size, rank, world)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on a device; where it is there already, itself."""
        if isinstance(batch, Episodes) and batch.support.inputs.device == device:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def fingerprint(self) -> str:
        """SHA-256 of the test's first tasks and of what decides the others, in hexadecimal."""
        total = hashlib.sha256(repr((self.shots, self.queries, self.eval_queries, self.eval_seed)).encode())
        for split in ("train", "val", "test"):
            for numbers in self.draw(split, seeded("fingerprint", split), 4):
                total.update(numbers.contiguous().numpy().tobytes())
        return total.hexdigest()

    def _loader(self, split: Split, length: int, batch_size: int) -> EpisodeLoader:
        training = split == "train"
        where = (
            {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
            if self.trainer is not None
            else {}
        )
        return EpisodeLoader(
            lambda generator, count: self.draw(split, generator, count),
            lambda numbers, epoch, first: self.serve(split, numbers, epoch, first),
            ("episodes", split, self.seed if training else self.eval_seed),
            length=length,
            batch_size=batch_size,
            training=training,
            **where,
        )


class _Own(Positioned[Episodes]):
    """One task: all of its support set beside each batch of its queries."""

    def __init__(self, support: Labelled, query: Labelled, batch_size: int, rank: int, world_size: int) -> None:
        super().__init__()
        if not len(query):
            raise UserError("there are no samples to predict")
        self.support, self.query = support, query
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return math.ceil(len(self.query) / (self.batch_size * self.world_size))

    def _serve(self, epoch: int, first: int) -> Iterator[Episodes]:
        for step in range(first, len(self)):
            begin = (step * self.world_size + self.rank) * self.batch_size
            places = torch.arange(begin, min(begin + self.batch_size, len(self.query)))
            yield Episodes(_one(self.support), _one(self.query[places], places))


def _one(samples: Labelled, places: Tensor | None = None) -> Labelled:
    """Samples as those of one task."""
    index = None if places is None else places.unsqueeze(0)
    return Labelled(samples.inputs.unsqueeze(0), samples.targets.unsqueeze(0), index, torch.zeros(1, dtype=torch.int64))
