"""What travels from data to modules: the batch types, and the protocols that tie the two together.

A datamodule says what it yields (``yields = Labelled``), a module what it consumes (``consumes = Labelled``); ``lab
check`` refuses a pair that doesn't fit. Classes that say neither, anyone's plain Lightning classes, are left to
themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from torch import Tensor

UNLABELLED = -1
"""The class index of an image whose label is withheld; withheld real-valued targets are NaN."""


@dataclass
class Labelled:
    """Inputs and what they should give; unpacks as ``x, y = batch``.

    Args:
        inputs: ``[B, ...]``.
        targets: ``[B]`` class indices, or ``[B, K]`` real values.
        index: ``[B]`` position of each sample in its split, the key of any per-sample cache.
        task: ``[B]`` or scalar, the task of a stream.
    """

    inputs: Tensor
    targets: Tensor
    index: Tensor | None = None
    task: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        yield self.inputs
        yield self.targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, which: Tensor | slice) -> Labelled:
        """The samples that a mask, indices or a slice choose."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: v[which] if v is not None and v.ndim else v for k, v in parts.items()})

    @property
    def labelled(self) -> Tensor:
        """``[B]`` bool: the samples whose target is known."""
        if self.targets.is_floating_point():
            missing = self.targets.isnan()
            return ~(missing.flatten(1).any(dim=1) if missing.ndim > 1 else missing)
        return self.targets != UNLABELLED

    @classmethod
    def of(cls, batch: Any) -> Labelled:
        """A batch as it came from anyone's loader: a ``Labelled`` itself, or a pair ``(inputs, targets)``.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(batch, cls):
            return batch
        if isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
            return cls(batch[0], batch[1])
        raise TypeError(f"a batch of inputs and targets was expected, got {type(batch).__name__}")


@dataclass
class Tasks(Labelled):
    """Labelled samples of a stream of tasks: ``task``, ``[B]``, says from which, and ``index`` where in the stream."""


class Stream(Protocol):
    """What a technique that learns one task after the other asks its data.

    Tasks count from 0. A sample's place in the stream, its ``index``, is one of all tasks.
    """

    at_once: bool
    """Whether all tasks are learnt together."""
    epochs_per_task: int

    def task_of(self, epoch: int) -> int:
        """The task that an epoch of the training, from 0, learns."""
        ...

    def ends_task(self, epoch: int) -> bool:
        """Whether an epoch is the last of its task."""
        ...

    def of_tasks(
        self, split: Literal["train", "val", "test"], tasks: Sequence[int], at_most: int | None = None
    ) -> Iterable[Tasks]:
        """This process's part of the labelled samples of tasks, as they are, in order.

        Args:
            at_most: so many, chosen at random.
        """
        ...

    def places(self, tasks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """``[N]`` places of the labelled training samples of tasks, their tasks and their targets."""
        ...

    def at(self, places: Tensor) -> Tasks:
        """The training samples at ``[B]`` places, augmented by nothing."""
        ...


@dataclass
class SourceTarget:
    """A labelled batch of one domain beside a batch of another."""

    source: Labelled
    target: Labelled


@dataclass
class Episodes:
    """Few-shot tasks: ``support`` to learn from and ``query`` to be judged on; tasks in the first dimension.

    Args:
        support: inputs ``[T, S, ...]``, targets ``[T, S]`` or ``[T, S, K]``; ``task`` ``[T]``, the episodes' numbers.
        query: the same of Q samples.
    """

    support: Labelled
    query: Labelled

    def __len__(self) -> int:
        return len(self.support)

    def __getitem__(self, which: slice) -> Episodes:
        """Some of the tasks."""
        return Episodes(self.support[which], self.query[which])


@dataclass
class Rollout:
    """Steps of a policy in vectorised environments; every tensor starts with ``[time, environment]``."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
