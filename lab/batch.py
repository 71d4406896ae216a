"""What travels from data to modules: the batch types, and the protocols that tie the two together.

A datamodule says what it yields (``yields = Labelled``), a module what it consumes (``consumes = Labelled``); ``lab
check`` refuses a pair that doesn't fit. Classes that say neither, anyone's plain Lightning classes, are left to
themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol, Self

from torch import Generator, Tensor

UNLABELLED = -1
"""The class index of an image whose label is withheld; withheld real-valued targets are NaN."""


class Part(NamedTuple):
    """What a batch is of a training step, which other processes and accumulated batches have their parts of.

    Lightning takes the mean of the parts' gradients. Where they are of unequal numbers of samples, a part's mean times
    its weight makes that the mean over the step's samples.

    Args:
        begin: samples of the step that come before it.
        samples: of the whole step.
        weight: the samples of this part, relative to the mean of all parts.
        known_weight: the samples whose target is known, likewise.
    """

    begin: int
    samples: int
    weight: float
    known_weight: float


@dataclass
class Labelled:
    """Inputs and what they should give; unpacks as ``x, y = batch``.

    Args:
        inputs: ``[B, ...]``.
        targets: ``[B]`` class indices, or ``[B, K]`` real values.
        index: ``[B]`` position of each sample in its split, the key of any per-sample cache.
        task: ``[B]`` or scalar, the task of a stream.
        part: what it is of a training step; None where it is all of it, or nobody knows.
    """

    inputs: Tensor
    targets: Tensor
    index: Tensor | None = None
    task: Tensor | None = None
    part: Part | None = field(default=None, kw_only=True)

    def __iter__(self) -> Iterator[Tensor]:
        yield self.inputs
        yield self.targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, which: Tensor | slice) -> Labelled:
        """The samples that a mask, indices or a slice choose, of no step any more."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "part"}
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
    """Steps of a policy in vectorised environments, ``[T, N]``: time, then environment.

    Episodes follow one another; after a step that is ``terminated`` or ``truncated`` the next one begins.

    Args:
        observations: ``[T, N, ...]``, what each action answered.
        actions: ``[T, N]`` or ``[T, N, A]``, as the policy drew them.
        rewards: ``[T, N]``.
        terminated: ``[T, N]`` bool: the episode came to its end; nothing follows.
        truncated: ``[T, N]`` bool: the episode was cut off; what would have followed is to be estimated.
        log_probs: ``[T, N]``, nats, of the actions under the policy that drew them.
        last_observations: ``[N, ...]``, what followed the last step.
        final_observations: ``[K, ...]``, what the truncated episodes ended with.
        final_steps: ``[K]``, at which steps: time · N + environment.
        valid: ``[T, N]`` bool, or None for all: what is no step, such as one that a vector environment spends on
            beginning an episode, is not to be learnt from.
        episode_returns: ``[E]``, the sums of rewards of the episodes that ended in these steps.
        episode_lengths: ``[E]``, their steps.
        env_steps: steps of the environments so far, of this process, these included.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    log_probs: Tensor
    last_observations: Tensor
    final_observations: Tensor
    final_steps: Tensor
    valid: Tensor | None
    episode_returns: Tensor
    episode_lengths: Tensor
    env_steps: int = 0

    def to(self, device: Any, **how: Any) -> Self:
        """The same steps on a device; themselves where they are there, which spares Lightning a copy of every part."""
        if self.rewards.device == device:
            return self
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, **how) if isinstance(v, Tensor) else v for k, v in parts.items()}
        return type(self)(**moved)


@dataclass
class WholeEpisodes(Rollout):
    """Episodes from their first step to their last, one in each environment; what follows its end is not ``valid``."""


@dataclass
class Trajectories:
    """Whole episodes for judging a policy, end to end; ``[S]`` steps of all of them together.

    Args:
        returns: ``[E]``, the sum of rewards of each episode.
        lengths: ``[E]``, its steps.
        episode: ``[S]``, to which episode a step belongs; None where only returns and lengths were wanted.
        step: ``[S]``, counted from 0 in each episode.
        observations: ``[S, ...]``.
        actions: ``[S]`` or ``[S, A]``.
        rewards: ``[S]``.
        terminated: ``[S]`` bool.
        truncated: ``[S]`` bool.
    """

    returns: Tensor
    lengths: Tensor
    episode: Tensor | None = None
    step: Tensor | None = None
    observations: Tensor | None = None
    actions: Tensor | None = None
    rewards: Tensor | None = None
    terminated: Tensor | None = None
    truncated: Tensor | None = None

    def __len__(self) -> int:
        return len(self.returns)


class Policy(Protocol):
    """What data that come of acting ask the module that learns from them."""

    def act(self, observations: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Actions drawn for ``[N, ...]`` observations, and their log-probabilities ``[N]`` in nats; no gradient."""
        ...

    def best(self, observations: Tensor) -> Tensor:
        """The most probable actions for ``[N, ...]`` observations; no gradient."""
        ...
