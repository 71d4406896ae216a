"""Environments as data: lab's own against gymnasium's, what a rollout holds, state that is kept, what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from lab import fit, registry
from lab.batch import Rollout, WholeEpisodes
from lab.check import check
from lab.cli import main
from lab.datamodules.gym import Gym
from lab.datamodules.rollouts import Judging, Rollouts
from lab.document import RecipeError
from lab.environments.acrobot import Acrobot
from lab.environments.acting import described, to_environment
from lab.environments.batched import Batched
from lab.environments.making import Making
from lab.environments.mountain_car import MountainCar
from lab.environments.pendulum import Pendulum
from lab.environments.stepping import EnvironmentFailed
from lab.recipe import load
from lab.stages import StageFailed
from lab.types import check_types
from lab.verification import verify

QUIET = {"callbacks": {"profile": None, "progress": None, "evaluation": {"film": False}}, "logger": "csv"}


class Coin:
    """A policy that draws one of two actions, whatever it sees."""

    def act(self, observations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        actions = torch.randint(2, (len(observations),), generator=generator)
        return actions, torch.full((len(observations),), -0.6931)

    def best(self, observations: Tensor) -> Tensor:
        return (observations[:, 2] > 0).long()


class Coins(Coin):
    """Two at a time."""

    def act(self, observations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randint(2, (len(observations), 2), generator=generator), torch.zeros(len(observations))


def rollouts(
    environment: Any = "CartPole-v1", *, count: int = 4, steps: int | None = 60, policy: Any = None, **making: Any
) -> Rollouts:  # fmt: skip
    made = Making(environment, **making).make(count)
    return Rollouts(made, policy or Coin(), steps=steps, length=3, seed=0)


# Lab's own environments

SINGLE = (835, 1506, 1692)
"""Seeds whose Acrobots begin where a cosine of single precision is not that of double precision, rounded."""


@pytest.mark.parametrize("kind", [Acrobot, Pendulum, MountainCar])
def test_a_batched_environment_is_gymnasiums_bit_for_bit(kind: type[Batched]) -> None:
    count, steps = 4, 2500  # 10,000 steps, over several ends of episodes
    theirs = SyncVectorEnv([lambda: gymnasium.make(kind.id)] * count, autoreset_mode=AutoresetMode.SAME_STEP)
    own, random = kind(num_envs=count), np.random.default_rng(0)
    assert own.single_observation_space == theirs.single_observation_space
    assert own.single_action_space == theirs.single_action_space
    for seed in (*SINGLE, 3):
        np.testing.assert_array_equal(own.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
    ends = 0
    for _ in range(steps):
        actions = random.uniform(-2.5, 2.5, (count, 1)) if kind is Pendulum else random.integers(3, size=count)
        actions = actions.astype(own.single_action_space.dtype)
        found, expected = own.step(actions), theirs.step(actions)
        for field, (mine, other) in enumerate(zip(found[:4], expected[:4], strict=True)):
            assert mine.dtype == other.dtype
            np.testing.assert_array_equal(mine, other, err_msg=f"field {field}")
        assert ("final_obs" in found[4]) == ("final_obs" in expected[4])
        if "final_obs" in expected[4]:
            over = expected[4]["_final_obs"]
            ends += int(over.sum())
            np.testing.assert_array_equal(found[4]["_final_obs"], over)
            np.testing.assert_array_equal(found[4]["final_obs"][over], np.stack(list(expected[4]["final_obs"][over])))
    assert ends >= 16


@pytest.mark.parametrize("id", ["Acrobot-v1", "Pendulum-v1", "MountainCar-v0"])
def test_an_id_has_the_batched_form_where_there_is_one(id: str) -> None:
    assert isinstance(Making(id).make(2).vector.unwrapped, Batched)  # type: ignore[attr-defined]
    single = Making(id, vectorization="serial").make(2)
    assert [environment.spec.id for environment in single.environments] == [id, id]  # type: ignore[attr-defined]


def test_gymnasiums_own_vector_form_is_used() -> None:
    made = Making("CartPole-v1", {"time_limit": {"steps": 9}}).make(3)
    assert type(made.vector.unwrapped).__name__ == "CartPoleVectorEnv"  # type: ignore[attr-defined]
    assert made.vector.unwrapped.max_episode_steps == 9  # type: ignore[attr-defined]


# What a rollout holds


def test_a_rollout_goes_on_where_the_last_one_ended() -> None:
    first, second, _ = rollouts("Acrobot-v1")
    assert first.observations.shape == (60, 4, 6)
    assert torch.equal(first.last_observations, second.observations[0])
    assert (first.env_steps, second.env_steps) == (240, 480)
    assert isinstance(first, Rollout)
    assert first.valid is None


def test_no_dummy_transition_is_a_step() -> None:
    """Gymnasium's vector CartPole spends a step on beginning anew: it is marked, whichever rollout it falls into."""
    played = list(rollouts())
    done = torch.cat([r.terminated | r.truncated for r in played])
    valid = torch.cat([torch.ones(60, 4, dtype=torch.bool) if r.valid is None else r.valid for r in played])
    assert torch.equal(~valid[1:], done[:-1])
    assert (~valid).sum() > 10
    assert valid[0].all()
    observations = torch.cat([r.observations for r in played])
    assert (observations[1:][done[:-1]][:, 2].abs() > 0.2).all()  # the fallen pole stands in the place of a beginning


@pytest.mark.parametrize("vectorization", ["auto", "serial"])
def test_returns_and_lengths_are_those_of_episodes(vectorization: Any) -> None:
    played = list(rollouts(vectorization=vectorization))
    returns, lengths = (
        torch.cat([getattr(r, f"episode_{name}") for r in played]) for name in ("returns", "lengths")
    )  # fmt: skip
    assert returns.tolist() == lengths.tolist()  # CartPole gives 1 a step
    assert len(returns) == sum(int((r.terminated | r.truncated).sum()) for r in played)


@pytest.mark.parametrize("vectorization", ["auto", "serial"])
def test_what_was_cut_off_is_what_came_before_the_new_beginning(vectorization: Any) -> None:
    played = next(iter(rollouts("Pendulum-v1", vectorization=vectorization, steps=201)))
    assert played.truncated[199].all()
    assert played.final_steps.tolist() == [199 * 4 + env for env in range(4)]
    single = gymnasium.make("Pendulum-v1")
    assert played.final_observations.shape == (4, 3)
    apart = (played.final_observations - played.observations[200]).abs().amax(1)
    assert (apart > 1e-3).all()
    angle = torch.atan2(played.observations[199][:, 1], played.observations[199][:, 0])
    after = torch.atan2(played.final_observations[:, 1], played.final_observations[:, 0])
    turn = torch.remainder(after - angle + torch.pi, 2 * torch.pi) - torch.pi
    torch.testing.assert_close(turn, played.final_observations[:, 2] * 0.05, rtol=0, atol=1e-5)
    single.close()


def test_what_has_terminated_is_not_to_be_estimated() -> None:
    played = list(rollouts("CartPole-v1"))
    assert torch.cat([each.terminated for each in played]).any()
    assert all(len(each.final_steps) == 0 for each in played)  # the pole falls long before the time limit
    cut = next(iter(rollouts("CartPole-v1", wrappers={"time_limit": {"steps": 5}})))
    assert torch.equal(cut.final_steps, (cut.truncated & ~cut.terminated).flatten().nonzero().squeeze(1))
    assert len(cut.final_steps) > 10


def test_every_rollout_draws_anew() -> None:
    first, second, _ = rollouts("Acrobot-v1")
    assert not torch.equal(first.actions, second.actions)


def test_whole_episodes_begin_anew_and_end_once() -> None:
    first, second, _ = rollouts(steps=None)
    for played in (first, second):
        assert isinstance(played, WholeEpisodes)
        assert played.valid is not None
        ends = ((played.terminated | played.truncated) & played.valid).sum(0)
        assert ends.tolist() == [1, 1, 1, 1]
        assert sorted(played.episode_lengths.tolist()) == sorted(played.valid.sum(0).tolist())
        assert (played.observations[0].abs() < 0.06).all()
    assert not torch.equal(first.observations[0], second.observations[0])


def test_frames_are_stacked_and_do_not_reach_across_episodes() -> None:
    played = next(iter(rollouts("Acrobot-v1", wrappers={"frame_stack": {"size": 3}, "time_limit": {"steps": 5}})))
    seen = played.observations
    assert seen.shape == (60, 4, 18)
    newest = seen[..., 12:]
    for time in range(60):
        ago = time % 5
        assert torch.equal(seen[time, :, 6:12], newest[time - min(1, ago)])
        assert torch.equal(seen[time, :, :6], newest[time - min(2, ago)])
    assert torch.equal(played.final_observations[0, :12], seen[4, 0, 6:])
    other = next(iter(rollouts(wrappers={"frame_stack": {"size": 2}})))  # whose beginnings take a step
    assert other.valid is not None
    begun = torch.cat([torch.ones(1, 4, dtype=torch.bool), ~other.valid[:-1]])
    assert torch.equal(other.observations[begun][:, :4], other.observations[begun][:, 4:])


def test_evaluation_plays_the_same_episodes_each_time_and_one_for_each() -> None:
    judging = Judging(Making("CartPole-v1").make, Coin(), episodes=7, at_once=3, seed=5, recorded=True)
    first, second = list(judging), list(judging)
    assert [len(part) for part in first] == [3, 3, 1]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.returns, other.returns)
        assert torch.equal(one.observations, other.observations)
    steps = torch.cat([part.episode for part in first]).bincount()
    assert steps.tolist() == torch.cat([part.lengths for part in first]).tolist()
    assert len({tuple(part.observations[0].tolist()) for part in first}) == 3


def test_training_validation_and_test_have_seeds_of_their_own() -> None:
    data = Gym("Acrobot-v1", num_envs=2, rollout=4)
    data.trainer = type("T", (), {"lightning_module": Coin(), "world_size": 1, "global_rank": 0})()
    firsts = [next(iter(data.train_dataloader())).observations[0, 0]]
    firsts += [data._judging(split, 1, recorded=True) for split in ("val", "test")]
    seeds = {part.seed for part in firsts[1:]}
    assert len(seeds) == 2


# Spaces


@pytest.mark.parametrize(
    ("space", "described_as", "actions", "given"),
    [
        (Discrete(3, start=2), {"choices": [3]}, [0, 2], [2, 4]),
        (MultiDiscrete([2, 3]), {"choices": [2, 3], "several": True}, [[0, 2]], [[0, 2]]),
        (Box(-1, 1, (2,), np.float32), {"low": [-1, -1], "high": [1, 1]}, [[3.0, -0.5]], [[1.0, -0.5]]),
        (Box(-1, 1, (1, 2), np.float32), {"low": [-1, -1], "high": [1, 1]}, [[3.0, -0.5]], [[[1.0, -0.5]]]),
    ],
)
def test_actions_are_brought_into_the_environments_space(
    space: Any, described_as: Any, actions: Any, given: Any
) -> None:
    assert described(space, "X") == described_as
    assert to_environment(np.array(actions), space).tolist() == given


class Wall(gymnasium.Env[Any, Any]):
    """A picture in which a bright column is to be told from two choices each of two; counts its steps.

    Args:
        breaks_at: the step at which it raises.
        random: whether its rewards are those of no seed.
    """

    def __init__(self, breaks_at: int = 10**9, random: bool = False) -> None:
        self.observation_space = Box(0, 255, (16, 16, 1), np.uint8)
        self.action_space = MultiDiscrete([2, 2])
        self.breaks_at, self.random, self.steps = breaks_at, random, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 5
        return self._picture(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps, self.left = self.steps + 1, self.left - 1
        if self.steps >= self.breaks_at:
            raise ZeroDivisionError("the wall fell")
        reward = float(action[0] == self.side) + float(action[1] == 1)
        if self.random:
            reward += float(np.random.default_rng().normal())
        return self._picture(), reward, self.left == 0, False, {}

    def _picture(self) -> Any:
        self.side = int(self.np_random.integers(2))
        picture = np.zeros((16, 16, 1), np.uint8)
        picture[:, 8 * self.side : 8 * self.side + 8] = 255
        return picture


def wall(**module: Any) -> dict[str, Any]:
    registry.environments.register("wall")(Wall)
    return {
        "data": {"name": "gym", "environment": {"name": "wall"}, "num_envs": 4, "rollout": 32, "env_steps": 128 * 6,
                 "rollouts_per_epoch": 3, "val_episodes": 4, "test_episodes": 8}, **QUIET,
        "module": {"name": "ppo", "network": "lenet", "optimizer": {"name": "adam", "lr": 0.003}, **module},
    }  # fmt: skip


def test_a_registered_environment_of_pictures_and_several_choices_is_learnt_by_a_convolutional_policy() -> None:
    run = fit(wall(critic="shared"))
    assert run.results["stages"]["main"]["metrics"]["test/return"] > 8  # of 10; at random 5


# State


@pytest.mark.parametrize("vectorization", ["auto", "serial"])
@pytest.mark.parametrize("environment", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1"])
def test_what_is_saved_leads_on_to_the_same(environment: str, vectorization: Any, tmp_path: Path) -> None:
    def made() -> Rollouts:
        return rollouts(environment, steps=70, vectorization=vectorization)

    whole = list(made())
    left = made()
    next(iter(left))
    torch.save(left.state_dict(), tmp_path / "state.pt")
    resumed = made()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for expected, found in zip(whole[1:], itertools.islice(iter(resumed), 2), strict=True):
        for name, value in vars(expected).items():
            other = getattr(found, name)
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


def test_an_environment_that_is_no_function_of_its_seed_cannot_be_gone_on_with() -> None:
    class Chance(Wall):
        def __init__(self) -> None:
            super().__init__(random=True)

    left = rollouts(Chance, steps=7, policy=Coins())
    next(iter(left))
    with pytest.raises(EnvironmentFailed, match=r"number 1 of 4, .* played again from its seed, lead elsewhere"):
        rollouts(Chance, steps=7, policy=Coins()).load_state_dict(left.state_dict())


def test_left_and_gone_on_with_single_environments_end_as_ones_that_were_not(tmp_path: Path) -> None:
    recipe = {
        "data": {"name": "gym", "environment": "CartPole-v1", "vectorization": "serial", "num_envs": 2, "rollout": 24,
                 "val_episodes": 1},
        "module": {"name": "ppo", "network": {"name": "mlp", "hidden": [8]}, "epochs": 1}, **QUIET,
    }  # fmt: skip
    for verdict in verify(recipe, folder=tmp_path, places=(4,)):
        assert verdict.difference is None, str(verdict)


# Bad input


def said(data: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as error:
        check_types(check(load({"data": {"name": "gym", **data}, "module": {"name": "ppo", "network": "mlp"}})))
    return str(error.value)


def test_an_unknown_environment_is_told_the_nearest() -> None:
    assert "data.environment: no environment 'CartPol-v1' (did you mean 'CartPole-v1'" in said(
        {"environment": "CartPol-v1"}
    )
    assert "no environment 'Acrobot' (did you mean 'Acrobot-v1'?)" in said({"environment": "Acrobot"})
    assert "did you mean 'CartPole-v0' or 'CartPole-v1'?" in said({"environment": "CartPole-v9"})


def test_an_environment_whose_package_is_missing_is_told_the_line_that_installs_it() -> None:
    told = said({"environment": "ALE/Pong-v5"})
    assert "pip install 'ale-py', and `--import ale_py`, which registers it" in told
    gymnasium.register("Needs-v0", entry_point="a_package_that_is_not_there.envs:Env")
    try:
        assert "environment Needs-v0 needs a_package_that_is_not_there" in (told := said({"environment": "Needs-v0"}))
        assert "pip install a_package_that_is_not_there" in told
    finally:
        del gymnasium.registry["Needs-v0"]


def refused(*arguments: Any, **named: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # what it says is what is looked at
        Gym(*arguments, **named)
    return str(error.value)


def test_wrappers_that_are_none_or_take_other_arguments_are_refused() -> None:
    told = said({"environment": "CartPole-v1", "wrappers": {"frame_stak": {}}})
    assert "data.wrappers: no wrapper 'frame_stak' (did you mean 'frame_stack'" in told
    assert "wrapper time_limit takes steps: a number, got {}" in refused("CartPole-v1", wrappers={"time_limit": None})
    assert "steps is a whole number from 1, got 0" in refused("CartPole-v1", wrappers={"time_limit": {"steps": 0}})
    assert "wrapper ClipReward" in refused("CartPole-v1", wrappers={"ClipReward": {"nonsense": 1}})


def test_spaces_that_no_policy_has_are_refused() -> None:
    class Odd(Wall):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = Dict({"a": Discrete(2)})

    class Strange(Wall):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = Dict({"a": Discrete(2)})

    assert "not an array of numbers: `wrappers: {FlattenObservation: {}}`" in refused(Odd)
    assert "actions are Dict('a': Discrete(2)): policies have Discrete, MultiDiscrete and Box" in refused(Strange)


def test_a_wrapper_of_gymnasiums_is_taken_by_name() -> None:
    data = Gym("CartPole-v1", wrappers={"TimeAwareObservation": {}}, num_envs=2)
    assert data.input_shape == (5,)


def test_an_environment_that_raises_is_named_and_what_was_saved_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = wall()
    recipe["data"]["environment"] = {"name": "wall", "breaks_at": 170}
    with pytest.raises(StageFailed) as failed:
        fit(recipe)
    assert "Wall, number 1 of 4, at step 5 of episode 34: raised ZeroDivisionError: the wall fell" in str(failed.value)
    assert "the last state that was saved is intact, `lab resume` goes on from it" in str(failed.value)
    [run] = Path("runs").glob("*/*")
    assert main(["resume", str(run)]) == 0  # this time it has not yet been stepped so often


def test_a_module_that_does_not_act_is_refused() -> None:
    data = Gym("CartPole-v1")
    with pytest.raises(Exception, match="gym asks the module for actions, by its methods `act` and `best`"):
        data.policy()


# Pictures


def test_an_episode_is_drawn_and_without_pygame_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pygame")
    recipe = {
        "data": {"name": "gym", "environment": "CartPole-v1", "num_envs": 2, "rollout": 8, "env_steps": 32,
                 "rollouts_per_epoch": 1, "val_episodes": 1, "test_episodes": 1}, "logger": "csv",
        "module": {"name": "actor_critic", "network": {"name": "mlp", "hidden": [8]}},
        "callbacks": {"profile": None, "progress": None},
    }  # fmt: skip
    run = fit(recipe)
    assert (run.stage("main") / "pictures" / "episode.gif").read_bytes().startswith(b"GIF8")
    monkeypatch.setitem(__import__("sys").modules, "pygame", None)
    with pytest.warns(UserWarning, match=r"no film of an episode: .*; pip install 'lightning-lab\[render\]'"):
        run = fit(recipe, fresh=True)
    assert run.status == "finished"
    assert not (run.stage("main") / "pictures" / "episode.gif").exists()


def test_environments_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "environments", "--json"]) == 0
    assert {"acrobot", "pendulum", "mountain_car"} <= {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert main(["describe", "pendulum"]) == 0
    assert "gravity" in capsys.readouterr().out


def test_a_vector_environment_may_be_registered() -> None:
    registry.environments.register("short_acrobot")(Acrobot)
    assert issubclass(Acrobot, VectorEnv)
    data = Gym(registry.environments.find("short_acrobot").load(), num_envs=3, wrappers={"time_limit": {"steps": 7}})
    assert data.making.make(3).vector.unwrapped.max_episode_steps == 7  # type: ignore[attr-defined]
