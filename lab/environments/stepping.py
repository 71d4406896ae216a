"""Stepping many environments together: gymnasium's several conventions made one, and their state kept.

An episode that ends is followed by a new one at once; what it ended with is apart, for values to be estimated from.
Gymnasium's vector environments do that in the same step, or spend the next one on it, which then is no step at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from typing_extensions import override

from lab.encoding import Unsavable, decoded, encoded, stateful
from lab.environments.batched import Flags, Floats
from lab.errors import UserError

Array = NDArray[Any]


class EnvironmentFailed(UserError):
    """An environment raised, or is not the one that a training was left with."""

    exit_code = 1


@dataclass
class Step:
    """A step of N environments.

    Args:
        observations: ``[N, ...]``, what the next actions answer.
        rewards: ``[N]``.
        terminated: ``[N]``: the episode has come to its end.
        truncated: ``[N]``: it was cut off, by a time limit say.
        final: ``[K, ...]``: what the K episodes that are over ended with, in the order of the environments.
        valid: ``[N]``, or None for all: whether it was a step, or a new episode's beginning spent one.
    """

    observations: Array
    rewards: Floats
    terminated: Flags
    truncated: Flags
    final: Array | None = None
    valid: Flags | None = None

    @property
    def done(self) -> Flags:
        """``[N]``: the episode is over."""
        return self.terminated | self.truncated


class Environments(ABC):
    """N environments.

    Args:
        count: N.
        observed: the space of one's observations.
        acted: the space of one's actions.
        named: what errors call them.
    """

    def __init__(self, count: int, observed: Space[Any], acted: Space[Any], named: str) -> None:
        self.count = count
        self.observation_space = observed
        self.action_space = acted
        self.named = named

    @property
    def together(self) -> bool:
        """Whether a step of many costs little more than one of few."""
        return False

    @property
    def spends_steps(self) -> bool:
        """Whether an episode's beginning takes the place of a step."""
        return False

    @abstractmethod
    def reset(self, seed: int | None = None) -> Array:
        """Begin an episode everywhere; None goes on with what randomness there is. ``[N, ...]``."""

    @abstractmethod
    def step(self, actions: Array) -> Step:
        """A step everywhere, ``[N, ...]`` actions.

        Raises:
            EnvironmentFailed: an environment raised; the message says which, and at which step.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where they are, as plain data."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            EnvironmentFailed: it cannot be got back to.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what they hold."""


class Vectorised(Environments):
    """A vector environment of gymnasium's making, with whichever way it has of beginning new episodes."""

    def __init__(self, vector: VectorEnv[Any, Any, Any], named: str) -> None:
        super().__init__(vector.num_envs, vector.single_observation_space, vector.single_action_space, named)
        self.vector = vector
        self.mode = vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._over = np.zeros(self.count, dtype=bool)
        self._steps = 0

    @override
    @property
    def together(self) -> bool:
        return True

    @override
    @property
    def spends_steps(self) -> bool:
        return bool(self.mode == AutoresetMode.NEXT_STEP)

    @override
    def reset(self, seed: int | None = None) -> Array:
        observations: Array = self._asked(self.vector.reset, seed=seed)[0]
        self._over[:] = False
        return observations

    @override
    def step(self, actions: Array) -> Step:
        observations, rewards, terminated, truncated, info = self._asked(self.vector.step, actions)
        self._steps += 1
        step = Step(observations, np.asarray(rewards, np.float64), terminated, truncated)
        done = step.done
        if self.spends_steps:
            step.valid, self._over = (~self._over if self._over.any() else None), done
        if done.any():
            match self.mode:
                case AutoresetMode.SAME_STEP:
                    step.final = np.stack(list(info["final_obs"][done]))
                case AutoresetMode.NEXT_STEP:
                    step.final = observations[done]
                case _:
                    step.final = observations[done]
                    step.observations = self._asked(self.vector.reset, options={"reset_mask": done})[0]
        return step

    @override
    def state_dict(self) -> dict[str, Any]:
        owner: Any = self.vector.unwrapped
        state = owner.state_dict() if stateful(owner) else self._attributes(owner)
        return {"environments": state, "over": encoded(self._over), "steps": self._steps}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        owner: Any = self.vector.unwrapped
        self._over, self._steps = decoded(state_dict["over"]), state_dict["steps"]
        if stateful(owner):
            owner.load_state_dict(state_dict["environments"])
            return
        for name, value in state_dict["environments"].items():
            setattr(owner, name, decoded(value))

    @override
    def close(self) -> None:
        self.vector.close()

    def _attributes(self, owner: Any) -> dict[str, Any]:
        """What a foreign vector environment holds; what it is made of, and that never changes, is left out."""
        found = {}
        for name, value in vars(owner).items():
            if isinstance(value, Space | gymnasium.envs.registration.EnvSpec) or callable(value):
                continue
            try:
                found[name] = encoded(value)
            except Unsavable as cause:
                said = f"{self.named}: its attribute '{name}' cannot be saved ({cause})"
                raise Unsavable(f"{said}: `vectorization: serial` keeps single ones by their actions") from cause
        return found

    def _asked(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except Exception as cause:  # anyone's environment
            where = f"{self.named}, {self.count} at once, at step {self._steps + 1} of each"
            raise EnvironmentFailed(_raised(where, cause)) from cause


class Serial(Environments):
    """Single environments, one after the other.

    An episode is a function of its seed, made of the training's, the environment and the episode's number, and of the
    actions in it: so its state is these, and going on plays them again.
    """

    def __init__(self, environments: Sequence[gymnasium.Env[Any, Any]], named: str) -> None:
        first = environments[0]
        super().__init__(len(environments), first.observation_space, first.action_space, named)
        self.environments = environments
        self._seed = 0
        self._episodes = [0] * self.count
        self._actions: list[list[Any]] = [[] for _ in environments]
        self._returns = np.zeros(self.count)
        self._last: list[Any] = [None] * self.count

    @override
    def reset(self, seed: int | None = None) -> Array:
        if seed is not None:
            self._seed, self._episodes = seed, [0] * self.count
        return np.stack([self._begun(i) for i in range(self.count)])

    @override
    def step(self, actions: Array) -> Step:
        count = self.count
        rewards, terminated, truncated = np.zeros(count), np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        final, seen = [], []
        for i in range(count):
            observation, rewards[i], terminated[i], truncated[i] = self._moved(i, actions[i])
            if terminated[i] or truncated[i]:
                final.append(observation)
                observation = self._begun(i)
            seen.append(observation)
        return Step(np.stack(seen), rewards, terminated, truncated, np.stack(final) if final else None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed, "episodes": list(self._episodes), "returns": self._returns.tolist(),
            "actions": [encoded(np.asarray(each)) for each in self._actions], "last": encoded(self._last),
        }  # fmt: skip

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._seed, last = state_dict["seed"], decoded(state_dict["last"])
        self._episodes = [episodes - 1 for episodes in state_dict["episodes"]]
        for i, saved in enumerate(state_dict["actions"]):
            self._begun(i)
            for action in decoded(saved):
                self._moved(i, action)
            if not np.array_equal(self._last[i], last[i]) or self._returns[i] != state_dict["returns"][i]:
                raise EnvironmentFailed(
                    f"{self._which(i)}: its {len(self._actions[i])} actions, played again from its seed, lead "
                    "elsewhere than they did: it has changed, or is not a function of seed and actions, so the "
                    "training cannot go on exactly; `lab fit` trains it anew"
                )

    @override
    def close(self) -> None:
        for environment in self.environments:
            environment.close()

    def _begun(self, i: int) -> Any:
        seed = np.random.SeedSequence((self._seed, i, self._episodes[i])).generate_state(1)
        self._actions[i], self._returns[i] = [], 0.0
        self._episodes[i] += 1
        self._last[i] = self._asked(i, lambda: self.environments[i].reset(seed=int(seed[0])))[0]
        return self._last[i]

    def _moved(self, i: int, action: Any) -> tuple[Any, float, bool, bool]:
        action = np.array(action)
        self._actions[i].append(action)
        said = action.item() if action.ndim == 0 else action
        observation, reward, terminated, truncated, _ = self._asked(i, lambda: self.environments[i].step(said))
        self._last[i] = np.array(observation)  # some write the next one into the same array
        self._returns[i] += float(reward)
        return self._last[i], float(reward), bool(terminated), bool(truncated)

    def _asked(self, i: int, method: Callable[[], Any]) -> Any:
        try:
            return method()
        except Exception as cause:  # anyone's environment
            raise EnvironmentFailed(_raised(self._which(i), cause)) from cause

    def _which(self, i: int) -> str:
        step, episode = len(self._actions[i]), self._episodes[i]
        return f"{self.named}, number {i + 1} of {self.count}, at step {step} of episode {episode}"


class Stacked(Environments):
    """The last few observations as one, end to end along their first axis; an episode begins with copies of its first.

    Args:
        inner: whose observations they are.
        size: how many.
    """

    def __init__(self, inner: Environments, size: int) -> None:
        space = inner.observation_space
        assert isinstance(space, Box)
        low, high = (np.concatenate([bound] * size) for bound in (space.low, space.high))
        super().__init__(inner.count, Box(low, high, dtype=space.dtype.type), inner.action_space, inner.named)
        self.inner = inner
        self.size = size
        self._frames: Array = np.zeros(0)

    @override
    @property
    def together(self) -> bool:
        return self.inner.together

    @override
    @property
    def spends_steps(self) -> bool:
        return self.inner.spends_steps

    @override
    def reset(self, seed: int | None = None) -> Array:
        self._frames = self._alone(self.inner.reset(seed))
        return self._frames.copy()

    @override
    def step(self, actions: Array) -> Step:
        step = self.inner.step(actions)
        done = step.done
        before, width = self._frames, step.observations.shape[1]
        self._frames = np.concatenate([before[:, width:], step.observations], axis=1)
        if step.final is not None:
            step.final = np.concatenate([before[done][:, width:], step.final], axis=1)
        fresh = done
        if self.spends_steps:
            fresh = np.zeros_like(done) if step.valid is None else ~step.valid
        if fresh.any():
            self._frames[fresh] = self._alone(step.observations[fresh])
        step.observations = self._frames.copy()
        return step

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "frames": encoded(self._frames)}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self._frames = decoded(state_dict["frames"])

    @override
    def close(self) -> None:
        self.inner.close()

    def _alone(self, observations: Array) -> Array:
        return np.concatenate([observations] * self.size, axis=1)


def _raised(where: str, cause: Exception) -> str:
    said = " ".join(str(cause).split())
    return (
        f"{where}: raised {type(cause).__name__}{f': {said}' if said else ''}; "
        "the last state that was saved is intact, `lab resume` goes on from it"
    )
