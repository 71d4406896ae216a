"""PPO's clipping against closed forms, its sameness with the actor-critic where nothing is clipped, its limits."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Adam

sys.path.insert(0, str(Path(__file__).parent))

import dataclasses

from recorded import recorded
from test_actor_critic import QUIET, SMALL, Listening, update

from lab import fit, registry
from lab.batch import Rollout
from lab.document import RecipeError
from lab.modules.actor_critic import ActorCritic
from lab.modules.ppo import PPO, clipped_error, clipped_surrogate
from lab.modules.reinforcement import Reinforcement
from lab.networks.mlp import MLP
from lab.stages import StageFailed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
GIVEN: dict[str, Any] = {"action_space": {"choices": [2]}, "input_shape": (3,), "entropy_weight": 0.01}


def adam(parameters: Any) -> Adam:
    return Adam(parameters, lr=0.01)


def built(kind: type[Reinforcement], **given: Any) -> Any:
    torch.manual_seed(0)
    return kind(network=MLP(2, (3,), (8,)), optimizer=adam, **GIVEN, **given)


def as_played(module: Reinforcement, rollout: Rollout) -> Rollout:
    """The rollout with the log-probabilities that the policy gives its actions."""
    with torch.no_grad():
        outputs = module(rollout.observations.flatten(0, 1))
        logs, _ = module.actions.judged(outputs, rollout.actions.flatten(0, 1))
    return dataclasses.replace(rollout, log_probs=logs.view(rollout.rewards.shape))


def test_with_one_pass_one_batch_and_no_clipping_it_is_the_actor_critic() -> None:
    rollout = as_played(built(ActorCritic), recorded(Rollout, 10, 0))
    same = {"gae_lambda": 0.9, "normalize_advantages": True}
    first = update(built(ActorCritic, **same), rollout)
    second = update(built(PPO, epochs=1, minibatches=1, clip=1e9, **same), rollout)
    before = built(PPO).state_dict()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(before[name], first[name]) for name in before)


def test_a_ratio_that_has_gone_far_enough_gives_no_more_gradient() -> None:
    ratios = torch.tensor([0.5, 0.9, 1.1, 1.5, 0.5, 0.9, 1.1, 1.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    found = clipped_surrogate(ratios, advantages, 0.2)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.9, 1.1, 1.2, -0.8, -0.9, -1.1, -1.5]))
    found.sum().backward()
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [1, 1, 1, 0, 0, -1, -1, -1]


def test_a_value_that_has_gone_far_enough_is_judged_by_where_it_was_allowed() -> None:
    values, old = torch.tensor([0.0, 0.5, 2.0, -2.0]), torch.zeros(4)
    found = clipped_error(values, old, torch.ones(4), 0.2)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.64, 1.0, 9.0]))


def test_every_step_is_in_one_minibatch_of_each_pass() -> None:
    seen: list[list[float]] = []

    class Seen(PPO):
        def loss(self, steps: Any) -> Any:
            seen.append(sorted(steps.log_probs.tolist()))
            return super().loss(steps)

    rollout = recorded(Rollout, 10, 0)
    update(built(Seen, epochs=3, minibatches=4), rollout)
    whole = sorted(rollout.log_probs.flatten().tolist())
    assert len(seen) == 12
    for start in range(0, 12, 4):
        assert sorted(itertools.chain(*seen[start : start + 4])) == whole
    assert seen[0] != seen[4]


def test_an_update_that_goes_too_far_is_the_last_of_its_rollout() -> None:
    counted: list[int] = []

    class Counted(PPO):
        def _descend(self, loss: Any, *, counts: bool) -> None:
            counted.append(1)
            super()._descend(loss, counts=counts)

    rollout = recorded(Rollout, 10, 0)  # played by another policy: far from the beginning
    update(built(Counted, epochs=3, minibatches=4, target_kl=1e-4), rollout)
    assert len(counted) == 1
    update(built(Counted, epochs=3, minibatches=4, target_kl=1e4), rollout)
    assert len(counted) == 1 + 12


def test_the_clip_range_goes_to_its_end_in_a_straight_line() -> None:
    found: list[float] = []

    class Noted(PPO):
        def prepared(self, rollout: Any, rewards: Any) -> Any:
            found.append(self.clip_now)
            return super().prepared(rollout, rewards)

    update(built(Noted, clip=0.4, clip_end=0.0), *[recorded(Rollout, 10, n) for n in range(4)])
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_it_learns_to_balance() -> None:
    run = fit({
        "data": {**SMALL, "num_envs": 16, "rollout": 64, "env_steps": 20_480, "rollouts_per_epoch": 10,
                 "test_episodes": 10}, **QUIET,
        "module": {"name": "ppo", "network": {"name": "mlp", "hidden": [32]}, "critic": "shared",
                   "optimizer": {"name": "adam", "lr": 0.003}},
    })  # fmt: skip
    assert run.results["stages"]["main"]["metrics"]["test/return"] > 150  # at random about 20


def test_what_is_logged_is_what_a_user_of_ppo_looks_for() -> None:
    registry.callbacks.register("listening_to_rollouts")(Listening)
    run = fit({"data": SMALL, **QUIET, "trainer": {"log_every_n_steps": 5},
               "module": {"name": "ppo", "network": {"name": "mlp", "hidden": [8]}}})  # fmt: skip
    columns = (run.stage("main") / "metrics.csv").read_text().partition("\n")[0].split(",")
    wanted = ("loss", "policy", "value", "entropy", "kl", "clip_fraction", "explained_variance", "return", "length",
              "env_steps", "env_steps_per_second")  # fmt: skip
    assert {f"train/{name}" for name in wanted} | {"val/return", "val/length"} <= set(columns)
    found = run.results["stages"]["main"]["metrics"]
    assert found["train/kl"] >= 0
    assert 0 <= found["train/clip_fraction"] <= 1


def test_minibatches_that_do_not_divide_a_rollout_are_refused_with_such_that_do() -> None:
    with pytest.raises(RecipeError, match=r"minibatches=7 does not divide the 64 steps of a rollout: 1, 2, 4, 8 do"):
        fit({"data": SMALL, "module": {"name": "ppo", "network": "mlp", "minibatches": 7}})


def test_a_clip_range_that_ends_nobody_knows_when_is_refused() -> None:
    with pytest.raises(StageFailed, match=r"clip_end goes over all rollouts"):
        fit({"data": {**SMALL, "rollout": "episodes"}, **QUIET,
             "module": {"name": "ppo", "network": "mlp", "clip_end": 0.0}})  # fmt: skip
