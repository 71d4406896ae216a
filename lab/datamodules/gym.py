"""Environments of gymnasium, and registered ones, as data: rollouts of the policy that is trained.

Nothing is read: every batch is played when it is asked for, by the policy as it then is: see
:mod:`lab.datamodules.rollouts`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import gymnasium
from gymnasium.spaces import Box, Space
from lightning.pytorch import LightningDataModule

from lab.batch import Policy, Rollout, WholeEpisodes
from lab.datamodules.rollouts import Judging, Rollouts, seed_of
from lab.environments import EnvironmentFactory, EnvironmentId
from lab.environments.acting import described
from lab.environments.making import Making, Wrappers
from lab.errors import UserError
from lab.ranges import Count, checked

JUDGED_AT_ONCE = 100
"""Episodes played together to judge a policy, where the environments have a vector form."""


class Gym(LightningDataModule):
    """What the policy does in environments: any of gymnasium's, or a registered one, many at once.

    A batch is a rollout: ``rollout`` steps in each of ``num_envs`` environments, one step of the trainer. An epoch is
    ``rollouts_per_epoch`` of them, then the policy is judged in environments of its own. Training ends with the epoch
    that spends ``env_steps``, all processes' together; or earlier, by ``trainer.max_epochs`` or ``trainer.max_steps``.

    Args:
        environment: an id of gymnasium's, such as ``CartPole-v1``, or a registered environment.
        num_envs: environments at once, in each process.
        rollout: steps in each environment between two updates; ``episodes``: one episode from its beginning to its
            end in each.
        env_steps: steps of the environments, all together, that the training takes.
        rollouts_per_epoch: between two evaluations.
        val_episodes: played after each epoch, by the most probable actions.
        test_episodes: played at the end, and by ``lab test`` and ``lab predict``.
        wrappers: by name, each with its arguments: ``time_limit: {steps}``, ``frame_stack: {size}``,
            ``normalize_observation: {}``, ``normalize_reward: {}``, and gymnasium's for single environments.
        vectorization: ``serial`` steps single environments even where they have a vector form.
        seed: of the environments and of the actions that are drawn; the recipe's where it is left out.

    Raises:
        ValueError: there is no such environment or wrapper, or a package of it is missing; observations are no array,
            or actions neither numbers of choices nor a box.
    """

    yields: ClassVar[type] = Rollout
    yields_by: ClassVar[str] = "rollout"
    yields_episodes: ClassVar[type] = WholeEpisodes
    facts: ClassVar[tuple[str, ...]] = (
        "action_space", "num_classes", "input_shape", "in_channels", "rollout_size", "normalize_observations",
        "normalize_rewards",
    )  # fmt: skip
    trainer_defaults: ClassVar[dict[str, Any]] = {"max_epochs": -1, "num_sanity_val_steps": 0}
    """What the trainer is told where the recipe says nothing: the budget is in steps of the environments."""
    unsaved: ClassVar[tuple[str, ...]] = ("_rollouts", "_judged")

    @checked
    def __init__(
        self,
        environment: EnvironmentId | EnvironmentFactory,
        num_envs: Count = 16,
        rollout: Count | Literal["episodes"] = 128,
        *,
        env_steps: Count = 100_000,
        rollouts_per_epoch: Count = 10,
        val_episodes: Count = 20,
        test_episodes: Count = 100,
        wrappers: Wrappers | None = None,
        vectorization: Literal["auto", "serial"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.making = Making(environment, wrappers or {}, vectorization)
        self.num_envs = num_envs
        self.rollout = rollout
        self.env_steps = env_steps
        self.rollouts_per_epoch = rollouts_per_epoch
        self.val_episodes = val_episodes
        self.test_episodes = test_episodes
        self.seed = seed
        self._rollouts: Rollouts | None = None
        self._judged: dict[str, Judging] = {}
        probe = self.making.make(1)
        self._observed, self._acted = probe.observation_space, probe.action_space
        self._together = probe.together
        probe.close()
        self.input_shape = self._shape(self._observed)
        self.action_space = described(self._acted, self.making.named)

    @property
    def num_classes(self) -> int:
        """Outputs of a policy: a number for each choice, or the mean of each number."""
        return sum(self.action_space["choices"]) if "choices" in self.action_space else len(self.action_space["low"])

    @property
    def in_channels(self) -> int | None:
        """Channels of observations that are pictures."""
        return self.input_shape[0] if len(self.input_shape) == 3 else None

    @property
    def rollout_size(self) -> int | None:
        """Steps in a rollout of one process; None where episodes decide."""
        return self.rollout * self.num_envs if isinstance(self.rollout, int) else None

    @property
    def normalize_observations(self) -> bool | None:
        """Whether the policy is to see observations of mean 0 and deviation 1."""
        return True if "normalize_observation" in self.making.wrappers else None

    @property
    def normalize_rewards(self) -> bool | None:
        """Whether it is to learn from rewards whose discounted sum has deviation 1."""
        return True if "normalize_reward" in self.making.wrappers else None

    def fingerprint(self) -> str:
        """What decides the environments beside the recipe."""
        return f"{self.making.named} of gymnasium {gymnasium.__version__}"

    def setup(self, stage: str) -> None:
        """Tell the trainer how many epochs the budget is."""
        if stage != "fit" or self.trainer is None or (size := self.rollout_size) is None:
            return
        loop = self.trainer.fit_loop
        epochs = math.ceil(self.env_steps / (size * self.trainer.world_size * self.rollouts_per_epoch))
        loop.max_epochs = epochs if loop.max_epochs in (None, -1) else min(loop.max_epochs, epochs)

    def train_dataloader(self) -> Rollouts:
        """Rollouts of the module that the trainer trains."""
        self._rollouts = Rollouts(
            self.making.make(self.num_envs),
            self.policy(),
            steps=self.rollout if isinstance(self.rollout, int) else None,
            length=self.rollouts_per_epoch,
            seed=self.seed,
            rank=self._rank,
        )
        return self._rollouts

    def val_dataloader(self) -> Judging:
        """Episodes in environments of their own, the same after every epoch."""
        return self._judging("val", self.val_episodes)

    def test_dataloader(self) -> Judging:
        """Episodes that neither training nor validation has seen."""
        return self._judging("test", self.test_episodes)

    def predict_dataloader(self) -> Judging:
        """The test's episodes, step by step."""
        return self._judging("test", self.test_episodes, recorded=True)

    def teardown(self, stage: str) -> None:
        """Close what was opened."""
        opened = [self._rollouts.environments] if self._rollouts is not None else []
        for judging in self._judged.values():
            opened += judging._made.values()
        for environments in opened:
            environments.close()
        self._rollouts, self._judged = None, {}

    def _judging(self, split: str, episodes: int, *, recorded: bool = False) -> Judging:
        world = self.trainer.world_size if self.trainer is not None else 1
        own = (episodes + world - 1 - self._rank) // world
        made = Judging(
            self.making.make,
            self.policy(),
            episodes=own,
            at_once=JUDGED_AT_ONCE if self._together else self.num_envs,
            seed=seed_of(split, self.seed, self._rank),
            recorded=recorded,
        )
        self._judged[f"{split} {recorded}"] = made
        return made

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def policy(self) -> Policy:
        """The module that is trained, judged or asked, which acts."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if not (callable(getattr(module, "act", None)) and callable(getattr(module, "best", None))):
            named = type(module).__name__ if module is not None else "no module"
            raise UserError(
                f"gym asks the module for actions, by its methods `act` and `best`, and {named} has none: "
                "policy_gradient, actor_critic and ppo do"
            )
        policy: Policy = module
        return policy

    def _shape(self, space: Space[Any]) -> tuple[int, ...]:
        if isinstance(space, Box) and space.shape:
            return tuple(int(side) for side in space.shape)
        flatten = "`wrappers: {FlattenObservation: {}}` makes them one"
        raise ValueError(f"{self.making.named}'s observations are {space}, not an array of numbers: {flatten}")
