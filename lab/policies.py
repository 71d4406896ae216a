"""What a network must be to be a policy, and with which weights one begins."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

HIDDEN_GAIN, POLICY_GAIN, VALUE_GAIN = math.sqrt(2), 0.01, 1.0
"""Of orthogonal weights, as in L. Engstrom et al.: Implementation Matters in Deep Policy Gradients, ICLR 2020."""


def width_of(network: nn.Module, input_shape: tuple[int, ...], outputs: int) -> int:
    """How many features a policy's last layer has; a ValueError for what is no policy for these actions."""
    named = type(network).__name__
    for part in network.modules():
        if isinstance(part, _BatchNorm) or (isinstance(part, _DropoutNd) and part.p > 0):
            raise ValueError(
                f"{named} has a {type(part).__name__}: a policy learns from what it did, and with one it would answer "
                "otherwise when it learns than when it acts; mlp and lenet have none"
            )
    features, head = getattr(network, "features", None), getattr(network, "head", None)
    if not (callable(features) and isinstance(head, nn.Module)):
        raise ValueError(f"{named} has no `features` and `head`: mlp and lenet have")
    with torch.no_grad():
        try:
            seen = torch.zeros(1, *input_shape)
            width, found = int(features(seen).shape[-1]), tuple(network(seen).shape)
        except RuntimeError as cause:
            raise ValueError(f"{named} doesn't take observations of the shape {input_shape}: {cause}") from cause
    if found != (1, outputs):
        raise ValueError(
            f"{named} gives {found[1:]} numbers, and the actions are made of {outputs}: leave num_classes to the data"
        )
    return width


def orthogonal_(network: nn.Module, gain: float = HIDDEN_GAIN) -> None:
    """Orthogonal weights, the head's small, and no bias."""
    last = getattr(network, "head", None)
    head = set(last.modules()) if isinstance(last, nn.Module) else set()
    for part in network.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(part.weight, POLICY_GAIN if part in head else gain)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
