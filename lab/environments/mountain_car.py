"""Mountain car: a car in a valley, its engine too weak for the hill, has to swing itself up.

A. Moore: Efficient Memory-based Learning for Robot Control, PhD thesis, Cambridge, 1990; R. Sutton and A. Barto,
Reinforcement Learning: An Introduction, 2nd edition, 2018, example 10.1. With the position x, the velocity v and the
action a ∈ {0, 1, 2}::

    v ← v + 0.001 (a − 1) − 0.0025 cos 3x        x ← x + v

v is kept in [−0.07, 0.07] and x in [−1.2, 0.6]; the wall at the left stops the car. A step costs 1 until x ≥ 0.5.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from lab.environments.batched import Batched, Flags, Floats
from lab.ranges import Count, checked

LEFT, RIGHT, GOAL = -1.2, 0.6, 0.5
FASTEST = 0.07
FORCE, GRAVITY = 0.001, 0.0025


class MountainCar(Batched):
    """MountainCar-v0, many at once: a car to be swung up a hill by a weak engine.

    Observations ``[N, 2]``: position and velocity. Actions: left, nothing, right.

    Args:
        num_envs: copies.
        max_episode_steps: after so many an episode is truncated.
        goal_velocity: what the car has to have at the goal.
    """

    id: ClassVar[str] = "MountainCar-v0"

    @checked
    def __init__(self, num_envs: Count = 1, max_episode_steps: Count = 200, goal_velocity: float = 0.0) -> None:
        low, high = np.array([LEFT, -FASTEST], dtype=np.float32), np.array([RIGHT, FASTEST], dtype=np.float32)
        super().__init__(num_envs, max_episode_steps, Box(low, high, dtype=np.float32), Discrete(3))
        self.goal_velocity = goal_velocity

    def drawn(self, generator: np.random.Generator) -> Floats:
        """Somewhere near the valley's floor, at rest."""
        return np.array([generator.uniform(-0.6, -0.4), 0])

    def advanced(self, actions: NDArray[Any]) -> tuple[Floats, Flags]:
        """One step."""
        position, velocity = self.state.T
        slope = np.array([math.cos(angle) for angle in (3 * position).tolist()])  # NumPy's differs in the last bit
        velocity = velocity + ((np.asarray(actions) - 1) * FORCE + slope * (-GRAVITY))
        velocity = np.clip(velocity, -FASTEST, FASTEST)
        position = np.clip(position + velocity, LEFT, RIGHT)
        velocity = np.where((position == LEFT) & (velocity < 0), 0.0, velocity)
        self.state = np.stack([position, velocity], axis=1)
        terminated: Flags = (position >= GOAL) & (velocity >= self.goal_velocity)
        return np.full(self.num_envs, -1.0), terminated

    def observed(self, state: Floats) -> NDArray[np.float32]:
        """The state itself."""
        return state.astype(np.float32)
