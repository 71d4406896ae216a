"""Transforms of training inputs, on whole batches; what they draw is a function of (seed, epoch, index) alone.

A sample is augmented alike whatever batch, process or worker serves it, and after a resume. Three things may stand in
a recipe's ``transforms``:

- a :class:`BatchTransform`: one call for a batch, with numbers of its own for every sample;
- a :class:`Mixing`: blends each sample with another one, targets too;
- any other callable on one image ``[C, H, W]``, such as torchvision's: called sample by sample, torch's random state
  seeded for each and put back afterwards.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lab.batch import UNLABELLED

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TO_UNIT = np.float64(2.0**-24)


def hashed(*key: int | str) -> int:
    """64 bits of ``key``: keys that differ anywhere have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@runtime_checkable
class Transform(Protocol):
    """What a recipe may list under ``transforms``."""

    def __call__(self, *arguments: Any) -> Any:
        """The transformed inputs."""
        ...


class Draw:
    """Random numbers for the samples of a batch: a sample's are the same in any batch.

    A counter-based generator: SplitMix64's finaliser (G. Steele, D. Lea, C. Flood: Fast Splittable Pseudorandom Number
    Generators, 2014) over the key, the sample and the count of what was drawn before.

    Args:
        samples: ``[B]`` whole numbers that tell the samples of an epoch apart.
        key: everything else that the numbers should depend on.
    """

    def __init__(self, samples: Tensor, *key: int | str) -> None:
        with np.errstate(over="ignore"):
            self._state = _mixed(samples.numpy().astype(np.uint64) * _GOLDEN + np.uint64(hashed(*key)))
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._state)

    def at(self, place: int) -> Draw:
        """Other numbers for the same samples, unrelated to these and to those of another place."""
        other = Draw.__new__(Draw)
        with np.errstate(over="ignore"):
            other._state = _mixed(self._state ^ (np.uint64(place + 1) * _GOLDEN))
        other._drawn = 0
        return other

    def uniform(self, *shape: int) -> Tensor:
        """``[B, *shape]`` float32 in [0, 1), new ones at every call."""
        count = int(np.prod(shape, dtype=int))
        counter = np.arange(self._drawn + 1, self._drawn + 1 + count, dtype=np.uint64)
        self._drawn += count
        with np.errstate(over="ignore"):
            bits = _mixed(self._state[:, None] + counter * _GOLDEN)
        numbers = ((bits >> np.uint64(40)) * _TO_UNIT).astype(np.float32)
        return torch.from_numpy(numbers).reshape(len(self), *shape)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """``[B, *shape]`` float32 in [low, high)."""
        return low + (high - low) * self.uniform(*shape)

    def happens(self, probability: float) -> Tensor:
        """``[B]`` bool, true with a probability."""
        return self.uniform() < probability

    def seeds(self) -> list[int]:
        """``B`` seeds, new ones at every call."""
        self._drawn += 1
        with np.errstate(over="ignore"):
            bits = _mixed(self._state + np.uint64(self._drawn) * _GOLDEN)
        return [int(seed) for seed in bits >> np.uint64(1)]


class BatchTransform(ABC):
    """A transform of a whole batch in one call."""

    @abstractmethod
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        """``[B, C, H, W]`` to the same, or another size; the inputs are not changed in place.

        Args:
            draw: the samples' random numbers.
        """


class Mixing(ABC):
    """Blends every sample with a partner: the one at the mirrored place of the global batch.

    Args:
        p: the part of the samples that is blended.
    """

    p: float = 1.0

    @abstractmethod
    def __call__(self, inputs: Tensor, partners: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """``[B, C, H, W]`` inputs and partners to the blended inputs, and ``[B]``: how much of each is its own."""


class Augmentation:
    """A recipe's transforms, applied to batches.

    Several mixings take turns: a sample is blended by one of them, each as likely as the others.

    Args:
        transforms: in the order in which they are applied; mixings come last, wherever they stand.
        seed: of everything that is drawn.
        num_classes: of the targets; None: a regression.
    """

    def __init__(self, transforms: Sequence[Transform], seed: int, num_classes: int | None) -> None:
        self.transforms = [transform for transform in transforms if not isinstance(transform, Mixing)]
        self.mixings = [transform for transform in transforms if isinstance(transform, Mixing)]
        self.seed = seed
        self.num_classes = num_classes

    def transformed(self, inputs: Tensor, samples: Tensor, epoch: int) -> Tensor:
        """``[B, ...]`` inputs, each augmented for itself.

        Args:
            samples: ``[B]`` what tells the epoch's samples apart.
        """
        draw = Draw(samples, "transforms", self.seed, epoch)
        for place, transform in enumerate(self.transforms):
            if isinstance(transform, BatchTransform):
                inputs = transform(inputs, draw.at(place))
            else:
                inputs = _one_by_one(transform, inputs, draw.at(place).seeds())
        return inputs

    def mixed(
        self, mine: tuple[Tensor, Tensor], partners: tuple[Tensor, Tensor], samples: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets, blended with their partners'.

        Returns:
            ``[B, ...]`` inputs and ``[B, K]`` targets: probabilities of classes, NaN where one of the two is unknown.
        """
        draw = Draw(samples, "mixings", self.seed, epoch)
        turn = (draw.uniform() * len(self.mixings)).long()
        (inputs, targets), (other_inputs, other_targets) = mine, partners
        targets, other_targets = self._soft(targets), self._soft(other_targets)
        for place, mixing in enumerate(self.mixings):
            own_draw = draw.at(place)
            blended, kept = mixing(inputs, other_inputs, own_draw)
            chosen = (turn == place) & own_draw.happens(mixing.p)
            inputs = torch.where(_per_sample(chosen, inputs), blended, inputs)
            share = kept[:, None]
            blend = torch.where(share == 1, targets, share * targets + (1 - share) * other_targets)
            targets = torch.where(chosen[:, None], blend, targets)
        return inputs, targets

    def _soft(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point() or self.num_classes is None:
            return targets
        soft = F.one_hot(targets.clamp(min=0), self.num_classes).float()
        return soft.masked_fill((targets == UNLABELLED)[:, None], torch.nan)


def _one_by_one(transform: Transform, inputs: Tensor, seeds: Sequence[int]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        images = []
        for image, seed in zip(inputs, seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            images.append(transform(image))
    return torch.stack(images)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, ...]``, to be broadcast against ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))
