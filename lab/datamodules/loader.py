"""Batches cut from tensors in memory, in an order that only the seed and the epoch decide.

The order of epoch e is ``torch.randperm`` on a generator seeded by a BLAKE2b hash of (seed, e): neighbouring seeds and
epochs have nothing in common, and no global random state is read or moved. Batch k is positions [kbw, (k+1)bw) of that
order, for b samples a process and w processes; rank r takes the r-th of its w equal shares. So w processes with
batches of b/w together see what one process with batches of b sees, step by step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lab.batch import Labelled


def seeded(*key: int | str) -> torch.Generator:
    """A generator of its own for ``key``: keys that differ anywhere give unrelated random numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Batches:
    """A loader that slices or ``index_select``s tensors, and that can be stopped after any batch and gone on with.

    What remains of an epoch when its samples don't fill a last global batch is shared as evenly as it goes, every
    process taking the same number of steps and none an empty batch: fewer samples than processes join the batch before.

    Args:
        samples: what is served; batches carry its ``index``, or where it has none the position in it.
        batch_size: samples a batch and process.
        shuffle: a new order every epoch; else the given one.
        seed: of the order.
        among: ``[M]`` positions to serve, instead of all.
        length: samples an epoch; more than there are take them again, in a new order each time round. All, once, where
            it is None.
        drop_last: leave out what doesn't fill a last global batch.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: an epoch would have no batch.
    """

    batch_sampler = None  # Lightning takes it for granted where there is a ``sampler``

    def __init__(
        self,
        samples: Labelled,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        among: Tensor | None = None,
        length: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._index = torch.arange(len(samples)) if samples.index is None else samples.index
        self._among = torch.arange(len(samples)) if among is None else among
        self._whole = among is None and length is None and not shuffle
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
        self._epoch, self._batch, self._loaded = 0, 0, False

    def __len__(self) -> int:
        return self._steps

    @property
    def sampler(self) -> Batches:
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

    def __iter__(self) -> Iterator[Labelled]:
        # A generator: Lightning calls iter() before set_epoch(), so nothing may be decided before the first next().
        epoch, first = self._epoch, self._batch if self._loaded else 0
        self._loaded = False
        order = None if self._whole else self._order(epoch)
        for step in range(first, len(self)):
            last = step + 1 == len(self)
            # Lightning never asks past the last batch, so the turn to the next epoch is taken here, not after the loop.
            self._epoch, self._batch = (epoch + 1, 0) if last else (epoch, step + 1)
            begin, end = self._share(step)
            yield self._slice(begin, end) if order is None else self._select(order[begin:end])

    def _order(self, epoch: int) -> Tensor:
        """``[length]`` positions in ``samples``."""
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
        size = (self._length if step + 1 == len(self) else begin + self._span) - begin
        return begin + size * self.rank // self.world_size, begin + size * (self.rank + 1) // self.world_size

    def _slice(self, begin: int, end: int) -> Labelled:
        batch = self.samples[begin:end]
        task = batch.task if batch.task is None else batch.task.clone()
        # Copies, so that a layer that works in place cannot change the data.
        return Labelled(batch.inputs.clone(), batch.targets.clone(), self._index[begin:end].clone(), task)

    def _select(self, chosen: Tensor) -> Labelled:
        samples, task = self.samples, self.samples.task
        return Labelled(
            samples.inputs.index_select(0, chosen),
            samples.targets.index_select(0, chosen),
            self._index.index_select(0, chosen),
            task.index_select(0, chosen) if task is not None and task.ndim else task,
        )
