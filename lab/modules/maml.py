"""Model-agnostic meta-learning: weights from which a few steps of gradient descent learn a new task.

C. Finn, P. Abbeel, S. Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017,
arXiv:1703.03400. For a task i with the support set's mean loss L_i and the query set's L'_i, α = ``inner_lr``, n =
``inner_steps`` in training and ``test_steps`` in evaluation (equations 1 and 2, n steps)::

    θ_0 = θ,   θ_{s+1} = θ_s − α ∇L_i(θ_s)                    adaptation
    min_θ Σ_i L'_i(θ_n)                                       its gradient goes through the n steps

``first_order`` takes ∇L'_i(θ_n) for the gradient: second derivatives are left out (section 5.2). ``learned_rates``
makes the step sizes parameters too, that start at α: ``element``, one a weight (Meta-SGD: Z. Li et al.,
arXiv:1707.09835); ``layer``, one a tensor of weights and step (A. Antoniou, H. Edwards, A. Storkey: How to Train Your
MAML, ICLR 2019, arXiv:1810.09502). Steps beyond those of training take the last one's. ``per_step_losses`` = M is that
paper's multi-step loss, annealed over the first M steps of training: with p = min(step / M, 1)::

    Σ_s w_s L'_i(θ_s),   w_s = (1 − p)/n for s < n,   w_n = 1 − (n − 1)(1 − p)/n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab.batch import Episodes
from lab.few_shot import losses_of
from lab.functional import Weights
from lab.modules.meta_learning import MetaLearner
from lab.ranges import Positive, Whole, checked


def adapted(
    loss: Callable[[Weights], Tensor],
    weights: Weights,
    rate: Callable[[str, int], Tensor | float],
    steps: int,
    *,
    first_order: bool = False,
) -> Iterator[Weights]:
    """θ_0, θ_1, … θ_n, each of which is differentiable by what the weights come from.

    Args:
        loss: a scalar, the sum of tasks' losses where weights are those of several tasks, ``[T, ...]``.
        weights: θ.
        rate: α of a weight by its name, and of a step, from 0.
        steps: n.
        first_order: whether gradients count as constants.
    """
    yield weights
    for step in range(steps):
        gradients = torch.autograd.grad(
            loss(weights),
            list(weights.values()),
            create_graph=not first_order,
            allow_unused=True,
            materialize_grads=True,
        )
        weights = {
            name: weight - rate(name, step) * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        yield weights


def importance(step: int, over: int, steps: int) -> list[float]:
    """w_1, … w_n of the multi-step loss at a step of a training, annealed ``over`` so many."""
    left = 1 - min(step / over, 1)
    return [*[left / steps] * (steps - 1), 1 - (steps - 1) * left / steps]


class MAML(MetaLearner):
    """Learns weights that a few gradient steps adapt to a task.

    Args:
        inner_lr: α.
        inner_steps: n in training; 0 learns all tasks at once, the baseline "pretrained".
        test_steps: n in validation, test and prediction; ``inner_steps`` where it is None.
        first_order: leave the second derivatives out.
        learned_rates: learn the step sizes, one an ``element`` of the weights, or one a ``layer``'s tensor and step.
        per_step_losses: M, over how many steps of training the losses after every inner step count; 0: never.

    Raises:
        ValueError: ``first_order``, ``learned_rates`` or ``per_step_losses`` without an inner step.
    """

    @checked
    def __init__(
        self,
        inner_lr: Positive = 0.01,
        inner_steps: Whole = 1,
        test_steps: Whole | None = None,
        *,
        first_order: bool = False,
        learned_rates: Literal["element", "layer"] | None = None,
        per_step_losses: Whole = 0,
        **meta_learner: Any,
    ) -> None:
        super().__init__(**meta_learner)
        if not inner_steps and (first_order or learned_rates or per_step_losses):
            said = "first_order" if first_order else "learned_rates" if learned_rates else "per_step_losses"
            raise ValueError(
                f"{said} says how the inner steps are learnt from, and inner_steps is 0: say inner_steps: 1 or more"
            )
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.test_steps = inner_steps if test_steps is None else test_steps
        self.first_order = first_order
        self.learned_rates = learned_rates
        self.per_step_losses = per_step_losses
        self.rates = nn.ParameterDict()
        if learned_rates is not None:
            for name, weight in network_parameters(self.network, self.adapts):
                rates = torch.full_like(weight, inner_lr) if learned_rates == "element" else weight.new_full(
                    (inner_steps,), inner_lr
                )  # fmt: skip
                self.rates[_key(name)] = nn.Parameter(rates.detach().clone())

    def adapts(self, name: str) -> bool:
        """Whether a parameter of the network is adapted to a task."""
        return True

    @property
    def evaluated_steps(self) -> int:
        """n in evaluation."""
        return self.test_steps

    def extras(self) -> tuple[Tensor, ...]:
        """What the losses after each inner step weigh, while they do."""
        step = self.trainer.global_step if self._trainer is not None else 0
        if self.inner_steps < 2 or step >= self.per_step_losses:
            return ()
        return (torch.tensor(importance(step, self.per_step_losses, self.inner_steps), device=self.device),)

    def task_losses(self, parameters: Weights, batch: Episodes, *extra: Tensor) -> Tensor:
        """``[T]``: L' after n steps, or the weighted sum of those after each."""
        batch = self.prepared(parameters, batch)
        thetas = list(self.learnt(parameters, batch, self.inner_steps, first_order=self.first_order))

        def queried(theta: Weights) -> Tensor:
            return losses_of(self.objective, self.query_outputs(parameters, theta, batch), batch.query.targets)

        if not extra:
            return queried(thetas[-1])
        return torch.stack([w * queried(theta) for w, theta in zip(extra[0], thetas[1:], strict=True)]).sum(0)

    def answered(self, parameters: Weights, batch: Episodes) -> list[Tensor]:
        """Outputs for the queries with θ_0, … θ_n."""
        leaves = {name: tensor.detach() for name, tensor in parameters.items()}
        batch, found = self.prepared(leaves, batch), []
        for theta in self.learnt(leaves, batch, self.evaluated_steps, first_order=True):
            found.append(self.query_outputs(leaves, theta, batch).detach())
        return found

    def learnt(self, parameters: Weights, batch: Episodes, steps: int, *, first_order: bool) -> Iterator[Weights]:
        """θ_0, … θ_n of each task ``[T, ...]``."""
        tasks, support = len(batch), batch.support
        start = {name: parameters[f"network.{name}"] for name, _ in network_parameters(self.network, self.adapts)}
        start = {name: weight.expand(tasks, *weight.shape) for name, weight in start.items()}
        if not any(weight.requires_grad for weight in start.values()):
            start = {name: weight.requires_grad_() for name, weight in start.items()}

        def loss(weights: Weights) -> Tensor:
            return losses_of(self.objective, self.support_outputs(parameters, weights, batch), support.targets).sum()

        def rate(name: str, step: int) -> Tensor | float:
            learned = parameters.get(f"rates.{_key(name)}")
            if learned is None or self.learned_rates is None:
                return self.inner_lr
            return learned if self.learned_rates == "element" else learned[min(step, len(learned) - 1)]

        return adapted(loss, start, rate, steps, first_order=first_order)

    def prepared(self, parameters: Weights, batch: Episodes) -> Episodes:
        """The tasks as the adapted part of the network takes them."""
        return batch

    def support_outputs(self, parameters: Weights, weights: Weights, batch: Episodes) -> Tensor:
        """``[T, S, K]`` for the support set, with the tasks' own weights."""
        return self.outputs({**self.network_weights(parameters), **weights}, batch.support.inputs, tuple(weights))

    def query_outputs(self, parameters: Weights, weights: Weights, batch: Episodes) -> Tensor:
        """``[T, Q, K]`` for the queries."""
        return self.queried({**self.network_weights(parameters), **weights}, batch, tuple(weights))


def network_parameters(network: nn.Module, chosen: Callable[[str], bool]) -> list[tuple[str, nn.Parameter]]:
    """A network's trainable parameters that are chosen by name."""
    return [(name, each) for name, each in network.named_parameters() if each.requires_grad and chosen(name)]


def _key(name: str) -> str:
    """A parameter's name as a ParameterDict takes it."""
    return name.replace(".", "__")
