"""Prototypical networks: a sample is of the class whose mean feature is nearest.

J. Snell, K. Swersky, R. Zemel: Prototypical Networks for Few-shot Learning, NeurIPS 2017, arXiv:1703.05175, equations 1
and 2. With features f, the support samples S_k of class k and d the squared Euclidean distance::

    c_k = 1/|S_k| Σ_{x ∈ S_k} f(x),        p(y = k | x) = softmax_k(−d(f(x), c_k))

The loss is −log p of the queries' classes. Nothing is adapted: a new class needs a mean, no gradient. It is what
techniques that adapt have to beat.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.batch import Episodes
from lab.few_shot import losses_of
from lab.functional import Weights
from lab.modules.meta_learning import MetaLearner
from lab.objectives.classification import Classification
from lab.ranges import checked


def prototypes(features: Tensor, targets: Tensor, classes: int) -> Tensor:
    """c ``[T, N, F]``, the mean of each class's features ``[T, S, F]``, of classes ``[T, S]``.

    A class without a sample is infinitely far from everything.
    """
    member = F.one_hot(targets, classes).to(features.dtype).transpose(1, 2)  # (T, N, S)
    count = member.sum(2, keepdim=True)
    return torch.where(count > 0, member @ features / count.clamp(min=1), torch.inf)


def closeness(queries: Tensor, centres: Tensor) -> Tensor:
    """−d of queries ``[T, Q, F]`` and centres ``[T, N, F]``: ``[T, Q, N]``."""
    return -(queries.unsqueeze(2) - centres.unsqueeze(1)).square().sum(3)


class ProtoNet(MetaLearner):
    """Learns features in which a class's samples lie around their mean.

    Raises:
        ValueError: the objective is no classification, or the network has no ``features``.
    """

    @checked
    def __init__(self, **meta_learner: Any) -> None:
        super().__init__(**meta_learner)
        if not isinstance(self.objective, Classification):
            raise ValueError(f"protonet compares classes: {type(self.objective).__name__} is no classification")
        if not callable(getattr(self.network, "features", None)):
            raise ValueError(
                f"protonet compares a network's `features`, {type(self.network).__name__} has none; "
                "all of `lab list networks` have"
            )

    def task_losses(self, parameters: Weights, batch: Episodes, *extra: Tensor) -> Tensor:
        """``[T]``: −log p of the queries' classes."""
        return losses_of(self.objective, self._logits(parameters, batch), batch.query.targets)

    def answered(self, parameters: Weights, batch: Episodes) -> list[Tensor]:
        """Closeness to the prototypes: there are no steps."""
        with torch.no_grad():
            return [self._logits(parameters, batch)]

    def _logits(self, parameters: Weights, batch: Episodes) -> Tensor:
        weights = self.network_weights(parameters)
        support = self.outputs(weights, batch.support.inputs, part="features")
        query = self.queried(weights, batch, part="features")
        assert isinstance(self.objective, Classification)
        centres = prototypes(support.flatten(2), batch.support.targets, self.objective.num_classes)
        return closeness(query.flatten(2), centres)
