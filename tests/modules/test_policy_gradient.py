"""REINFORCE against the exact gradient of a decision process that can be enumerated, and its manners in a fit."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from recorded import recorded

from lab import fit
from lab.batch import Rollout, WholeEpisodes
from lab.document import RecipeError
from lab.modules.policy_gradient import PolicyGradient, batch_baseline, leave_one_out_baseline
from lab.stages import StageFailed

FIRST = torch.tensor([1.0, 3.0], dtype=torch.float64)
"""The reward of the first action; it also chooses the state in which the second is taken."""
SECOND = torch.tensor([[4.0, 1.0], [2.0, 5.0]], dtype=torch.float64)
"""That of the second action, by state and action."""
LOGITS = torch.tensor([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2]], dtype=torch.float64)
"""Of the policy: the first state's, and those of the two that follow."""
EPISODES, BATCHES = 8, 600


class Table(nn.Module):
    """A policy with a logit for each state and action; states are one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(LOGITS.T)

    def features(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def exact() -> tuple[Tensor, Tensor]:
    """The gradient of the expected sum of rewards by the logits, ``[2, 3]``, and the values of the three states."""
    logits = LOGITS.clone().requires_grad_()
    probabilities = logits.softmax(1)
    expected = sum(
        probabilities[0, a] * probabilities[1 + a, b] * (FIRST[a] + SECOND[a, b])
        for a, b in itertools.product(range(2), repeat=2)
    )
    gradient = torch.autograd.grad(expected, logits)[0]
    later = (LOGITS.softmax(1)[1:] * SECOND).sum(1)
    return gradient.T, torch.stack([(LOGITS.softmax(1)[0] * (FIRST + later)).sum(), *later])


def played(generator: torch.Generator, episodes: int) -> WholeEpisodes:
    """Episodes of two steps, ended by the third environment's way: all at the second."""
    probabilities = LOGITS.softmax(1)
    first = torch.multinomial(probabilities[0], episodes, replacement=True, generator=generator)
    second = torch.multinomial(probabilities[1 + first], 1, generator=generator).squeeze(1)
    states = torch.eye(3, dtype=torch.float64)
    ended = torch.tensor([False, True]).unsqueeze(1).expand(2, episodes)
    return WholeEpisodes(
        observations=torch.stack([states[0].expand(episodes, 3), states[1 + first]]),
        actions=torch.stack([first, second]), rewards=torch.stack([FIRST[first], SECOND[first, second]]),
        terminated=ended, truncated=torch.zeros_like(ended), log_probs=torch.zeros(2, episodes),
        last_observations=states[:1].expand(episodes, 3), final_observations=torch.zeros(0, 3),
        final_steps=torch.zeros(0, dtype=torch.int64), valid=None, episode_returns=torch.zeros(0),
        episode_lengths=torch.zeros(0),
    )  # fmt: skip


def estimates(**given: Any) -> Tensor:
    """``[BATCHES, 6]``: minus the loss's gradient by the logits, of as many batches."""
    module = PolicyGradient(
        network=Table(), action_space={"choices": [2]}, input_shape=(3,), gamma=1.0, orthogonal=False, **given
    ).double()
    if module.value is not None:
        values = exact()[1].unsqueeze(0)
        with torch.no_grad():
            module.value.weight.copy_(values)
            module.value.bias.zero_()
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(BATCHES):
        rollout = played(generator, EPISODES)
        with torch.no_grad():
            steps = module.prepared(rollout, rollout.rewards)
        found.append(torch.autograd.grad(-module.loss(steps).loss, module.network.head.weight)[0].flatten())
    return torch.stack(found)


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return estimates(baseline="none")


def assert_unbiased(found: Tensor) -> None:
    error = found.std(0) / BATCHES**0.5
    assert (error > 0).all()
    assert ((found.mean(0) - exact()[0].flatten()).abs() <= 3 * error).all()


def test_the_mean_of_estimates_is_the_exact_gradient(plain: Tensor) -> None:
    assert_unbiased(plain)


@pytest.mark.parametrize("baseline", ["batch", "leave_one_out", "learned"])
def test_a_baseline_leaves_the_mean_and_lowers_the_variance(baseline: str, plain: Tensor) -> None:
    found = estimates(baseline=baseline)
    assert_unbiased(found)
    assert float(found.var(0).sum()) < 0.8 * float(plain.var(0).sum())


def test_without_rewards_to_go_the_mean_is_the_same_and_the_variance_larger(plain: Tensor) -> None:
    found = estimates(baseline="none", reward_to_go=False)
    assert_unbiased(found)
    assert float(found.var(0).sum()) > 1.05 * float(plain.var(0).sum())


def test_baselines_are_the_means_of_the_other_episodes() -> None:
    returns = torch.tensor([[6.0, 1.0, 2.0], [4.0, 9.0, 5.0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True], [True, False, True]])
    batch = batch_baseline(returns, valid)
    assert torch.equal(batch, torch.tensor([8 / 3, 17 / 4, 11 / 3], dtype=torch.float64).expand(2, 3))
    alone = leave_one_out_baseline(returns, valid)
    assert torch.equal(alone[0], torch.tensor([1.5, 4.0, 3.5], dtype=torch.float64))
    assert torch.equal(alone[1], torch.tensor([2.5, 4.5, 2.0], dtype=torch.float64))  # what is over has nothing to come


def test_rewards_to_come_end_with_the_episode_and_what_follows_it_teaches_nothing() -> None:
    rollout = recorded(WholeEpisodes, 10, 4)
    assert rollout.valid is not None
    module = PolicyGradient(network=Table(), action_space={"choices": [2]}, input_shape=(3,), gamma=0.9,
                            baseline="none", orthogonal=False)  # fmt: skip
    steps = module.prepared(rollout, rollout.rewards)
    assert len(steps) == int(rollout.valid.sum())
    expected = []
    for env in range(6):
        length = int(rollout.valid[:, env].sum())
        for start in range(length):
            expected.append(sum(0.9 ** (t - start) * float(rollout.rewards[t, env]) for t in range(start, length)))
    torch.testing.assert_close(steps.returns, torch.tensor(expected), rtol=0, atol=1e-5)


def test_it_learns_to_balance() -> None:
    run = fit({
        "data": {"name": "gym", "environment": "CartPole-v1", "num_envs": 16, "rollout": "episodes",
                 "env_steps": 40_000, "rollouts_per_epoch": 8, "test_episodes": 10},
        "module": {"name": "policy_gradient", "network": {"name": "mlp", "hidden": [32]},
                   "optimizer": {"name": "adam", "lr": 0.01}},
        "callbacks": {"profile": None, "progress": None, "evaluation": {"film": False}}, "logger": "csv",
    })  # fmt: skip
    found = run.results["stages"]["main"]
    assert found["metrics"]["test/return"] > 120  # at random about 20
    assert found["env_steps"] >= 40_000


def test_parts_of_episodes_are_refused_with_what_gives_whole_ones() -> None:
    recipe = {"data": {"name": "gym", "environment": "CartPole-v1", "rollout": 32},
              "module": {"name": "policy_gradient", "network": "mlp"}}  # fmt: skip
    with pytest.raises(RecipeError, match=r"policy_gradient consumes WholeEpisodes .* rollout: episodes gives them"):
        fit(recipe)


def test_a_schedule_over_a_training_of_unknown_length_is_refused() -> None:
    recipe = {
        "data": {"name": "gym", "environment": "CartPole-v1", "num_envs": 2, "rollout": "episodes", "env_steps": 100},
        "module": {"name": "policy_gradient", "network": "mlp", "scheduler": "warmup_linear"},
        "callbacks": {"profile": None, "progress": None}, "logger": "csv",
    }  # fmt: skip
    with pytest.raises(StageFailed, match=r"say `trainer: \{max_epochs: ...\}`"):
        fit(recipe)
    fit({**recipe, "trainer": {"max_epochs": 1}})


def test_the_module_consumes_whole_episodes() -> None:
    assert PolicyGradient.consumes is WholeEpisodes
    assert issubclass(WholeEpisodes, Rollout)
