"""Advantage actor-critic: a policy that learns from how much better its actions were than a value function expected.

V. Mnih et al.: Asynchronous Methods for Deep Reinforcement Learning, ICML 2016, arXiv:1602.01783, in its synchronous
form (A2C). With the policy π, the value function V, rewards r, the discount γ (``gamma``), and the advantages of
J. Schulman et al.: High-Dimensional Continuous Control Using Generalized Advantage Estimation, ICLR 2016,
arXiv:1506.02438, equations 11 and 16, λ being ``gae_lambda``::

    δ_t = r_t + γ V(s_{t+1}) − V(s_t)            Â_t = δ_t + γλ Â_{t+1}
    R_t = Â_t + V_old(s_t)
    L = −mean(log π(a_t|s_t) Â_t) + value_weight · mean((V(s_t) − R_t)²) − entropy_weight · mean(H[π(·|s_t)])

After a terminal state nothing follows: V is 0 there. An episode that a time limit cuts off would have gone on: V of
what it was cut off at stands for the rest. Both end the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab.batch import Rollout
from lab.distributed import mean_of_all
from lab.modules.reinforcement import Reinforcement, Steps, normalized, value_loss
from lab.modules.supervised import Terms
from lab.ranges import Fraction, checked


def gae(rewards: Tensor, values: Tensor, following: Tensor, done: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantages: with λ = 0 the error of one step, with λ = 1 all rewards to come less what was expected.

    One pass back through time, all environments at once.

    Args:
        rewards: ``[T, N]``.
        values: ``[T, N]``, V of each observation.
        following: ``[T, N]``, V of what followed each: 0 after a terminal state, of the last observation of an episode
            that was cut off, and at a rollout's end of the observation that the next one begins with.
        done: ``[T, N]`` bool: the episode ended with the step.
        gamma: γ.
        gae_lambda: λ.

    Returns:
        ``[T, N]``.
    """
    errors = rewards + gamma * following - values
    kept = (gamma * gae_lambda) * (~done).to(errors)
    advantage, found = torch.zeros_like(errors[0]), []
    for error, keep in zip(reversed(errors.unbind()), reversed(kept.unbind()), strict=True):
        advantage = torch.addcmul(error, keep, advantage)
        found.append(advantage)
    return torch.stack(found[::-1])


class ActorCritic(Reinforcement):
    """Learns a policy by the advantages of its actions, and the value function that they are told by.

    Args:
        gae_lambda: λ: how far an advantage looks before it trusts the value function.
        normalize_advantages: whether advantages are brought to mean 0 and deviation 1 in every update.
    """

    @checked
    def __init__(
        self, gae_lambda: Fraction = 1.0, normalize_advantages: bool = False, **reinforcement: Any
    ) -> None:  # fmt: skip
        super().__init__(**reinforcement)
        self.gae_lambda = gae_lambda
        self.normalize_advantages = normalize_advantages

    def prepared(self, rollout: Rollout, rewards: Tensor) -> Steps:
        """Advantages, and what the value function is to learn."""
        values, following = self.valued(rollout)
        done = rollout.terminated | rollout.truncated
        advantages = gae(rewards, values, following, done, gamma=self.gamma, gae_lambda=self.gae_lambda)
        return self.steps_of(rollout, advantages, values, advantages + values)

    def policy_loss(self, log_probs: Tensor, steps: Steps, advantages: Tensor) -> Terms:
        """What is minimised of the policy; ``[B]`` log-probabilities under it as it is now."""
        return Terms(-mean_of_all(log_probs * advantages))

    def value_loss(self, values: Tensor, steps: Steps) -> Tensor:
        """What is minimised of the value function."""
        return value_loss(values, steps.returns)

    def loss(self, steps: Steps) -> Terms:
        """The policy's, the value function's and the entropy's."""
        outputs, values = self.outputs(steps.observations)
        assert values is not None
        log_probs, entropies = self.actions.judged(outputs, steps.actions)
        advantages = normalized(steps.advantages) if self.normalize_advantages else steps.advantages
        policy, value = self.policy_loss(log_probs, steps, advantages), self.value_loss(values, steps)
        entropy = mean_of_all(entropies)
        total = policy.loss + self.value_weight * value
        if self.entropy_weight:
            total = total - self.entropy_weight * entropy
        return Terms(total, policy=policy.loss, value=value, entropy=entropy, **policy.parts)
