"""Acrobot: two links that hang from a pivot, a torque between them; the tip is to swing above the bar.

R. Sutton: Generalization in Reinforcement Learning: Successful Examples Using Sparse Coarse Coding, NIPS 1996, with the
dynamics of Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition, 2018, section 11.2. With the angles
θ₁ (of the first link, 0 hanging down) and θ₂ (of the second to the first), the torque τ ∈ {−1, 0, 1}, and masses m,
lengths l, centres of mass c and moments of inertia I of the links::

    d₁ = m₁c₁² + m₂(l₁² + c₂² + 2 l₁c₂ cos θ₂) + I₁ + I₂      d₂ = m₂(c₂² + l₁c₂ cos θ₂) + I₂
    φ₂ = m₂c₂ g cos(θ₁ + θ₂ − π/2)
    φ₁ = −m₂l₁c₂ θ̇₂² sin θ₂ − 2 m₂l₁c₂ θ̇₂θ̇₁ sin θ₂ + (m₁c₁ + m₂l₁) g cos(θ₁ − π/2) + φ₂
    θ̈₂ = (τ + (d₂/d₁) φ₁ − m₂l₁c₂ θ̇₁² sin θ₂ − φ₂) / (m₂c₂² + I₂ − d₂²/d₁)      θ̈₁ = −(d₂θ̈₂ + φ₁) / d₁

integrated by one step of Runge and Kutta's fourth order over 0.2 s. A step costs 1 until −cos θ₁ − cos(θ₁ + θ₂) > 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from lab.environments.batched import Batched, Flags, Floats, squared
from lab.ranges import Count, checked

STEP = 0.2  # seconds
MASS_1 = MASS_2 = 1.0  # kg
LENGTH_1 = 1.0  # m
CENTRE_1 = CENTRE_2 = 0.5  # m
INERTIA = 1.0  # kg m², of both
GRAVITY = 9.8  # m/s²
FASTEST_1, FASTEST_2 = 4 * np.pi, 9 * np.pi  # rad/s


class Acrobot(Batched):
    """Acrobot-v1, many at once: two links to be swung up by a torque at the joint.

    Observations ``[N, 6]``: cos θ₁, sin θ₁, cos θ₂, sin θ₂, θ̇₁, θ̇₂ (rad/s). Actions: torque −1, 0 or 1 N m.

    Args:
        num_envs: copies.
        max_episode_steps: after so many an episode is truncated.
    """

    id: ClassVar[str] = "Acrobot-v1"

    @checked
    def __init__(self, num_envs: Count = 1, max_episode_steps: Count = 500) -> None:
        high = np.array([1, 1, 1, 1, FASTEST_1, FASTEST_2], dtype=np.float32)
        super().__init__(num_envs, max_episode_steps, Box(-high, high, dtype=np.float32), Discrete(3))

    def drawn(self, generator: np.random.Generator) -> Floats:
        """Angles and velocities within ±0.1, of single precision."""
        return generator.uniform(-0.1, 0.1, size=4).astype(np.float32).astype(np.float64)

    def advanced(self, actions: NDArray[Any]) -> tuple[Floats, Flags]:
        """One step of 0.2 s."""
        torque = np.asarray(actions) - 1.0
        y = self.state.T
        k1 = _derivatives(y, torque)
        k2 = _derivatives(y + STEP / 2.0 * k1, torque)
        k3 = _derivatives(y + STEP / 2.0 * k2, torque)
        k4 = _derivatives(y + STEP * k3, torque)
        y = y + STEP / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        y[:2] = _wrapped(y[:2])
        y[2] = np.clip(y[2], -FASTEST_1, FASTEST_1)
        y[3] = np.clip(y[3], -FASTEST_2, FASTEST_2)
        self.state = np.ascontiguousarray(y.T)
        terminated: Flags = -np.cos(y[0]) - np.cos(y[1] + y[0]) > 1.0
        return np.where(terminated, 0.0, -1.0), terminated

    def observed(self, state: Floats) -> NDArray[np.float32]:
        """Angles as cosine and sine."""
        seen = np.empty((len(state), 6), dtype=np.float32)
        seen[:, 0:4:2], seen[:, 1:4:2], seen[:, 4:] = np.cos(state[:, :2]), np.sin(state[:, :2]), state[:, 2:]
        return seen

    def first_observed(self, state: Floats) -> NDArray[np.float32]:
        """The same; an episode's first state is of single precision, and so is its cosine."""
        return self.observed(state.astype(np.float32))


def _derivatives(y: Floats, torque: Floats) -> Floats:
    """Of states ``[4, N]``."""
    theta1, theta2, velocity1, velocity2 = y
    cosine, sine = np.cos(theta2), np.sin(theta2)
    d1 = MASS_1 * CENTRE_1**2 + MASS_2 * (LENGTH_1**2 + CENTRE_2**2 + 2 * LENGTH_1 * CENTRE_2 * cosine)
    d1 = d1 + INERTIA + INERTIA
    d2 = MASS_2 * (CENTRE_2**2 + LENGTH_1 * CENTRE_2 * cosine) + INERTIA
    phi2 = MASS_2 * CENTRE_2 * GRAVITY * np.cos(theta1 + theta2 - np.pi / 2.0)
    phi1 = (
        -MASS_2 * LENGTH_1 * CENTRE_2 * squared(velocity2) * sine
        - 2 * MASS_2 * LENGTH_1 * CENTRE_2 * velocity2 * velocity1 * sine
        + (MASS_1 * CENTRE_1 + MASS_2 * LENGTH_1) * GRAVITY * np.cos(theta1 - np.pi / 2)
        + phi2
    )
    driven = torque + d2 / d1 * phi1 - MASS_2 * LENGTH_1 * CENTRE_2 * squared(velocity1) * sine - phi2
    acceleration2 = driven / (MASS_2 * CENTRE_2**2 + INERTIA - squared(d2) / d1)
    acceleration1 = -(d2 * acceleration2 + phi1) / d1
    return np.stack([velocity1, velocity2, acceleration1, acceleration2])


def _wrapped(angles: Floats) -> Floats:
    """Angles in [−π, π], by whole turns one after the other."""
    while (over := angles > np.pi).any():
        angles = np.where(over, angles - 2 * np.pi, angles)
    while (under := angles < -np.pi).any():
        angles = np.where(under, angles + 2 * np.pi, angles)
    return angles
