"""Batch normalisation of batches whose samples come from two domains, each with statistics of its own.

The network's running statistics are the target's; the source's are kept beside the network, and change places with them
where the source's samples pass.

In a batch of both the domains take turns, sample by sample: s₀ t₀ s₁ t₁ …. In memory that is one sample of twice the
channels for each pair, so that one call normalises both, each by its own statistics, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
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
    def in_turns(self, network: nn.Module) -> Iterator[None]:
        """Has layers that train normalise each domain of a batch as :func:`in_turns` makes it by its own statistics."""
        parts = [(number, part) for number, part in enumerate(self.layers(network)) if part.training]
        for number, part in parts:
            part.forward = partial(self._normalised, part, number)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for _, part in parts:
                del part.forward

    def _normalised(self, part: _BatchNorm, number: int, inputs: Tensor) -> Tensor:
        if type(part).forward is not _BatchNorm.forward:  # it has ways of its own, with other processes say
            return self._one_by_one(part, number, inputs)
        part._check_input_dim(inputs)  # type: ignore[no-untyped-call]
        kept = [(self.get_buffer(f"{which}_{number}"), getattr(part, which)) for which in STATISTICS]
        mean, variance = (torch.cat(pair) for pair in kept)  # (2C)
        weight, bias = (None if own is None else own.repeat(2) for own in (part.weight, part.bias))
        assert part.num_batches_tracked is not None
        part.num_batches_tracked.add_(1)
        momentum = 1 / float(part.num_batches_tracked) if part.momentum is None else part.momentum
        pairs = inputs.reshape(len(inputs) // 2, 2 * part.num_features, *inputs.shape[2:])  # (B, 2C, ...)
        made = F.batch_norm(pairs, mean, variance, weight, bias, training=True, momentum=momentum, eps=part.eps)
        with torch.no_grad():
            for pair, found in zip(kept, (mean, variance), strict=True):
                for running, new in zip(pair, found.chunk(2), strict=True):
                    running.copy_(new)
        return made.reshape(inputs.shape)

    def _one_by_one(self, part: _BatchNorm, number: int, inputs: Tensor) -> Tensor:
        forward = type(part).forward
        source, target = by_domain(inputs)
        self._swap(part, number)
        try:
            normalised = forward(part, source)
        finally:
            self._swap(part, number)
        if part.num_batches_tracked is not None:  # one batch of each
            part.num_batches_tracked.sub_(1)
        return in_turns(normalised, forward(part, target))

    def _swap(self, part: _BatchNorm, number: int) -> None:
        for which in STATISTICS:
            kept, running = self.get_buffer(f"{which}_{number}"), getattr(part, which)
            setattr(self, f"{which}_{number}", running)
            setattr(part, which, kept)


def in_turns(source: Tensor, target: Tensor) -> Tensor:
    """``[B, ...]`` samples of each domain to ``[2B, ...]``, the source's first.

    Raises:
        ValueError: there are not as many of one as of the other.
    """
    if len(source) != len(target):
        raise ValueError(
            f"a batch has {len(source)} samples of the source and {len(target)} of the target: as many of one as of "
            "the other are learnt from"
        )
    return torch.stack([source, target], 1).flatten(0, 1)


def by_domain(samples: Tensor) -> tuple[Tensor, Tensor]:
    """``[2B, ...]`` samples in turns to those of the source and of the target, ``[B, ...]`` each."""
    source, target = samples.reshape(len(samples) // 2, 2, *samples.shape[1:]).unbind(1)
    return source, target
