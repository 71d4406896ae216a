"""A policy's actions and an environment's: spaces as plain values, and one brought into the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from numpy.typing import NDArray

Array = NDArray[Any]


def to_environment(actions: Array, space: Space[Any]) -> Array:
    """A policy's actions as the environments take them: those of a box clipped to it and in its shape."""
    if isinstance(space, Box):
        return np.clip(actions.reshape(-1, *space.shape), space.low, space.high).astype(space.dtype, copy=False)
    assert isinstance(space, Discrete | MultiDiscrete)
    first: Any = space.start
    return actions + first if np.any(first) else actions


def described(space: Space[Any], named: str) -> dict[str, Any]:
    """A space of actions as plain values: ``choices``, numbers of them; or ``low`` and ``high`` of a box.

    Raises:
        ValueError: it is another kind of space.
    """
    match space:
        case Discrete():
            return {"choices": [int(space.n)]}
        case MultiDiscrete():
            return {"choices": np.asarray(space.nvec).flatten().tolist(), "several": True}
        case Box():
            return {"low": space.low.flatten().tolist(), "high": space.high.flatten().tolist()}
    raise ValueError(f"{named}'s actions are {space}: policies have Discrete, MultiDiscrete and Box")
