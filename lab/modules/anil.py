"""Almost no inner loop: MAML that adapts a network's last layer only, to features that all tasks share.

A. Raghu, M. Raghu, S. Bengio, O. Vinyals: Rapid Learning or Feature Reuse?, ICLR 2020, arXiv:1909.09157, section 4.
With features f_φ and head h_w, θ = (φ, w), the support loss L_i and the query loss L'_i (as in MAML, whose arguments
it has)::

    w_0 = w,   w_{s+1} = w_s − α ∇_w L_i(φ, w_s)             φ is the same in all steps
    min_{φ,w} Σ_i L'_i(φ, w_n)

Features are computed once a task, whatever the number of steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lab.batch import Episodes
from lab.functional import Functional, Weights
from lab.modules.maml import MAML
from lab.ranges import checked


class ANIL(MAML):
    """Learns features, and a last layer that a few gradient steps adapt to a task.

    Raises:
        ValueError: the network has no ``features`` and ``head``.
    """

    unsaved = ("_head",)

    @checked
    def __init__(self, **maml: Any) -> None:
        network = maml.get("network")
        if network is not None and not (
            callable(getattr(network, "features", None)) and isinstance(getattr(network, "head", None), nn.Module)
        ):
            raise ValueError(
                f"anil adapts a network's `head` to its `features`, {type(network).__name__} has not both; "
                "all of `lab list networks` have"
            )
        super().__init__(**maml)
        self._head = Functional(self.network.head)  # type: ignore[arg-type]  # seen above

    def adapts(self, name: str) -> bool:
        """The head's."""
        return name.startswith("head.")

    def prepared(self, parameters: Weights, batch: Episodes) -> Episodes:
        """The tasks' features in the place of their inputs."""
        weights = self.network_weights(parameters)
        support = self.outputs(weights, batch.support.inputs, part="features")
        query = self.queried(weights, batch, part="features")
        return Episodes(replace(batch.support, inputs=support), replace(batch.query, inputs=query))

    def support_outputs(self, parameters: Weights, weights: Weights, batch: Episodes) -> Tensor:
        """``[T, S, K]`` for the support set's features, with the tasks' own heads."""
        return self._answer(weights, batch.support.inputs)

    def query_outputs(self, parameters: Weights, weights: Weights, batch: Episodes) -> Tensor:
        """``[T, Q, K]`` for the queries' features."""
        return self._answer(weights, batch.query.inputs)

    def _answer(self, weights: Weights, features: Tensor) -> Tensor:
        own = {name.removeprefix("head."): weight for name, weight in weights.items()}
        return self._mapped(self._head, own, tuple(own), features)
