"""Low-rank adaptation: a weight stays as it is, and learns a difference of low rank.

E. Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685. For a weight W
``[O, I]``, or ``[O, I, *kernel]`` taken as ``[O, I · kernel]``, with r = ``rank`` and α = ``alpha``::

    W' = W + α/r · B A        A ``[r, I]`` as a linear layer's begins, B ``[O, r]`` zero: at first nothing is changed
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that can be adapted."""


class LowRank(nn.Module):
    """α/r · B A, added to a weight as its parametrization.

    Args:
        weight: whose shape, type and device it takes.
        rank: r.
        alpha: α.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        inputs = weight[0].numel()
        self.scale = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its difference."""
        return weight + self.scale * (self.up @ self.down).view_as(weight)


def adapt(layers: Iterable[nn.Module], rank: int, alpha: float) -> None:
    """Have the layers' weights learn differences of low rank instead of themselves; their biases stay too."""
    for layer in layers:
        weight = layer.requires_grad_(False).get_parameter("weight")
        parametrize.register_parametrization(layer, "weight", LowRank(weight, rank, alpha), unsafe=True)


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Add the differences to the weights: the network has the parameters that it had before."""
    for layer in list(network.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            of_weight = layer.parametrizations["weight"]  # type: ignore[index]
            if any(isinstance(part, LowRank) for part in of_weight):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
