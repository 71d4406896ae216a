"""What policies that learn by acting have in common: how they act, what a rollout is worth, how a step is taken.

A technique says what a rollout's steps are worth (:meth:`Reinforcement.prepared`), and what it minimises of them
(:meth:`Reinforcement.loss`). One rollout is one step of the trainer, however many the optimizer takes with it: what a
step costs in Lightning is paid once a rollout.
"""

from __future__ import annotations

import copy
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Generator, Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, Optimizer

from lab.actions import actions_of
from lab.batch import Rollout, Trajectories
from lab.distributed import distributed, mean_of_all, summed
from lab.errors import UserError
from lab.modules import Technique, counted
from lab.modules.supervised import Terms, means
from lab.normalization import Running
from lab.optimization import OptimizerFactory, SchedulerFactory, scheduled
from lab.policies import VALUE_GAIN, orthogonal_, width_of
from lab.ranges import Count, Fraction, NonNegative, Positive, checked


@dataclass
class Steps:
    """Steps to learn from, ``[B]``, environment by environment.

    Args:
        observations: ``[B, ...]``, as the policy sees them.
        actions: ``[B]`` or ``[B, A]``.
        log_probs: ``[B]`` nats, when they were drawn.
        advantages: ``[B]``, how much better each action was than was to be expected.
        values: ``[B]``, what was expected before the update; zeros without a value function.
        returns: ``[B]``, what values are to become.
        environment: ``[B]``, in which a step was taken.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    environment: Tensor

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, which: Tensor) -> Steps:
        return Steps(**{each.name: getattr(self, each.name).index_select(0, which) for each in fields(self)})


class Reinforcement(Technique):
    """A policy, with a value function where one is wanted, that learns from rollouts.

    Args:
        network: observations ``[B, ...]`` to the parameters of actions ``[B, K]``: a logit for each choice, or the mean
            of each number.
        action_space: what actions are; the data's.
        input_shape: of one observation; the data's.
        optimizer: waits for the parameters.
        scheduler: waits for the optimizer; a step of it is a rollout, total steps come from the trainer.
        critic: whether the value function is a network of its own, built like the policy's, or shares all of the
            policy's but its last layer.
        gamma: the discount of a reward a step later.
        entropy_weight: of the policy's entropy, which is to be kept large.
        value_weight: of the value function's squared error.
        max_grad_norm: gradients longer than this are shortened to it; None leaves them.
        orthogonal: whether weights begin orthogonal, the policy's last layer small, biases zero.
        log_std: the logarithm of the standard deviation of actions that are numbers, at the beginning.
        normalize_observations: whether observations are brought to mean 0 and deviation 1 by what was seen so far; the
            data's wrapper ``normalize_observation`` says so too.
        normalize_rewards: whether rewards are divided by the deviation of their discounted sum so far; likewise.

    Raises:
        ValueError: the network doesn't give what the actions want, has no ``features`` and ``head``, or would answer
            otherwise when it learns than when it acts.
    """

    consumes: ClassVar[type] = Rollout
    unsharded = "its policy acts between steps, in every process for itself"
    unsaved: ClassVar[tuple[str, ...]] = ("_since", "speed")

    @checked
    def __init__(
        self,
        network: nn.Module,
        action_space: dict[str, Any],
        input_shape: tuple[Count, ...],
        optimizer: OptimizerFactory = Adam,
        scheduler: SchedulerFactory | None = None,
        *,
        critic: Literal["separate", "shared"] = "separate",
        gamma: Fraction = 0.99,
        entropy_weight: NonNegative = 0.0,
        value_weight: NonNegative = 0.5,
        max_grad_norm: Positive | None = 0.5,
        orthogonal: bool = True,
        log_std: float = 0.0,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.actions = actions_of(action_space, log_std)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.gamma = gamma
        self.entropy_weight = entropy_weight
        self.value_weight = value_weight
        self.max_grad_norm = max_grad_norm
        self.observed = Running(input_shape) if normalize_observations else None
        self.rewarded = Running(()) if normalize_rewards else None
        width = width_of(network, input_shape, self.actions.outputs)
        if orthogonal:
            orthogonal_(network)
        self.value_body: nn.Module | None = None
        self.value: nn.Linear | None = None
        if self.values_states:
            if critic == "separate":
                self.value_body = copy.deepcopy(network)
                self.value_body.head = nn.Identity()
                if orthogonal:
                    orthogonal_(self.value_body)
            self.value = nn.Linear(width, 1)
            if orthogonal:
                orthogonal_(self.value, VALUE_GAIN)
        self.env_steps = 0
        """Steps of all processes' environments so far."""
        self._going = torch.zeros(0)  # discounted sums of rewards so far, for their deviation
        self._watched: list[dict[str, Tensor]] = []
        self._ended: list[tuple[Tensor, Tensor]] = []
        self._since: tuple[float, int] | None = None
        self.speed = math.nan
        """Steps of the environments a second, in the last window of steps that was logged."""
        self.total_steps = 0.0

    @classmethod
    def refuses(cls, arguments: Mapping[str, Any]) -> Mapping[str, str]:
        """What Lightning does to gradients: the updates of a rollout are its own."""
        clipping = "its own `max_grad_norm` shortens gradients"
        return {
            "gradient_clip_val": clipping,
            "gradient_clip_algorithm": clipping,
            "accumulate_grad_batches": "its data say how much a rollout has, and `minibatches` in which parts",
        }

    @property
    def values_states(self) -> bool:
        """Whether there is a value function."""
        return True

    @property
    def monitor(self) -> tuple[str, str]:
        """What chooses the checkpoint: the return of the most probable actions."""
        return "val/return", "max"

    @abstractmethod
    def prepared(self, rollout: Rollout, rewards: Tensor) -> Steps:
        """What a rollout's steps are worth; called without gradients, before any update.

        Args:
            rollout: ``[T, N]``.
            rewards: ``[T, N]``, normalised if they are to be.
        """

    @abstractmethod
    def loss(self, steps: Steps) -> Terms:
        """What is minimised of steps, ``[B]``."""

    def batches(self, steps: Steps) -> Iterator[Steps]:
        """What a rollout's updates learn from, one after the other: all of it, once."""
        yield steps

    def seen(self, observations: Tensor) -> Tensor:
        """Observations as the networks take them: on their device, numbers in [0, 1] of pixels, normalised."""
        kind: Any = self.dtype
        if observations.dtype == torch.uint8:
            moved = observations.to(self.device).to(kind) / 255
        else:
            moved = observations.to(self.device, kind)
        return self.observed.normalized(moved) if self.observed is not None else moved

    def forward(self, observations: Tensor) -> Tensor:
        """Observations ``[B, ...]`` to the parameters of actions ``[B, K]``."""
        outputs: Tensor = self.network(self.seen(observations))
        return outputs

    @torch.no_grad()
    def act(self, observations: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Actions drawn for ``[N, ...]`` observations, and their log-probabilities ``[N]``; on the CPU."""
        actions, log_probs = self.actions.sample(self(observations), generator)
        return actions.cpu(), log_probs.cpu()

    @torch.no_grad()
    def best(self, observations: Tensor) -> Tensor:
        """The most probable actions for ``[N, ...]`` observations; on the CPU."""
        return self.actions.best(self(observations)).cpu()

    def outputs(self, seen: Tensor) -> tuple[Tensor, Tensor | None]:
        """The parameters of actions ``[B, K]`` and values ``[B]`` of observations as the networks take them."""
        if self.value is None:
            return self.network(seen), None
        if self.value_body is None:
            features = self.network.features(seen)  # type: ignore[operator]
            return self.network.head(features), self.value(features).squeeze(-1)  # type: ignore[operator]
        return self.network(seen), self._value_of(seen)

    def _value_of(self, seen: Tensor) -> Tensor:
        """``[B]`` values alone."""
        assert self.value is not None
        body = self.network if self.value_body is None else self.value_body
        values: Tensor = self.value(body.features(seen)).squeeze(-1)  # type: ignore[operator]
        return values

    def valued(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """``[T, N]`` values of a rollout's observations, and of what followed each: nothing after an episode's end."""
        shape = rollout.rewards.shape
        parts = (rollout.observations.flatten(0, 1), rollout.last_observations, rollout.final_observations)
        found = self._value_of(self.seen(torch.cat(parts)))
        values, last, final = torch.split(found, [len(part) for part in parts])
        values = values.view(shape)
        following = torch.cat([values[1:], last.unsqueeze(0)]).masked_fill(rollout.terminated, 0.0)
        following.view(-1)[rollout.final_steps] = final
        return values, following

    def steps_of(self, rollout: Rollout, advantages: Tensor, values: Tensor, returns: Tensor) -> Steps:
        """The valid ones of ``[T, N]`` steps, environment by environment."""
        time, count = rollout.rewards.shape
        places = torch.arange(count, device=advantages.device).repeat_interleave(time)
        parts = (rollout.actions, rollout.log_probs, advantages, values, returns)
        seen = self.seen(rollout.observations.transpose(0, 1).flatten(0, 1))
        flat = [part.transpose(0, 1).flatten(0, 1) for part in parts]
        found = Steps(seen, flat[0], flat[1], flat[2], flat[3], flat[4], places)
        if rollout.valid is None:
            return found
        return found[rollout.valid.transpose(0, 1).flatten().nonzero().squeeze(1)]

    def training_step(self, batch: Rollout, batch_idx: int) -> Tensor:
        """Learn from a rollout: one step of the trainer, however many of the optimizer."""
        with torch.no_grad():
            steps = self.prepared(batch, self._rewards(batch))
        terms: list[Terms] = []
        for part in self.batches(steps):
            found = self.loss(part)
            terms.append(found)
            self._descend(found.loss, counts=len(terms) == 1)
        self.optimizers(use_pl_optimizer=False).zero_grad()  # type: ignore[union-attr]
        self._move_schedule("step")
        if self.observed is not None:
            valid = slice(None) if batch.valid is None else batch.valid
            self.observed.update(batch.observations[valid].reshape(-1, *self.observed.mean.shape))
        with torch.no_grad():
            self._watch(batch, steps, terms)
        return torch.stack([found.loss.detach() for found in terms]).mean()

    def _rewards(self, rollout: Rollout) -> Tensor:
        """``[T, N]`` rewards; divided by the deviation of their discounted sums so far if they are to be normalised."""
        rewards = rollout.rewards.to(self.dtype)
        if self.rewarded is None:
            return rewards
        going = self._going.to(rewards) if len(self._going) == rewards.shape[1] else torch.zeros_like(rewards[0])
        sums, done = [], rollout.terminated | rollout.truncated
        for reward, over in zip(rewards, done, strict=True):
            going = going * self.gamma + reward
            sums.append(going)
            going = going.masked_fill(over, 0.0)
        self._going = going
        discounted = torch.stack(sums)
        self.rewarded.update(discounted.flatten() if rollout.valid is None else discounted[rollout.valid])
        return self.rewarded.scaled(rewards)

    def _descend(self, loss: Tensor, *, counts: bool) -> None:
        """One step of the optimizer; the one of a rollout that ``counts`` is the trainer's."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        if distributed():
            self.manual_backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        if self.max_grad_norm is not None:
            clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.max_grad_norm,
                            foreach=True)  # fmt: skip
        (self.optimizers() if counts else optimizer).step()  # type: ignore[union-attr]

    def _move_schedule(self, interval: str) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval:
                metric = self.trainer.callback_metrics.get(config.monitor or "")
                config.scheduler.step(*([metric] if config.reduce_on_plateau else []))  # type: ignore[arg-type]

    @property
    def progress(self) -> float:
        """The part of the training that is done, in [0, 1)."""
        return self.trainer.global_step / self.total_steps

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer, and its scheduler over the training's rollouts."""
        optimizer: Optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        self.total_steps = float(self.trainer.estimated_stepping_batches)
        if self.scheduler is None:
            return {"optimizer": optimizer}
        schedule = scheduled(self.scheduler, optimizer, self._length, self.monitor[0])
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _length(self) -> tuple[int, int]:
        """Rollouts of the training, and of an epoch."""
        self.refuse_endless("a schedule of the learning rate")
        return int(self.total_steps), int(self.trainer.num_training_batches)

    def refuse_endless(self, what: str) -> None:
        """Raise a UserError where nobody knows how many rollouts the training has."""
        if not math.isfinite(self.total_steps):
            raise UserError(
                f"{what} goes over all rollouts of the training, and how many fit into env_steps is not known "
                "beforehand where whole episodes are played: say `trainer: {max_epochs: ...}`"
            )

    def configure_callbacks(self) -> list[Any]:
        """What judges, stops and draws, unless the recipe has one."""
        from lab.callbacks.evaluation import Evaluation

        has = any(isinstance(callback, Evaluation) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if has else [Evaluation()]

    def on_fit_start(self) -> None:
        """Refuse what would make the policy that acts another than the one that learns."""
        if isinstance(self.trainer.precision_plugin, MixedPrecision):
            raise UserError(
                "trainer.precision: a policy acts and learns by the same numbers, which mixed precision doesn't give: "
                "use 32-true, 64-true or bf16-true"
            )

    def on_train_epoch_end(self) -> None:
        """Log what is left, and see whether the budget is spent."""
        if self._watched:
            self.log_dict(self._means(), on_step=False, on_epoch=True)
            self._watched.clear()
            self._ended.clear()
        self._move_schedule("epoch")
        budget = getattr(self.trainer.datamodule, "env_steps", None)  # type: ignore[attr-defined]
        if budget is not None and self.env_steps >= budget:
            self.trainer.should_stop = True

    def validation_step(self, batch: Trajectories, batch_idx: int) -> None:
        """Add episodes to ``val/return`` and ``val/length``."""
        self._judge(batch, "val")

    def test_step(self, batch: Trajectories, batch_idx: int) -> None:
        """Add episodes to ``test/return`` and ``test/length``."""
        self._judge(batch, "test")

    def predict_step(self, batch: Trajectories, batch_idx: int) -> dict[str, Tensor]:
        """What ``lab predict`` writes: every step of every episode."""
        found = {
            "episode": batch.episode, "step": batch.step, "observation": batch.observations, "action": batch.actions,
            "reward": batch.rewards, "terminated": batch.terminated, "truncated": batch.truncated,
        }  # fmt: skip
        return {name: column for name, column in found.items() if column is not None}

    def results(self) -> dict[str, Any]:
        """What the stage's results say beside metrics: steps of the environments, and how many a second."""
        speed = {"env_steps_per_second": round(self.speed)} if math.isfinite(self.speed) else {}
        return {"env_steps": self.env_steps, **speed}

    def _judge(self, played: Trajectories, split: str) -> None:
        found = {f"{split}/return": played.returns.mean(), f"{split}/length": played.lengths.double().mean()}
        self.log_dict(found, on_step=False, on_epoch=True, batch_size=counted(played), sync_dist=True)

    def watched(self, steps: Steps) -> dict[str, Tensor]:
        """More to log of a rollout that was learnt from, scalars by name."""
        if self.value is None:
            return {}
        unexplained = (steps.returns - steps.values).var() / steps.returns.var().clamp_min(1e-12)
        return {"explained_variance": 1 - unexplained}

    def _watch(self, rollout: Rollout, steps: Steps, terms: list[Terms]) -> None:
        """Keep what is worth watching, and log its means once in ``log_every_n_steps`` rollouts."""
        taken, _ = summed(torch.tensor(rollout.rewards.numel(), dtype=torch.float64, device=self.device), 1)
        self.env_steps += int(taken)
        now = time.monotonic()
        if self._since is None:
            self._since = now, self.env_steps
        parts = [found.detached() for found in terms]
        update = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        self._watched.append({**update, **self.watched(steps)})
        if len(rollout.episode_returns):
            self._ended.append((rollout.episode_returns, rollout.episode_lengths))
        every = max(int(getattr(self.trainer, "log_every_n_steps", 1)), 1)
        if self.trainer.global_step % every == 0:
            self.log_dict(self._means(), on_step=True, on_epoch=False)
            self._watched.clear()
            self._ended.clear()
            began, before = self._since
            self.speed = (self.env_steps - before) / (now - began) if now > began else math.nan
            for logger in self.trainer.loggers:  # no metric: equal trainings differ in it
                logger.log_metrics({"train/env_steps_per_second": self.speed}, step=self.trainer.global_step - 1)
            self._since = now, self.env_steps

    def _means(self) -> dict[str, Tensor]:
        found = means(self._watched)
        found["train/env_steps"] = torch.tensor(float(self.env_steps), device=self.device)
        if self._ended:
            found["train/return"] = torch.cat([returns for returns, _ in self._ended]).mean()
            found["train/length"] = torch.cat([lengths for _, lengths in self._ended]).double().mean()
        return {name: value.float() for name, value in found.items()}


def normalized(values: Tensor) -> Tensor:
    """``[B]`` values of mean 0 and deviation 1, over all processes' together."""
    values = values.detach()
    if not distributed():
        if len(values) < 2:
            return values
        deviation, mean = torch.std_mean(values)
        return (values - mean) / (deviation + 1e-8)
    total, count = summed(values.sum(), len(values))
    if count < 2:
        return values
    mean = total / count
    squares, _ = summed((values - mean).square().sum(), len(values))
    return (values - mean) / ((squares / (count - 1)).sqrt() + 1e-8)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """The mean squared error of ``[B]`` values, over all processes' steps."""
    return mean_of_all((values - returns).square())
