"""Rollouts: what a policy did in environments, as batches to learn from; and whole episodes to judge it by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.batch import Policy, Rollout, Trajectories, WholeEpisodes
from lab.datamodules.loader import Positioned, seeded
from lab.encoding import decoded, encoded
from lab.environments.acting import to_environment
from lab.environments.stepping import Environments, Step
from lab.errors import UserError
from lab.transforms import hashed

Array = NDArray[Any]
LONGEST = 1_000_000
"""Steps after which an episode that is to be played to its end is held to have none."""


def seed_of(*key: int | str) -> int:
    """A seed for environments, of its own for ``key``."""
    return hashed(*key) % 2**31


class Rollouts(Positioned[Rollout]):
    """An epoch of rollouts, each played when it is asked for, by the policy as it is then.

    Its length keeps Lightning from asking for a rollout before the one in hand has been learnt from.

    Args:
        environments: reset here once, before the first rollout.
        policy: is asked for every action.
        steps: of each environment in a rollout; None: until an episode has ended in each, from its beginning.
        length: rollouts an epoch.
        seed: of the environments and of the actions that are drawn.
        rank: of this process; each plays by itself.
    """

    def __init__(
        self, environments: Environments, policy: Policy, *, steps: int | None, length: int, seed: int, rank: int = 0
    ) -> None:
        super().__init__()
        self.environments = environments
        self.policy = policy
        self.steps = steps
        self.length = length
        self.seed = seed
        self.rank = rank
        self.env_steps = 0
        self._observations: Array | None = None
        self._returns = np.zeros(environments.count)
        self._lengths = np.zeros(environments.count, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        """The rollout to come, and where the environments are before it."""
        playing = None
        if self._observations is not None:
            playing = {
                "environments": self.environments.state_dict(), "observations": encoded(self._observations),
                "returns": encoded(self._returns), "lengths": encoded(self._lengths),
            }  # fmt: skip
        return {**super().state_dict(), "env_steps": self.env_steps, "playing": playing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self.env_steps, playing = state["env_steps"], state["playing"]
        if playing is None:
            return
        self.environments.load_state_dict(playing["environments"])
        self._observations = decoded(playing["observations"])
        self._returns, self._lengths = decoded(playing["returns"]), decoded(playing["lengths"])

    def _serve(self, epoch: int, first: int) -> Iterator[Rollout]:
        for number in range(first, len(self)):
            yield self.played(seeded("actions", self.seed, self.rank, epoch, number))

    def played(self, generator: torch.Generator) -> Rollout:
        """The next rollout; its actions are drawn from ``generator``."""
        environments, over = self.environments, np.zeros(self.environments.count, dtype=bool)
        if self._observations is None:
            self._observations = environments.reset(seed_of("environments", self.seed, self.rank))
        elif self.steps is None:
            self._observations = environments.reset()
        if self.steps is None:
            self._returns[:], self._lengths[:] = 0, 0
        record, observations = _Record(environments.count), self._observations
        while len(record.rewards) < self.steps if self.steps is not None else not over.all():
            if len(record.rewards) >= LONGEST:
                raise UserError(
                    f"{environments.named}: an episode has not ended after {LONGEST:,} steps: "
                    "`wrappers: {time_limit: {steps: 1000}}` ends it"
                )
            actions, log_probs = self.policy.act(torch.from_numpy(observations), generator)
            step = environments.step(to_environment(actions.numpy(), environments.action_space))
            record.add(observations, actions, log_probs, step, over if self.steps is None else None)
            self._score(step, record, over)
            over |= step.done
            observations = step.observations
        self._observations = observations
        self.env_steps += sum(counted.size for counted in record.rewards)
        return record.rollout(observations, WholeEpisodes if self.steps is None else Rollout, self.env_steps)

    def _score(self, step: Step, record: _Record, over: Array) -> None:
        """Add a step to the episodes' returns, and note those that are over."""
        moved = np.ones_like(over) if step.valid is None else step.valid
        self._returns += np.where(moved, step.rewards, 0.0)
        self._lengths += moved
        done = step.done
        if done.any():
            told = done & ~over if self.steps is None else done
            record.returns.extend(self._returns[told].tolist())
            record.lengths.extend(self._lengths[told].tolist())
            self._returns[done], self._lengths[done] = 0.0, 0


class _Record:
    """What has been played of a rollout."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.observations: list[Array] = []
        self.actions: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.rewards: list[Array] = []
        self.terminated: list[Array] = []
        self.truncated: list[Array] = []
        self.valid: list[Array] = []
        self.final: list[Array] = []
        self.final_steps: list[Array] = []
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self._all_valid = True

    def add(self, observations: Array, actions: Tensor, log_probs: Tensor, step: Step, over: Array | None) -> None:
        """One step; ``over`` are the environments whose episode had ended before it, where whole ones are played."""
        time = len(self.rewards)
        self.observations.append(observations)
        self.actions.append(actions)
        self.log_probs.append(log_probs)
        self.rewards.append(step.rewards)
        self.terminated.append(step.terminated)
        self.truncated.append(step.truncated)
        valid = step.valid
        if over is not None and over.any():
            valid = ~over if valid is None else valid & ~over
        if valid is not None:
            self._all_valid = False
        self.valid.append(np.ones(self.count, dtype=bool) if valid is None else valid)
        if step.final is not None:
            bootstrapped = (step.truncated & ~step.terminated)[step.done]
            if over is not None:
                bootstrapped &= ~over[step.done]
            if bootstrapped.any():
                self.final.append(step.final[bootstrapped])
                self.final_steps.append(time * self.count + np.flatnonzero(step.done)[bootstrapped])

    def rollout(self, last: Array, kind: type[Rollout], env_steps: int) -> Rollout:
        """All of it as tensors."""
        seen = np.stack(self.observations)
        final = np.concatenate(self.final) if self.final else np.zeros((0, *last.shape[1:]), dtype=last.dtype)
        steps = np.concatenate(self.final_steps) if self.final_steps else np.zeros(0, dtype=np.int64)
        return kind(
            observations=torch.from_numpy(seen),
            actions=torch.stack(self.actions),
            rewards=torch.from_numpy(np.stack(self.rewards)),
            terminated=torch.from_numpy(np.stack(self.terminated)),
            truncated=torch.from_numpy(np.stack(self.truncated)),
            log_probs=torch.stack(self.log_probs),
            last_observations=torch.from_numpy(last.copy()),
            final_observations=torch.tensor(final),
            final_steps=torch.tensor(steps.tolist(), dtype=torch.int64),
            valid=None if self._all_valid else torch.from_numpy(np.stack(self.valid)),
            episode_returns=torch.tensor(self.returns, dtype=torch.float64),
            episode_lengths=torch.tensor(self.lengths, dtype=torch.int64),
            env_steps=env_steps,
        )


class Judging:
    """Whole episodes of the most probable actions, in environments of their own, the same ones every time.

    Args:
        environments: makes so many.
        policy: is asked for every action.
        episodes: this process's.
        at_once: how many are played together.
        seed: of the environments; those of a batch have the next one.
        recorded: whether every step is kept, or returns and lengths alone.
    """

    def __init__(
        self, environments: Callable[[int], Environments], policy: Policy, *, episodes: int, at_once: int, seed: int,
        recorded: bool = False,
    ) -> None:  # fmt: skip
        self.make = environments
        self.policy = policy
        self.episodes = episodes
        self.at_once = min(at_once, episodes)
        self.seed = seed
        self.recorded = recorded
        self._made: dict[int, Environments] = {}

    def __len__(self) -> int:
        return -(-self.episodes // self.at_once) if self.episodes else 0

    def __iter__(self) -> Iterator[Trajectories]:
        for number in range(len(self)):
            first = number * self.at_once
            yield self._played(min(self.at_once, self.episodes - first), first)

    def _played(self, count: int, first: int) -> Trajectories:
        environments = self._made.get(count) or self._made.setdefault(count, self.make(count))
        observations = environments.reset((self.seed + first) % 2**31)
        over = np.zeros(count, dtype=bool)
        returns, lengths = np.zeros(count), np.zeros(count, dtype=np.int64)
        kept: list[tuple[Array, ...]] = []
        while not over.all():
            actions = self.policy.best(torch.from_numpy(observations)).numpy()
            step = environments.step(to_environment(actions, environments.action_space))
            going = ~over
            if self.recorded:
                of = np.flatnonzero(going)
                parts = (of + first, lengths[of].copy(), observations[of], actions[of])
                kept.append((*parts, step.rewards[of], step.terminated[of], step.truncated[of]))
            returns += np.where(going, step.rewards, 0.0)
            lengths += going
            over |= step.done
            observations = step.observations
            if lengths.max() >= LONGEST:
                raise UserError(
                    f"{environments.named}: an episode has not ended after {LONGEST:,} steps: "
                    "`wrappers: {time_limit: {steps: 1000}}` ends it"
                )
        told = Trajectories(torch.from_numpy(returns), torch.from_numpy(lengths))
        if self.recorded:
            columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*kept, strict=True)]
            order = torch.argsort(columns[0], stable=True)  # an episode's steps one after the other
            names = ("episode", "step", "observations", "actions", "rewards", "terminated", "truncated")
            for name, column in zip(names, columns, strict=True):
                setattr(told, name, column[order])
        return told
