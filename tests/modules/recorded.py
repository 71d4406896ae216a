"""Rollouts that were played once, for whoever learns from them: what is compared must have learnt from the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule

from lab.batch import Rollout, WholeEpisodes

ENVIRONMENTS = 6


def recorded(kind: type[Rollout], time: int, seed: int, own: slice = slice(None)) -> Rollout:
    """``[time, 6]`` steps at random: two episodes end each their way, the whole ones where they are to."""
    generator = torch.Generator().manual_seed(seed)
    shape = (time, ENVIRONMENTS)
    terminated = torch.rand(shape, generator=generator) < 0.15
    truncated = (torch.rand(shape, generator=generator) < 0.15) & ~terminated
    valid = None
    if kind is WholeEpisodes:
        lengths = torch.randint(2, time, (ENVIRONMENTS,), generator=generator)
        lengths[-1] = time
        steps = torch.arange(time).unsqueeze(1)
        terminated, truncated = steps == lengths - 1, torch.zeros(shape, dtype=torch.bool)
        valid = steps < lengths
    observations = torch.randn(*shape, 3, generator=generator)
    actions = torch.randint(2, shape, generator=generator)
    rewards = torch.randn(shape, generator=generator)
    log_probs = -0.7 + 0.1 * torch.randn(shape, generator=generator)
    last, final = torch.randn(ENVIRONMENTS, 3, generator=generator), torch.randn(*shape, 3, generator=generator)
    cut = truncated[:, own]
    return kind(
        observations=observations[:, own], actions=actions[:, own], rewards=rewards[:, own],
        terminated=terminated[:, own], truncated=cut, log_probs=log_probs[:, own], last_observations=last[own],
        final_observations=final[:, own][cut], final_steps=cut.flatten().nonzero().squeeze(1),
        valid=valid[:, own] if valid is not None else None, episode_returns=torch.zeros(0),
        episode_lengths=torch.zeros(0, dtype=torch.int64),
    )  # fmt: skip


class Recorded(LightningDataModule):
    """Three rollouts an epoch, their environments shared among the processes.

    Args:
        whole: whether they are whole episodes.
    """

    yields: ClassVar[type] = Rollout
    yields_by: ClassVar[str] = "rollout"
    yields_episodes: ClassVar[type] = WholeEpisodes
    facts: ClassVar[tuple[str, ...]] = ("action_space", "input_shape", "num_classes")
    action_space: ClassVar[dict[str, Any]] = {"choices": [2]}
    input_shape = (3,)
    num_classes = 2

    def __init__(self, rollout: str = "steps") -> None:
        super().__init__()
        self.kind = WholeEpisodes if rollout == "episodes" else Rollout

    def train_dataloader(self) -> Recording:
        assert self.trainer is not None
        size = ENVIRONMENTS // self.trainer.world_size
        first = self.trainer.global_rank * size
        return Recording(self.kind, slice(first, first + size))


class Recording:
    """What there is of one process's environments."""

    def __init__(self, kind: type[Rollout], own: slice) -> None:
        self.kind, self.own = kind, own

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Rollout]:
        for number in range(3):
            yield recorded(self.kind, 10, number, self.own)
