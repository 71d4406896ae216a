"""Batches in an order that only the seed and the epoch decide: cut from tensors in memory, or read by workers.

The order of epoch e is ``torch.randperm`` on a generator seeded by a BLAKE2b hash of (seed, e): neighbouring seeds and
epochs have nothing in common, and no global random state is read or moved. Batch k is positions [kbw, (k+1)bw) of that
order, for b samples a process and w processes; rank r takes the r-th of its w equal shares. So w processes with
batches of b/w together see what one process with batches of b sees, step by step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lab.batch import Labelled, Part
from lab.transforms import Augmentation, hashed

Batch = TypeVar("Batch")


def seeded(*key: int | str) -> torch.Generator:
    """A generator of its own for ``key``: keys that differ anywhere give unrelated random numbers."""
    return torch.Generator().manual_seed(hashed(*key))


class Request(NamedTuple):
    """The samples of one batch, and of the batch that it is blended with.

    Args:
        positions: ``[B]`` in the samples.
        rounds: ``[B]`` how often the epoch has been through all samples before.
        partners: the same two of as many samples, where other processes have them.
    """

    epoch: int
    positions: Tensor
    rounds: Tensor
    partners: tuple[Tensor, Tensor] | None = None


class Reader:
    """Makes batches of requests: takes the samples, makes pixels numbers in [0, 1], augments.

    Args:
        samples: what is served; batches carry its ``index``, or where it has none the position in it.
        augmentation: what happens to the inputs.
    """

    def __init__(self, samples: Labelled, augmentation: Augmentation | None = None) -> None:
        self.samples = samples
        self.index = torch.arange(len(samples)) if samples.index is None else samples.index
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def mixes(self) -> bool:
        """Whether a sample needs a partner."""
        return self.augmentation is not None and bool(self.augmentation.mixings)

    def select(self, chosen: Tensor) -> Labelled:
        """The samples at ``[B]`` positions, augmented by nothing."""
        samples, task = self.samples, self.samples.task
        return Labelled(
            pixels(samples.inputs.index_select(0, chosen)),
            samples.targets.index_select(0, chosen),
            self.index.index_select(0, chosen),
            task.index_select(0, chosen) if task is not None and task.ndim else task,
        )

    def plain(self, chosen: Tensor) -> Labelled:
        """The batch of the samples at ``[B]`` positions where nothing is augmented."""
        return self.select(chosen)

    def __call__(self, request: Request) -> Labelled:
        """One batch."""
        batch, augmentation = self.select(request.positions), self.augmentation
        if augmentation is None:
            return batch
        assert batch.index is not None
        samples = self._named(batch.index, request.rounds)
        batch.inputs = augmentation.transformed(batch.inputs, samples, request.epoch)
        if self.mixes:
            partners = batch.inputs.flip(0), batch.targets.flip(0)
            if request.partners is not None:
                positions, rounds = request.partners
                others = self.select(positions)
                assert others.index is not None
                named = self._named(others.index, rounds)
                partners = augmentation.transformed(others.inputs, named, request.epoch), others.targets
            mine = batch.inputs, batch.targets
            batch.inputs, batch.targets = augmentation.mixed(mine, partners, samples, request.epoch)
        return batch

    def _named(self, index: Tensor, rounds: Tensor) -> Tensor:
        return index + rounds * len(self)


def pixels(inputs: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1]; everything else as it is."""
    return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs


class Positioned(ABC, Generic[Batch]):
    """A loader that can be stopped after any batch and gone on with; a subclass says what it serves."""

    batch_sampler = None  # Lightning takes it for granted where there is a ``sampler``

    def __init__(self) -> None:
        self._epoch, self._batch, self._loaded = 0, 0, False

    @abstractmethod
    def _serve(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch, from its batch ``first`` on."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches an epoch."""

    @property
    def sampler(self) -> Self:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Serve this epoch next; a position loaded for the same epoch stands."""
        if epoch != self._epoch:
            self._epoch, self._batch, self._loaded = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """The batch to come: its epoch, and its number there; after an epoch's last batch the next epoch's first."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start at a batch.

        Raises:
            ValueError: an epoch has fewer batches: the data or the batch size is another.
        """
        if not 0 <= state["batch"] < len(self):
            raise ValueError(
                f"the saved position is batch {state['batch']}, an epoch has {len(self)}: "
                "the data, the batch size or the number of processes is another than when it was saved"
            )
        self._epoch, self._batch, self._loaded = state["epoch"], state["batch"], True

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning calls iter() before set_epoch(), so nothing may be decided before the first next().
        epoch, first = self._epoch, self._batch if self._loaded else 0
        self._loaded = False
        for step, batch in enumerate(self._serve(epoch, first), first):
            last = step + 1 == len(self)
            # Lightning never asks past the last batch, so the turn to the next epoch is taken here, not after the loop.
            self._epoch, self._batch = (epoch + 1, 0) if last else (epoch, step + 1)
            yield batch


class Loader(Positioned[Labelled]):
    """Batches of one set of samples.

    What remains of an epoch when its samples don't fill a last global batch is shared as evenly as it goes, every
    process taking the same number of steps and none an empty batch: fewer samples than processes join the batch before.

    Args:
        samples: what is served; batches carry its ``index``, or where it has none the position in it. Or what makes
            batches of positions.
        batch_size: samples a batch and process.
        shuffle: a new order every epoch; else the given one.
        seed: of the order.
        among: ``[M]`` positions to serve, instead of all.
        length: samples an epoch; more than there are take them again, in a new order each time round. All, once, where
            it is None.
        drop_last: leave out what doesn't fill a last global batch.
        rank: of this process.
        world_size: number of processes.
        augmentation: what happens to the inputs; a reader knows that itself.
        parts: batches of this process that a step of training is made of: then each batch says what it is of it.

    Raises:
        ValueError: an epoch would have no batch.
    """

    def __init__(
        self,
        samples: Labelled | Reader,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        among: Tensor | None = None,
        length: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        augmentation: Augmentation | None = None,
        parts: int | None = None,
    ) -> None:
        super().__init__()
        self.reader = samples if isinstance(samples, Reader) else Reader(samples, augmentation)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.parts = parts or 1
        self._weighs = parts is not None and parts * world_size > 1
        self._known: Tensor | None = None
        self._order_of: tuple[int, Tensor] | None = None
        self._among = torch.arange(len(self.reader)) if among is None else among
        self._in_order = among is None and length is None and not shuffle
        length = len(self._among) if length is None or not len(self._among) else length
        self._span = batch_size * world_size
        self._steps, rest = divmod(length, self._span)
        if rest >= world_size and not drop_last:
            self._steps += 1
        self._length = length - rest if drop_last else length
        if not self._steps:
            raise ValueError(
                f"{length} samples make no batch "
                f"(batch_size={batch_size}, world_size={world_size}, drop_last={drop_last})"
            )

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Labelled]:
        for batch in super().__iter__():
            if self._weighs:
                self._weigh(batch)
            yield batch

    def _weigh(self, batch: Labelled) -> None:
        """Say what a batch that was just served is of its step."""
        epoch, step = (self._epoch, self._batch - 1) if self._batch else (self._epoch - 1, len(self) - 1)
        whole = self.world_size * self.parts
        first = step // self.parts * self.parts
        begin, end = first * self._span, self._end(min(first + self.parts, len(self)) - 1)
        own, own_end = self._share(step)
        weight = known = (own_end - own) * whole / (end - begin)
        if (mask := self._labelled(epoch)) is not None:
            known = int(mask[own:own_end].sum()) * whole / max(int(mask[begin:end].sum()), 1)
        batch.part = Part(own - begin, end - begin, weight, known)

    def _labelled(self, epoch: int) -> Tensor | None:
        """``[length]`` bool, whose target is known in an epoch's order; None where all are, or targets are blended."""
        if self._known is None:
            self._known = self.reader.samples.labelled
        if self.reader.mixes or bool(self._known.all()):
            return None
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = epoch, self._known[self._order(epoch) % len(self._known)]
        return self._order_of[1]

    def _requests(self, epoch: int, first: int) -> Iterator[Request]:
        """What an epoch asks for, from batch ``first`` on."""
        order, size = self._order(epoch), len(self._among)
        elsewhere = self.reader.mixes and self.world_size > 1
        for step in range(first, len(self)):
            begin, end = self._share(step)
            partners = None
            if elsewhere:  # the mirrored samples of the global batch
                low, high = step * self._span, self._end(step)
                mirrored = torch.arange(low + high - 1 - begin, low + high - 1 - end, -1)
                partners = order[mirrored], mirrored // size
            yield Request(epoch, order[begin:end], torch.arange(begin, end) // size, partners)

    def _order(self, epoch: int) -> Tensor:
        """``[length]`` positions in the samples."""
        size = len(self._among)
        rounds = -(-self._length // size)
        if self.shuffle:
            generator = seeded("order", self.seed, epoch)
            order = torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])
        else:
            order = torch.arange(size).repeat(rounds)
        return self._among[order[: self._length]]

    def _share(self, step: int) -> tuple[int, int]:
        """Begin and end, in the epoch's order, of this process's part of a global batch."""
        begin = step * self._span
        size = self._end(step) - begin
        return begin + size * self.rank // self.world_size, begin + size * (self.rank + 1) // self.world_size

    def _end(self, step: int) -> int:
        """Where, in the epoch's order, a global batch ends."""
        return self._length if step + 1 == len(self) else (step + 1) * self._span


class Batches(Loader):
    """Slices or ``index_select``s tensors in memory; for the arguments see :class:`Loader`."""

    def _serve(self, epoch: int, first: int) -> Iterator[Labelled]:
        if self.reader.augmentation is not None:
            yield from map(self.reader, self._requests(epoch, first))
            return
        order = None if self._in_order else self._order(epoch)
        for step in range(first, len(self)):
            begin, end = self._share(step)
            yield self._slice(begin, end) if order is None else self.reader.plain(order[begin:end])

    def _slice(self, begin: int, end: int) -> Labelled:
        batch = self.reader.samples[begin:end]
        task = batch.task if batch.task is None else batch.task.clone()
        # Copies, so that a layer that works in place cannot change the data.
        inputs = pixels(batch.inputs)
        return Labelled(
            inputs.clone() if inputs is batch.inputs else inputs,
            batch.targets.clone(),
            self.reader.index[begin:end].clone(),
            task,
        )


class Streamed(Loader):
    """Has samples read, made batches of and augmented by worker processes, ahead of time.

    Args:
        num_workers: processes; 0 reads in this one.
        **order: see :class:`Loader`.
    """

    def __init__(self, samples: Labelled | Reader, batch_size: int, *, num_workers: int, **order: Any) -> None:
        super().__init__(samples, batch_size, **order)
        self._asked: Iterator[Request] = iter(())
        self._loader: DataLoader[Labelled | ValueError] = DataLoader(
            _Requested(self.reader),  # type: ignore[arg-type]  # any object with __getitem__ serves
            batch_size=None,
            sampler=_Asked(self),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # the loader's own seed for workers, which draw nothing
        )

    def _serve(self, epoch: int, first: int) -> Iterator[Labelled]:
        self._asked = self._requests(epoch, first)
        for batch in self._loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch


class _Requested:
    """A reader as the data set that a DataLoader wants.

    What cannot be read comes back as the error itself: raised, a worker would wrap its whole traceback in the message.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, request: Request) -> Labelled | ValueError:
        try:
            return self.reader(request)
        except ValueError as cause:
            return cause


class _Asked:
    """The requests of the epoch that is served, as the sampler that a DataLoader wants."""

    def __init__(self, loader: Streamed) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Request]:
        return self.loader._asked

    def __len__(self) -> int:
        return len(self.loader)
