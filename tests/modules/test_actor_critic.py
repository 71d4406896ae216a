"""Advantages against closed forms and sums; the actor-critic's loss, its manners in a fit, and its promises."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import SGD

sys.path.insert(0, str(Path(__file__).parent))

from recorded import recorded

from lab import Run, fit, registry
from lab.batch import Rollout
from lab.callbacks import Lean
from lab.document import RecipeError
from lab.modules.actor_critic import ActorCritic, gae
from lab.modules.reinforcement import Reinforcement, normalized
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.normalization import Running
from lab.verification import verify

CHOICE: dict[str, Any] = {"choices": [2]}
SMALL = {"name": "gym", "environment": "CartPole-v1", "num_envs": 4, "rollout": 16, "env_steps": 640,
         "rollouts_per_epoch": 5, "val_episodes": 2, "test_episodes": 3}  # fmt: skip
QUIET = {"callbacks": {"profile": None, "progress": None, "evaluation": {"film": False}}, "logger": "csv"}


def built(**given: Any) -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(**{"network": MLP(2, (3,), (8,)), "action_space": CHOICE, "input_shape": (3,), **given})


def random(shape: tuple[int, int] = (12, 4)) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, values of last observations, and how steps ended, in float64."""
    generator = torch.Generator().manual_seed(3)
    rewards, values, final = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    terminated = torch.rand(shape, generator=generator) < 0.2
    truncated = (torch.rand(shape, generator=generator) < 0.2) & ~terminated
    return rewards, values, final, terminated, truncated


def followed(values: Tensor, final: Tensor, last: Tensor, terminated: Tensor, truncated: Tensor) -> Tensor:
    found = torch.cat([values[1:], last.unsqueeze(0)])
    return torch.where(terminated, 0.0, torch.where(truncated, final, found))


# Advantages


@pytest.mark.parametrize("lam", [0.0, 0.37, 0.95, 1.0])
def test_advantages_are_the_discounted_sums_of_errors_up_to_an_episodes_end(lam: float) -> None:
    rewards, values, final, terminated, truncated = random()
    following = followed(values, final, torch.full((4,), 0.7, dtype=torch.float64), terminated, truncated)
    done, gamma = terminated | truncated, 0.9
    found = gae(rewards, values, following, done, gamma=gamma, gae_lambda=lam)
    for env in range(4):
        for start in range(12):
            expected = 0.0
            for step in range(start, 12):
                error = rewards[step, env] + gamma * following[step, env] - values[step, env]
                expected += (gamma * lam) ** (step - start) * float(error)
                if done[step, env]:
                    break
            assert float(found[start, env]) == pytest.approx(expected, abs=1e-12)


def test_with_lambda_0_an_advantage_is_the_error_of_one_step() -> None:
    rewards, values, final, terminated, truncated = random()
    following = followed(values, final, values[0], terminated, truncated)
    found = gae(rewards, values, following, terminated | truncated, gamma=0.9, gae_lambda=0.0)
    torch.testing.assert_close(found, rewards + 0.9 * following - values, rtol=0, atol=1e-12)


def test_with_lambda_1_it_is_all_rewards_to_come_less_what_was_expected() -> None:
    rewards, values, final, terminated, truncated = random()
    last = torch.full((4,), -0.3, dtype=torch.float64)
    found = gae(rewards, values, followed(values, final, last, terminated, truncated), terminated | truncated,
                gamma=0.9, gae_lambda=1.0)  # fmt: skip
    to_come = last
    for step in reversed(range(12)):
        to_come = torch.where(terminated[step], 0.0, torch.where(truncated[step], final[step], to_come))
        to_come = rewards[step] + 0.9 * to_come
        torch.testing.assert_close(found[step], to_come - values[step], rtol=0, atol=1e-12)


def one_step(module: Reinforcement, **ended: bool) -> tuple[Tensor, Tensor]:
    """What follows the one step of a rollout of one environment, and the value of the observation after it."""
    flags = {name: torch.tensor([[ended.get(name, False)]]) for name in ("terminated", "truncated")}
    cut = flags["truncated"] & ~flags["terminated"]
    rollout = dataclasses.replace(
        recorded(Rollout, 1, 5, slice(0, 1)), **flags, final_observations=torch.ones(int(cut.sum()), 3),
        final_steps=cut.flatten().nonzero().squeeze(1),
    )  # fmt: skip
    with torch.no_grad():
        return module.valued(rollout)[1], module._value_of(rollout.last_observations)


def test_what_a_time_limit_cuts_off_is_estimated_and_what_has_ended_is_not() -> None:
    module = built()
    with torch.no_grad():
        cut = module._value_of(torch.ones(1, 3))
    going, last = one_step(module)
    assert float(going) == pytest.approx(float(last), abs=1e-6)  # a rollout's last step: the next observation's value
    assert float(one_step(module, truncated=True)[0]) == pytest.approx(float(cut), abs=1e-6)
    assert float(one_step(module, terminated=True)[0]) == 0.0
    assert float(one_step(module, terminated=True, truncated=True)[0]) == 0.0
    assert abs(float(cut)) > 1e-3


# Learning


class Served:
    """Rollouts as a loader."""

    def __init__(self, rollouts: tuple[Rollout, ...]) -> None:
        self.rollouts = rollouts

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Any:
        return iter(self.rollouts)


def update(module: Reinforcement, *rollouts: Rollout) -> dict[str, Tensor]:
    """The weights after learning from rollouts."""
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, limit_val_batches=0, log_every_n_steps=1)  # fmt: skip
    trainer.fit(module, train_dataloaders=Served(rollouts))
    return {name: value.clone() for name, value in module.state_dict().items()}


def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_step_is_that_of_the_loss_written_out() -> None:
    rollout = recorded(Rollout, 10, 0)
    module = built(optimizer=sgd, gae_lambda=0.9, entropy_weight=0.02, max_grad_norm=None).double()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rollout = dataclasses.replace(rollout, observations=rollout.observations.double())
    with torch.no_grad():
        values, following = module.valued(rollout)
        done = rollout.terminated | rollout.truncated
        advantages = gae(rollout.rewards.double(), values, following, done, gamma=0.99, gae_lambda=0.9)
        returns = advantages + values
    logits = module.network(rollout.observations.flatten(0, 1)).log_softmax(-1)
    chosen = logits.gather(1, rollout.actions.flatten().unsqueeze(1)).squeeze(1)
    value = module.value(module.value_body.features(rollout.observations.flatten(0, 1))).squeeze(1)
    loss = (
        -(chosen * advantages.flatten()).mean() + 0.5 * (value - returns.flatten()).square().mean()
        - 0.02 * -(logits.exp() * logits).sum(1).mean()
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    expected = [p.detach() - 0.1 * g for p, g in zip(module.parameters(), gradients, strict=True)]
    found = update(module, rollout)
    for (name, _), wanted in zip(module.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-12)
        assert not torch.equal(before[name], found[name])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_is_no_step_teaches_nothing() -> None:
    rollout = recorded(Rollout, 10, 1)
    done = rollout.terminated | rollout.truncated
    invalid = torch.cat([torch.zeros(1, 6, dtype=torch.bool), done[:-1]])
    clean = dataclasses.replace(
        rollout, valid=~invalid, terminated=rollout.terminated & ~invalid, truncated=rollout.truncated & ~invalid
    )
    kept = (clean.truncated & ~clean.terminated).flatten().nonzero().squeeze(1)
    clean = dataclasses.replace(clean, final_steps=kept, final_observations=torch.ones(len(kept), 3))
    other = dataclasses.replace(
        clean, rewards=torch.where(invalid, 1e3, clean.rewards), actions=torch.where(invalid, 0, clean.actions),
        log_probs=torch.where(invalid, -9.0, clean.log_probs),
    )  # fmt: skip
    assert invalid.any()
    first, second = (update(built(optimizer=sgd, normalize_advantages=True), each) for each in (clean, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_normalised_advantages_have_mean_0_and_deviation_1() -> None:
    found = normalized(torch.tensor([1.0, 2.0, 6.0, 7.0]))
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.std()) == pytest.approx(1, abs=1e-6)


def test_running_statistics_are_those_of_all_samples() -> None:
    samples = torch.randn(50, 3, dtype=torch.float64) * 4 + 7
    running = Running((3,))
    torch.testing.assert_close(running.normalized(samples[:2]), samples[:2].clamp(-10, 10))
    for part in samples.split([7, 1, 30, 12]):
        running.update(part)
    torch.testing.assert_close(running.mean, samples.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(running.variance, samples.var(0, correction=0), rtol=0, atol=1e-12)


def test_rewards_are_divided_by_the_deviation_of_their_discounted_sums() -> None:
    module = built(normalize_rewards=True, gamma=0.5)
    rollouts = [recorded(Rollout, 10, seed) for seed in (0, 1)]
    going, seen = torch.zeros(6), []
    for rollout in rollouts:
        for reward, over in zip(rollout.rewards, rollout.terminated | rollout.truncated, strict=True):
            going = going * 0.5 + reward
            seen.append(going)
            going = torch.where(over, 0.0, going)
        deviation = torch.cat(seen).double().var(correction=0).add(1e-8).sqrt()
        torch.testing.assert_close(module._rewards(rollout), (rollout.rewards / deviation).float(), rtol=1e-5, atol=0)


# Through a fit


class Listening(Lean):
    """Notes how far the stored log-probabilities of each rollout are from the policy's that is about to learn."""

    watches_only = True
    apart: ClassVar[list[float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Rollout, batch_idx: int) -> None:
        with torch.no_grad():
            for time, observations in enumerate(batch.observations):
                found, _ = pl_module.actions.judged(pl_module(observations), batch.actions[time])
                self.apart.append(float((found - batch.log_probs[time]).abs().max()))


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
def test_a_rollouts_log_probabilities_are_those_of_the_policy_that_is_about_to_learn(environment: str) -> None:
    Listening.apart.clear()
    registry.callbacks.register("listening_to_rollouts")(Listening)
    data = {**SMALL, "environment": environment, "wrappers": {"normalize_observation": {}, "normalize_reward": {}}}
    fit({
        "data": data, **QUIET, "callbacks": {**QUIET["callbacks"], "listening_to_rollouts": {}},
        "module": {"name": "ppo", "network": {"name": "mlp", "hidden": [16]}, "epochs": 2},
    })  # fmt: skip
    assert len(Listening.apart) == 16 * 10
    assert max(Listening.apart) == 0.0


def test_the_budget_is_spent_in_steps_of_the_environments() -> None:
    run = fit({"data": SMALL, **QUIET, "module": {"name": "actor_critic", "network": {"name": "mlp", "hidden": [8]}}})
    found = run.results["stages"]["main"]
    assert found["env_steps"] == 640
    assert found["n_test"] == 3
    saved = torch.load(run.stage("main") / "checkpoints" / "last.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (2, 10)  # a rollout is a step of the trainer


def test_left_and_gone_on_with_it_ends_as_one_that_was_not(tmp_path: Path) -> None:
    recipe = {
        "data": {**SMALL, "wrappers": {"normalize_observation": {}, "normalize_reward": {}, "frame_stack": {"size": 2}}
                 },
        "module": {"name": "actor_critic", "network": {"name": "mlp", "hidden": [8]}, "scheduler": "warmup_linear"},
        "callbacks": QUIET["callbacks"],
    }  # fmt: skip
    for verdict in verify(recipe, folder=tmp_path, places=(7,)):
        assert verdict.difference is None, str(verdict)


# Bad input


def refused(**given: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # what it says is what is looked at
        built(**given)
    return " ".join(str(error.value).split())


class Headless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_network_that_is_no_policy_for_the_actions_is_refused() -> None:
    assert "MLP gives (5,) numbers, and the actions are made of 2: leave num_classes" in refused(network=MLP(5, (3,)))
    assert "MLP doesn't take observations of the shape (4,)" in refused(input_shape=(4,))
    assert "ConvNet has a BatchNorm2d: a policy learns from what it did" in refused(network=ConvNet(2, 1, 4))
    assert "MLP has a Dropout" in refused(network=MLP(2, (3,), dropout=0.5))
    assert "Headless has no `features` and `head`: mlp and lenet have" in refused(network=Headless())
    assert "action_space is {'what': 1}" in refused(action_space={"what": 1})


def test_data_that_play_nothing_are_refused_and_data_that_do_are_named() -> None:
    with pytest.raises(RecipeError, match=r"actor_critic consumes Rollout batches, digits yields Labelled; .*: gym"):
        fit({"data": "digits", "module": {"name": "actor_critic", "network": "mlp"}})


def test_mixed_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="mixed precision doesn't give: use 32-true") as failed:
        fit({"data": SMALL, "module": {"name": "actor_critic", "network": "mlp"}, **QUIET,
             "trainer": {"precision": "bf16-mixed"}})  # fmt: skip
    assert failed


def test_a_finished_run_plays_again_and_stops_where_it_was_told(tmp_path: Path) -> None:
    from pyarrow import parquet

    from lab.cli import main

    run: Run = fit({
        "data": {**SMALL, "env_steps": 10_000}, **QUIET,
        "callbacks": {**QUIET["callbacks"], "evaluation": {"stop_at": 1.0, "film": False}},
        "module": {"name": "actor_critic", "network": {"name": "mlp", "hidden": [8]}},
    })  # fmt: skip
    assert run.results["stages"]["main"]["env_steps"] == 320  # the first evaluation's return is at least 1
    assert main(["predict", str(run.folder)]) == 0
    table = parquet.read_table(run.stage("main") / "predictions.parquet").to_pydict()
    assert list(table) == ["episode", "step", "observation", "action", "reward", "terminated", "truncated"]
    assert sum(table["reward"]) / 3 == pytest.approx(run.results["stages"]["main"]["metrics"]["test/return"])
    assert (run.stage("main") / "pictures" / "returns.png").exists()
