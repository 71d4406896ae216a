"""Batch normalisation of batches whose samples come from two domains, each with statistics of its own.

The network's running statistics are the target's; the source's are kept beside the network, and change places with them
where the source's samples pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var")
"""What batch normalisation keeps of what it has seen."""


class SourceStatistics(nn.Module):
    """The running statistics of a network's batch normalisations for the source's samples.

    Args:
        network: whose own are the target's.
        separate: whether the domains have statistics of their own; else there is nothing to keep.
    """

    def __init__(self, network: nn.Module, *, separate: bool) -> None:
        super().__init__()
        self.separate = separate
        for number, part in enumerate(self.layers(network)):
            for which in STATISTICS:
                self.register_buffer(f"{which}_{number}", getattr(part, which).clone())

    def layers(self, network: nn.Module) -> list[_BatchNorm]:
        """The batch normalisations of a network whose running statistics differ by domain."""
        if not self.separate:
            return []
        return [part for part in network.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]

    def pairs(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """The source's statistics, and the network's own, ``[C]`` each, of each layer."""
        for number, part in enumerate(self.layers(network)):
            for which in STATISTICS:
                yield self.get_buffer(f"{which}_{number}"), getattr(part, which)

    @contextmanager
    def serving(self, network: nn.Module) -> Iterator[None]:
        """Has the network's running statistics be the source's for a while."""
        parts = list(enumerate(self.layers(network)))
        for number, part in parts:
            self._swap(part, number)
        try:
            yield
        finally:
            for number, part in parts:
                self._swap(part, number)

    @contextmanager
    def in_halves(self, network: nn.Module, size: int) -> Iterator[None]:
        """Has layers that train normalise the first ``size`` samples, the source's, and the others by their own."""
        parts = [(number, part) for number, part in enumerate(self.layers(network)) if part.training]
        for number, part in parts:
            part.forward = partial(self._halves, part, number, size)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for _, part in parts:
                del part.forward

    def _halves(self, part: _BatchNorm, number: int, size: int, inputs: Tensor) -> Tensor:
        forward = type(part).forward
        source, target = torch.split(inputs, [size, len(inputs) - size])  # two slices would fill and add two gradients
        self._swap(part, number)
        try:
            normalised = forward(part, source)
        finally:
            self._swap(part, number)
        if part.num_batches_tracked is not None:  # one batch of each
            part.num_batches_tracked.sub_(1)
        return torch.cat([normalised, forward(part, target)])

    def _swap(self, part: _BatchNorm, number: int) -> None:
        for which in STATISTICS:
            kept, running = self.get_buffer(f"{which}_{number}"), getattr(part, which)
            setattr(self, f"{which}_{number}", running)
            setattr(part, which, kept)
