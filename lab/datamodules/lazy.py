"""Inputs that are read when they are served, for data that don't fit in memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

READ_AT_ONCE = 256
"""How many samples a thread reads in a row."""


class Source(ABC):
    """Samples that can be read one by one, by several threads, or by another process: it is sent there with pickle."""

    shape: tuple[int, ...]
    """Of one sample's inputs."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def read(self, position: int) -> Tensor:
        """One sample's inputs; uint8 are pixels.

        Raises:
            ValueError: it cannot be read; the message names it.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the samples change; found without reading them all."""


class Lazy:
    """Some samples of a source, in some order; looks like a uint8 tensor ``[N, ...]`` as far as loaders look."""

    dtype = torch.uint8

    def __init__(self, source: Source, positions: Tensor | None = None) -> None:
        self.source = source
        self.positions = torch.arange(len(source)) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, ...)``."""
        return (len(self), *self.source.shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __getitem__(self, which: Tensor | slice) -> Lazy:
        return Lazy(self.source, self.positions[which])

    def index_select(self, dimension: int, which: Tensor) -> Tensor:
        """The samples at ``[B]`` places, read: ``[B, ...]``."""
        return torch.stack([self.source.read(position) for position in self.positions[which].tolist()])

    def read(self) -> Tensor:
        """All samples, read now, by a thread for every processor: ``[N, ...]``."""
        inputs = torch.empty(self.shape, dtype=self.dtype)
        positions = self.positions.tolist()

        def read(first: int) -> None:
            for place in range(first, min(first + READ_AT_ONCE, len(positions))):
                inputs[place] = self.source.read(positions[place])

        threads = ThreadPoolExecutor(os.cpu_count())
        try:
            for _ in threads.map(read, range(0, len(positions), READ_AT_ONCE)):
                pass
        finally:
            threads.shutdown(cancel_futures=True)
        return inputs


def fits(inputs: Lazy) -> bool:
    """Whether reading all takes a quarter of the machine's memory at most."""
    size = torch.Size(inputs.shape).numel() * inputs.dtype.itemsize
    return size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
