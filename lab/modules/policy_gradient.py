"""REINFORCE: actions become more probable by as much as they were rewarded.

R. Williams: Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, Machine Learning
8, 1992. With N episodes, the rewards r_t of each, the discount γ (``gamma``), and a ``baseline`` b that does not depend
on the action a_t::

    G_t = Σ_{k ≥ t} γ^{k−t} r_k            ∇J ≈ (1/N) Σ_episodes Σ_t ∇log π(a_t|s_t) (G_t − b)

A sum over an episode's steps, a mean over episodes. Without ``reward_to_go`` every step has G_0: the same mean, more
variance. What a time limit cuts off is, but for a learned baseline, not estimated: the limit is part of the task.

A baseline leaves the mean as it is, if no episode is in its own: b of an episode comes of the *other* ones. (With
itself among them, a mean over N episodes would shorten the gradient by a factor of up to 1 − 1/N.)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lab.batch import Rollout, WholeEpisodes
from lab.distributed import largest, mean_of_all, summed
from lab.modules.actor_critic import gae
from lab.modules.reinforcement import Reinforcement, Steps, normalized, value_loss
from lab.modules.supervised import Terms
from lab.ranges import checked


def batch_baseline(returns: Tensor, valid: Tensor) -> Tensor:
    """``[T, N]``: for each episode the mean of G over all steps of the others, whatever their time.

    Args:
        returns: ``[T, N]``, G.
        valid: ``[T, N]`` bool: the steps of the episodes.
    """
    sums, counts = returns.masked_fill(~valid, 0.0).sum(0), valid.sum(0).to(returns)
    every, _ = summed(torch.stack([sums.sum(), counts.sum()]), 1)
    return ((every[0] - sums) / (every[1] - counts).clamp_min(1)).expand_as(returns)


def leave_one_out_baseline(returns: Tensor, valid: Tensor) -> Tensor:
    """``[T, N]``: for each episode the mean of the others' G at the same time, which is 0 after their ends.

    W. Kool, H. van Hoof, M. Welling: Buy 4 REINFORCE Samples, Get a Baseline for Free, 2019.
    """
    known = returns.masked_fill(~valid, 0.0)
    time, count = known.shape
    longest = int(largest(torch.tensor(time, device=known.device)))
    sums = torch.zeros(longest, dtype=known.dtype, device=known.device)
    sums[:time] = known.sum(1)
    sums, count = summed(sums, count)
    return (sums[:time].unsqueeze(1) - known) / max(count - 1, 1)


class PolicyGradient(Reinforcement):
    """Learns a policy from whole episodes, by the rewards that followed each action.

    Args:
        baseline: what is taken off the rewards to come: nothing; ``batch``, the mean of the other episodes' steps;
            ``leave_one_out``, the others' mean at the same time; ``learned``, a value function.
        reward_to_go: whether an action has only the rewards that follow it, or all of its episode.
        normalize_advantages: whether G − b is brought to mean 0 and deviation 1 over all steps.

    Raises:
        ValueError: a baseline wants more than one episode.
    """

    consumes: ClassVar[type] = WholeEpisodes

    @checked
    def __init__(
        self,
        baseline: Literal["none", "batch", "leave_one_out", "learned"] = "leave_one_out",
        reward_to_go: bool = True,
        normalize_advantages: bool = False,
        **reinforcement: Any,
    ) -> None:
        self._baseline = baseline
        super().__init__(**reinforcement)
        self.baseline = baseline
        self.reward_to_go = reward_to_go
        self.normalize_advantages = normalize_advantages

    @property
    def values_states(self) -> bool:
        """Only for a learned baseline."""
        return self._baseline == "learned"

    def prepared(self, rollout: Rollout, rewards: Tensor) -> Steps:
        """The rewards to come, less the baseline."""
        valid = rollout.valid if rollout.valid is not None else torch.ones_like(rollout.terminated)
        nothing, done = torch.zeros_like(rewards), rollout.terminated | rollout.truncated
        values, following = self.valued(rollout) if self.baseline == "learned" else (nothing, nothing)
        returns = gae(rewards, nothing, following * done, done, gamma=self.gamma, gae_lambda=1.0)
        if not self.reward_to_go:
            returns = returns[:1].expand_as(returns)
        match self.baseline:
            case "batch":
                expected = batch_baseline(returns, valid)
            case "leave_one_out":
                expected = leave_one_out_baseline(returns, valid)
            case _:
                expected = values
        steps = self.steps_of(rollout, returns - expected, values, returns)
        if self.normalize_advantages:
            steps.advantages = normalized(steps.advantages)
        return steps

    def loss(self, steps: Steps) -> Terms:
        """Minus the weighted log-probabilities, summed over an episode; the value function's error; the entropy."""
        outputs, values = self.outputs(steps.observations)
        log_probs, entropies = self.actions.judged(outputs, steps.actions)
        policy = -mean_of_all(self._episodes(log_probs * steps.advantages, steps))
        entropy = mean_of_all(self._episodes(entropies, steps))
        total = policy - self.entropy_weight * entropy
        parts = {"policy": policy, "entropy": mean_of_all(entropies)}
        if values is not None:
            parts["value"] = value_loss(values, steps.returns)
            total = total + self.value_weight * parts["value"]
        return Terms(total, **parts)

    def _episodes(self, values: Tensor, steps: Steps) -> Tensor:
        """``[N]`` sums of ``[B]`` values over the steps of each episode."""
        count = int(steps.environment[-1]) + 1
        return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, steps.environment, values)
