"""What a policy's outputs mean: choices with logits, or a normal distribution of numbers.

A network gives ``[B, K]``; of a choice among n these are n logits, of several choices theirs end to end, of numbers
their means, whose standard deviations are parameters that don't depend on what is observed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override


class Actions(nn.Module):
    """A distribution of actions for every row of a network's outputs.

    Args:
        outputs: K, what it takes of the network.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    @abstractmethod
    def sample(self, outputs: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Actions drawn, ``[B]`` or ``[B, A]``, and their log-probabilities ``[B]``."""

    @abstractmethod
    def best(self, outputs: Tensor) -> Tensor:
        """The most probable actions."""

    @abstractmethod
    def judged(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B]`` log-probabilities of actions, and ``[B]`` entropies, both in nats."""


class Choice(Actions):
    """One of n: ``[B]`` whole numbers."""

    @override
    def sample(self, outputs: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        logits = outputs.log_softmax(-1)
        actions = _drawn(logits, generator)
        return actions, logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    @override
    def best(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    @override
    def judged(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        logits = outputs.log_softmax(-1)
        return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(logits.exp() * logits).sum(-1)


class Choices(Actions):
    """Several choices, independent given what is observed: ``[B, A]`` whole numbers.

    Args:
        sizes: A numbers of choices.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sum(sizes))
        self.sizes = list(sizes)
        self.choice = Choice(0)

    @override
    def sample(self, outputs: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        drawn = [self.choice.sample(part, generator) for part in torch.split(outputs, self.sizes, -1)]
        return torch.stack([actions for actions, _ in drawn], -1), torch.stack([logs for _, logs in drawn]).sum(0)

    @override
    def best(self, outputs: Tensor) -> Tensor:
        return torch.stack([part.argmax(-1) for part in torch.split(outputs, self.sizes, -1)], -1)

    @override
    def judged(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(torch.split(outputs, self.sizes, -1), actions.unbind(-1), strict=True)
        found = [self.choice.judged(part, action) for part, action in parts]
        return torch.stack([logs for logs, _ in found]).sum(0), torch.stack([entropy for _, entropy in found]).sum(0)


class Gaussian(Actions):
    """Numbers, each from a normal distribution of its own: ``[B, A]``.

    Args:
        size: A.
        log_std: the logarithm of every standard deviation at the beginning; it is learnt.
    """

    def __init__(self, size: int, log_std: float = 0.0) -> None:
        super().__init__(size)
        self.log_std = nn.Parameter(torch.full((size,), float(log_std)))

    @override
    def sample(self, outputs: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        noise = torch.empty(outputs.shape, dtype=outputs.dtype).normal_(generator=generator).to(outputs.device)
        actions = outputs + self.log_std.exp() * noise
        return actions, self.judged(outputs, actions)[0]

    @override
    def best(self, outputs: Tensor) -> Tensor:
        return outputs

    @override
    def judged(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (actions - outputs) * (-self.log_std).exp()
        logs = -0.5 * scaled.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        entropy = (self.log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum()
        return logs.sum(-1), entropy.expand(len(outputs))


def actions_of(space: Mapping[str, Any], log_std: float = 0.0) -> Actions:
    """The distribution for a space of actions, as data describe it.

    Args:
        space: ``{"choices": [n]}``; ``{"choices": [n, m], "several": True}``; or a box's ``{"low": [...], "high":
            [...]}``.

    Raises:
        ValueError: it is none of these.
    """
    match space:
        case {"choices": [*sizes], "several": True}:
            return Choices(sizes)
        case {"choices": [int(size)]}:
            return Choice(size)
        case {"low": [*low], "high": [*_]}:
            return Gaussian(len(low), log_std)
    raise ValueError(f"action_space is {space}: choices, or low and high, were expected")


def _drawn(logits: Tensor, generator: Generator) -> Tensor:
    """Indices drawn with the probabilities of ``[..., n]`` logits: the first of n exponential clocks to ring."""
    clocks = torch.empty(logits.shape, dtype=logits.dtype).exponential_(generator=generator)
    return (logits - clocks.to(logits.device).log()).argmax(-1)
