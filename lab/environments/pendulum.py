"""Pendulum: a rod that hangs from a pivot; a torque too weak to lift it at once is to swing it up and hold it there.

With the angle θ (0 upright), its velocity θ̇ and the torque u ∈ [−2, 2], a rod of mass m = 1 kg and length l = 1 m::

    θ̈ = 3g / (2l) · sin θ + 3 / (ml²) · u            reward = −(θ² + 0.1 θ̇² + 0.001 u²),  θ in [−π, π)

integrated by Euler's method over 0.05 s, the new velocity moving the angle.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from lab.environments.batched import Batched, Flags, Floats, squared
from lab.ranges import Count, checked

STEP = 0.05  # seconds
FASTEST = 8  # rad/s
STRONGEST = 2.0  # N m
MASS = LENGTH = 1.0  # kg, m


class Pendulum(Batched):
    """Pendulum-v1, many at once: a rod to be swung up and balanced by a weak torque.

    Observations ``[N, 3]``: cos θ, sin θ, θ̇ (rad/s). Actions ``[N, 1]``: torque in N m.

    Args:
        num_envs: copies.
        max_episode_steps: after so many an episode is truncated.
        g: gravity in m/s².
    """

    id: ClassVar[str] = "Pendulum-v1"

    @checked
    def __init__(self, num_envs: Count = 1, max_episode_steps: Count = 200, g: float = 10.0) -> None:
        high = np.array([1.0, 1.0, FASTEST], dtype=np.float32)
        torque = Box(-STRONGEST, STRONGEST, shape=(1,), dtype=np.float32)
        super().__init__(num_envs, max_episode_steps, Box(-high, high, dtype=np.float32), torque)
        self.g = g

    def drawn(self, generator: np.random.Generator) -> Floats:
        """Any angle, and a velocity within ±1 rad/s."""
        high = np.array([np.pi, 1.0])
        return generator.uniform(-high, high)

    def advanced(self, actions: NDArray[Any]) -> tuple[Floats, Flags]:
        """One step of 0.05 s."""
        theta, velocity = self.state.T
        torque = np.clip(actions, -STRONGEST, STRONGEST)[:, 0]
        angle = ((theta + np.pi) % (2 * np.pi)) - np.pi
        effort = np.array([each**2 for each in torque])  # of single precision, where an array's square is another
        costs = squared(angle) + 0.1 * squared(velocity) + 0.001 * effort
        acceleration = 3 * self.g / (2 * LENGTH) * np.sin(theta) + 3.0 / (MASS * LENGTH**2) * torque
        velocity = np.clip(velocity + acceleration * STEP, -FASTEST, FASTEST)
        self.state = np.stack([theta + velocity * STEP, velocity], axis=1)
        return -costs, np.zeros(self.num_envs, dtype=bool)

    def observed(self, state: Floats) -> NDArray[np.float32]:
        """The angle as cosine and sine."""
        return np.stack([np.cos(state[:, 0]), np.sin(state[:, 0]), state[:, 1]], axis=1).astype(np.float32)
