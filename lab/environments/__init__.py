"""Environments: one a file; how they are named in recipes, found in gymnasium, and made many at once.

A recipe names a registered environment, ``{name: acrobot, max_episode_steps: 100}``, or any of gymnasium's by its id,
``Acrobot-v1``. What is registered is a class of gymnasium's ``Env``, of which as many are made as are wanted, or of its
``VectorEnv``, which is many by itself.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import VectorEnv
from pydantic import AfterValidator

from lab.registry import nearest


class Environment(ABC):  # noqa: B024  # what an entry's class is checked against
    """One environment, or many in one: gymnasium's ``Env`` and ``VectorEnv``."""


Environment.register(gymnasium.Env)
Environment.register(VectorEnv)

EnvironmentFactory: TypeAlias = Callable[..., gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]]
"""A registered environment with its arguments bound."""

BATCHED = {"Acrobot-v1": "acrobot", "Pendulum-v1": "pendulum", "MountainCar-v0": "mountain_car"}
"""Lab's own vector forms of gymnasium's environments, step by step the same."""
PACKAGES = {
    "ALE": "ale-py", "MiniGrid": "minigrid", "BabyAI": "minigrid", "bsuite": "bsuite", "highway": "highway-env",
    "procgen": "procgen", "dm_control": "shimmy[dm-control]", "metaworld": "metaworld",
}  # fmt: skip
"""What brings the environments of a namespace, or with a name that begins so."""


class EnvironmentMissing(ValueError):
    """No environment has that id, or a package that it needs is not installed."""


def find(id: str) -> EnvSpec:
    """What gymnasium knows of an id; its code is imported, nothing is made.

    Raises:
        EnvironmentMissing: the message has the nearest id, or the line that installs what is missing.
    """
    spec = gymnasium.registry.get(id)
    if spec is None:
        raise EnvironmentMissing(_unknown(id))
    if isinstance(spec.entry_point, str):
        try:
            load_env_creator(spec.entry_point)
        except (gymnasium.error.DependencyNotInstalled, ImportError) as cause:
            raise EnvironmentMissing(_uninstalled(id, cause)) from cause
    return spec


def _known(id: str) -> str:
    find(id)
    return id


EnvironmentId = Annotated[str, AfterValidator(_known)]
"""The id of one of gymnasium's environments, whose packages are there."""


def registered(name: str) -> Any:
    """The class of a registered environment."""
    from lab.registry import environments

    return environments.find(name).load()


def _unknown(id: str) -> str:
    from lab.registry import environments

    said = f"no environment '{id}'"
    if ":" in id:
        return f"{said}: `--import {id.partition(':')[0]}` has its package register it; here the id stands alone"
    begins = id.partition("/")[0] if "/" in id else id.partition("-")[0]
    package = PACKAGES.get(begins)
    if package is not None:
        module = package.partition("[")[0].replace("-", "_")
        return f"{said}: pip install '{package}', and `--import {module}`, which registers it"
    same = [known for known in gymnasium.registry if known.rpartition("-v")[0] == id.rpartition("-v")[0] or
            known.rpartition("-v")[0] == id]  # fmt: skip
    if same:
        return f"{said} (did you mean {' or '.join(map(repr, sorted(same)))}?)"
    hint = nearest(id, [*gymnasium.registry, *environments.names()])
    return f"{said}{hint}" if "did you mean" in hint else f"{said}: `lab list environments`, or one of gymnasium's ids"


def _uninstalled(id: str, cause: Exception) -> str:
    said = " ".join(str(cause).split())
    if "pip install" in said:
        return f"environment {id}: {said}"
    module = getattr(cause, "name", None) or said
    return f"environment {id} needs {module}, which is not installed: pip install {module.partition('.')[0]}"
