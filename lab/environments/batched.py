"""Many copies of a gymnasium environment in one, stepped together by NumPy: the same numbers, bit for bit.

The state is float64 and the order of operations gymnasium's: in a chaotic system a difference in the last bit is
another trajectory within a few hundred steps. Every copy has a random generator of its own, seeded and drawn from as
the single environment's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Space
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from lab.encoding import decoded, encoded

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Batched(VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]]):
    """``num_envs`` copies; one that ends begins anew in the same step, its last observation in ``final_obs``.

    Args:
        num_envs: copies.
        max_episode_steps: after so many an episode is truncated.
        observed: the space of one copy's observations.
        acted: the space of one copy's actions.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # as gymnasium declares it
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": [],
    }
    id: ClassVar[str]
    """Gymnasium's id of the same environment, alone."""

    def __init__(self, num_envs: int, max_episode_steps: int, observed: Space[Any], acted: Space[Any]) -> None:
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.single_observation_space, self.single_action_space = observed, acted
        self.observation_space, self.action_space = batch_space(observed, num_envs), batch_space(acted, num_envs)
        self.state: Floats = np.zeros((num_envs, 0))
        self.elapsed = np.zeros(num_envs, dtype=np.int64)
        self._generators: list[np.random.Generator] = []

    @abstractmethod
    def drawn(self, generator: np.random.Generator) -> Floats:
        """The state ``[S]`` that an episode begins with."""

    @abstractmethod
    def advanced(self, actions: NDArray[Any]) -> tuple[Floats, Flags]:
        """Move :attr:`state`, ``[N, S]``, on by a step: rewards ``[N]``, and which have terminated."""

    @abstractmethod
    def observed(self, state: Floats) -> NDArray[np.float32]:
        """``[K, O]``: what is seen of states ``[K, S]``."""

    def first_observed(self, state: Floats) -> NDArray[np.float32]:
        """The same of states that episodes begin with."""
        return self.observed(state)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode in every copy.

        Args:
            seed: one for each copy; of a number, it and those that follow; None goes on drawing from the generators.
            options: none are known.
        """
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seed or ())
        if seeds or not self._generators:
            self._generators = [np_random(each)[0] for each in seeds or [None] * self.num_envs]
        self.state = np.stack([self.drawn(generator) for generator in self._generators])
        self.elapsed[:] = 0
        return self.first_observed(self.state), {}

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """A step of every copy, and a new episode for those that end with it."""
        rewards, terminated = self.advanced(actions)
        self.elapsed += 1
        truncated = self.elapsed >= self.max_episode_steps
        observations = self.observed(self.state)
        done = terminated | truncated
        if not done.any():
            return observations, rewards, terminated, truncated, {}
        which = np.flatnonzero(done)
        info = {"final_obs": observations.copy(), "_final_obs": done}
        self.state[which] = [self.drawn(self._generators[i]) for i in which]
        self.elapsed[which] = 0
        observations[which] = self.first_observed(self.state[which])
        return observations, rewards, terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """Everything that what comes next depends on, as plain data."""
        return {
            "state": encoded(self.state), "elapsed": encoded(self.elapsed), "generators": encoded(self._generators)
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.state, self.elapsed = decoded(state_dict["state"]), decoded(state_dict["elapsed"])
        self._generators = decoded(state_dict["generators"])


def squared(values: Floats) -> Floats:
    """Squares as a single number's ``x**2`` has them, by the C library's power: an array's differ in the last bit."""
    result: Floats = np.float_power(values, 2.0)
    return result
