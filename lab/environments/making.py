"""Environments as data ask for them: a name or an id, with wrappers, made many."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv
from pydantic import AfterValidator

from lab.environments import BATCHED, EnvironmentFactory, find, registered
from lab.environments.stepping import Environments, Serial, Stacked, Vectorised
from lab.registry import nearest

OWN_WRAPPERS: dict[str, tuple[str, ...]] = {
    "time_limit": ("steps",), "frame_stack": ("size",), "normalize_observation": (), "normalize_reward": (),
}  # fmt: skip
"""What lab itself wraps environments in, whichever form they have, and the arguments."""
CHANNELS = (1, 3, 4)
"""Last sides by which pictures are told whose colours come last."""


class ChannelsFirst(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Pictures as networks take them, ``(C, H, W)``."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, Box)
        low, high = (np.moveaxis(bound, -1, 0) for bound in (space.low, space.high))
        self.observation_space = Box(low, high, dtype=space.dtype.type)

    def observation(self, observation: Any) -> Any:
        """One picture."""
        return np.moveaxis(observation, -1, 0)


@dataclass(frozen=True)
class Making:
    """How environments are made.

    Args:
        environment: gymnasium's id, or a registered environment.
        wrappers: by name, with their arguments: lab's, and those of ``gymnasium.wrappers``.
        vectorization: ``serial`` makes single environments also where there is a vector form.
    """

    environment: str | EnvironmentFactory
    wrappers: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    vectorization: Literal["auto", "serial"] = "auto"

    @property
    def named(self) -> str:
        """What an error calls them."""
        if isinstance(self.environment, str):
            return self.environment
        return str(getattr(self._class, "id", None) or self._class.__name__)

    @property
    def id(self) -> str | None:
        """Gymnasium's id of one of them, if there is one."""
        return self.environment if isinstance(self.environment, str) else getattr(self._class, "id", None)

    def make(self, count: int, **options: Any) -> Environments:
        """So many of them.

        Args:
            options: of single environments, such as ``render_mode``, which then are made.

        Raises:
            EnvironmentMissing: there is no such environment, or a package of it is missing.
            ValueError: an argument or wrapper doesn't suit it.
        """
        made = self._vector(count) if not options else None
        found: Environments = (
            Vectorised(made, self.named)
            if made is not None
            else Serial([self.single(**options) for _ in range(count)], self.named)
        )
        if "frame_stack" in self.wrappers:
            if not isinstance(found.observation_space, Box):
                raise ValueError(f"frame_stack takes observations that are arrays, {self.named} has others")
            found = Stacked(found, int(self._given("frame_stack")["size"]))
        return found

    def single(self, **options: Any) -> gymnasium.Env[Any, Any]:
        """One of them, alone; stacks of frames apart.

        Args:
            options: such as ``render_mode``.
        """
        limit = self._given("time_limit").get("steps")
        if isinstance(self.environment, str) or self._many:
            if self.id is None:
                raise ValueError(f"{self.named} has no single form")
            find(self.id)
            limit = limit or self._bound.get("max_episode_steps")
            made: Any = gymnasium.make(self.id, **{"max_episode_steps": limit} if limit else {}, **options)
        else:
            takes = inspect.signature(self._class).parameters
            made = self.environment(**{name: value for name, value in options.items() if name in takes})
            if limit:
                made = gymnasium.wrappers.TimeLimit(made, limit)
        for name, given in self.wrappers.items():
            if name not in OWN_WRAPPERS:
                made = getattr(gymnasium.wrappers, name)(made, **(given or {}))
        return ChannelsFirst(made) if _is_picture(made.observation_space) else made

    def _vector(self, count: int) -> VectorEnv[Any, Any, Any] | None:
        """Their vector form, where there is one and nothing asks for single ones."""
        if self.vectorization == "serial" or any(name not in OWN_WRAPPERS for name in self.wrappers):
            return None
        limit = self._given("time_limit").get("steps")
        options = {"max_episode_steps": limit} if limit else {}
        if not isinstance(self.environment, str):
            return self.environment(num_envs=count, **options) if self._many else None  # type: ignore[return-value]
        spec = find(self.environment)
        if spec.id in BATCHED:
            return registered(BATCHED[spec.id])(num_envs=count, **options)  # type: ignore[no-any-return]
        if spec.vector_entry_point is None:
            return None
        return gymnasium.make_vec(spec.id, count, vectorization_mode="vector_entry_point", **options)

    def _given(self, wrapper: str) -> Mapping[str, Any]:
        return self.wrappers.get(wrapper) or {}

    @property
    def _class(self) -> Any:
        return self.environment.func if isinstance(self.environment, partial) else self.environment

    @property
    def _bound(self) -> Mapping[str, Any]:
        return self.environment.keywords if isinstance(self.environment, partial) else {}

    @property
    def _many(self) -> bool:
        return isinstance(self._class, type) and issubclass(self._class, VectorEnv)


def _known_wrappers(wrappers: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any] | None]:
    for name, given in wrappers.items():
        _known_wrapper(name, given or {})
    return wrappers


def _known_wrapper(name: str, given: Mapping[str, Any]) -> None:
    """Raise a ValueError for a wrapper that there isn't, or that doesn't take what it is given."""
    if name in OWN_WRAPPERS:
        takes = OWN_WRAPPERS[name]
        if set(given) != set(takes):
            wanted = ", ".join(f"{argument}: a number" for argument in takes) or "nothing"
            raise ValueError(f"wrapper {name} takes {wanted}, got {dict(given)}")
        for argument, value in given.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"wrapper {name}: {argument} is a whole number from 1, got {value!r}")
        return
    found = getattr(gymnasium.wrappers, name, None)
    if not (isinstance(found, type) and issubclass(found, gymnasium.Wrapper)):
        known = [w for w in gymnasium.wrappers.__all__ if w[:1].isupper() and w != "vector"]
        raise ValueError(f"no wrapper '{name}'{nearest(name, [*OWN_WRAPPERS, *known])}")
    try:
        inspect.signature(found).bind(None, **given)
    except TypeError as cause:
        raise ValueError(f"wrapper {name}: {cause}") from cause


Wrappers = Annotated[dict[str, dict[str, Any] | None], AfterValidator(_known_wrappers)]
"""Wrappers by name, lab's or of ``gymnasium.wrappers``, with the arguments that they take."""


def _is_picture(space: Any) -> bool:
    shape: tuple[int, ...] = getattr(space, "shape", None) or ()
    pixels = isinstance(space, Box) and space.dtype == np.uint8 and len(shape) == 3
    return pixels and shape[-1] in CHANNELS and shape[0] not in CHANNELS
