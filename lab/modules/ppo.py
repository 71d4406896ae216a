"""Proximal policy optimization: several updates on one rollout, none of which moves an action's probability far.

J. Schulman et al.: Proximal Policy Optimization Algorithms, 2017, arXiv:1707.06347. With the probability ratio
ρ_t = π(a_t|s_t) / π_old(a_t|s_t), the advantages Â_t of :mod:`lab.modules.actor_critic` and ε = ``clip`` (equation 7)::

    L = −mean(min(ρ_t Â_t, clip(ρ_t, 1 − ε, 1 + ε) Â_t)) + value_weight · L_V − entropy_weight · mean(H)

over ``epochs`` passes through the rollout in ``minibatches`` parts, in a new order each time. With ``clip_value`` = ε_V
the value function, too, is kept near what it was: L_V = mean(max((V − R)², (V_old + clip(V − V_old, −ε_V, ε_V) − R)²)).
The divergence from the old policy is estimated by J. Schulman's mean(ρ − 1 − log ρ), which is never negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lab.distributed import distributed, mean_of_all, summed
from lab.modules.actor_critic import ActorCritic
from lab.modules.reinforcement import Steps
from lab.modules.supervised import Terms
from lab.ranges import Count, Fraction, NonNegative, Positive, checked
from lab.transforms import hashed


def clipped_surrogate(ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """``[B]``: the smaller of ρÂ and of the same with ρ kept in [1 − clip, 1 + clip] (equation 7)."""
    return torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def clipped_error(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """``[B]``: the larger squared error of the values, and of the same no further than ``clip`` from the old ones."""
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square())


class PPO(ActorCritic):
    """Learns from each rollout several times, as long as the policy stays near the one that played it.

    Args:
        epochs: passes through a rollout.
        minibatches: parts of a rollout, an update each.
        clip: ε, how far a ratio may be from 1 and still count.
        clip_end: ε at the end of the training, to which it goes in a straight line; None: it stays.
        clip_value: ε_V, how far a value may move and still count, in units of returns; None: as far as it likes.
        target_kl: an update that finds the policy this far from the old one, in nats, is the rollout's last.
        gae_lambda: λ.
        normalize_advantages: in every minibatch.
        rollout_size: steps in a rollout; the data's.
        seed: of the order of steps; the recipe's where it is left out.

    Raises:
        ValueError: a rollout's steps cannot be parted evenly.
    """

    @checked
    def __init__(
        self,
        epochs: Count = 10,
        minibatches: Count = 4,
        clip: Positive = 0.2,
        *,
        clip_end: NonNegative | None = None,
        clip_value: Positive | None = None,
        target_kl: Positive | None = None,
        gae_lambda: Fraction = 0.95,
        normalize_advantages: bool = True,
        rollout_size: Count | None = None,
        seed: int = 0,
        **actor_critic: Any,
    ) -> None:
        super().__init__(gae_lambda=gae_lambda, normalize_advantages=normalize_advantages, **actor_critic)
        if rollout_size is not None and rollout_size % minibatches:
            fitting = [n for n in range(1, min(rollout_size, 4 * minibatches) + 1) if rollout_size % n == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - minibatches))[:4])
            raise ValueError(
                f"minibatches={minibatches} does not divide the {rollout_size:,} steps of a rollout: "
                f"{', '.join(map(str, near))} do, or another data.num_envs or data.rollout"
            )
        self.epochs = epochs
        self.minibatches = minibatches
        self.clip = clip
        self.clip_end = clip_end
        self.clip_value = clip_value
        self.target_kl = target_kl
        self.seed = seed
        self._far = False
        self._logs: list[Tensor] = []

    @property
    def clip_now(self) -> float:
        """ε at this moment of the training."""
        return self.clip if self.clip_end is None else self.clip + (self.clip_end - self.clip) * self.progress

    def on_train_start(self) -> None:
        """Refuse a schedule whose end nobody knows."""
        if self.clip_end is not None:
            self.refuse_endless("clip_end")

    def batches(self, steps: Steps) -> Iterator[Steps]:
        """Minibatches in a new order for each pass, until the policy has gone too far."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        size, self._far = len(steps), False
        self._logs.clear()
        if self.minibatches == 1:  # all of them, in whatever order
            for _ in range(self.epochs):
                yield steps
                if self._far:
                    return
            return
        starts, total = (0, size) if not distributed() else self._spans(size, world, rank)
        for epoch in range(self.epochs):
            drawn = hashed("minibatches", self.seed, self.trainer.fit_loop.epoch_loop._batches_that_stepped, epoch)
            order = torch.randperm(total, generator=torch.Generator().manual_seed(drawn))
            for part in order.to(steps.advantages.device).chunk(self.minibatches):
                own = part if world == 1 else part[(part >= starts) & (part < starts + size)] - starts
                yield steps[own]
                if self._far:
                    return

    def _spans(self, size: int, world: int, rank: int) -> tuple[int, int]:
        """Where this process's steps begin among all processes', and how many there are: one order for all."""
        sizes = torch.zeros(world, dtype=torch.int64, device=self.device)
        sizes[rank] = size
        sizes, _ = summed(sizes, 1)
        return int(sizes[:rank].sum()), int(sizes.sum())

    def policy_loss(self, log_probs: Tensor, steps: Steps, advantages: Tensor) -> Terms:
        """The clipped surrogate."""
        logs = log_probs - steps.log_probs
        self._logs.append(logs.detach())
        if self.target_kl is not None:
            self._far = float(self._moved(logs.detach())[0]) > self.target_kl
        return Terms(-mean_of_all(clipped_surrogate(logs.exp(), advantages, self.clip_now)))

    def _moved(self, logs: Tensor) -> Tensor:
        """``[2]``: how far the policy is from the old one, in nats, and the part of ratios that are clipped.

        Args:
            logs: ``[B]``, log ρ.
        """
        apart = logs.expm1()
        told = torch.stack([apart - logs, (apart.abs() > self.clip_now).to(logs)])
        sums, count = summed(told.sum(1), len(logs))
        return sums / max(count, 1)

    def watched(self, steps: Steps) -> dict[str, Tensor]:
        """What a value function explains, and how far the policy went from the old one in the rollout's updates."""
        kl, outside = self._moved(torch.cat(self._logs)).unbind()
        self._logs.clear()
        return {**super().watched(steps), "kl": kl, "clip_fraction": outside}

    def value_loss(self, values: Tensor, steps: Steps) -> Tensor:
        """The squared error, clipped if it is to be."""
        if self.clip_value is None:
            return super().value_loss(values, steps)
        return mean_of_all(clipped_error(values, steps.values, steps.returns, self.clip_value))
