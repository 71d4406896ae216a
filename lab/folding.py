"""Batch norms put into the layers before them: what inference computes, in one layer instead of two."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from lab.wiring import Wiring


def fold(network: nn.Module, wiring: Wiring, left: set[str]) -> dict[str, str]:
    """Put batch norms into the layers before them; by their names the layers'."""
    folded = {}
    for node in wiring.nodes:
        norm = network.get_submodule(node.layer) if node.layer else None
        if not isinstance(norm, _BatchNorm) or not node.layer or not node.inputs:
            continue
        before = wiring.nodes[node.inputs[0]]
        layer = network.get_submodule(before.layer) if before.layer else None
        alone = wiring.consumers[node.inputs[0]] and len(wiring.consumers[node.inputs[0]]) == 1
        once = wiring.calls[node.layer] == 1 and before.layer is not None and wiring.calls[before.layer] == 1
        plain = isinstance(layer, nn.Linear | _ConvNd) and not parametrize.is_parametrized(layer)
        if before.layer is None or before.layer in left or not (alone and once and plain and norm.track_running_stats):
            continue
        if instead(norm) is not None:
            _merge(layer, norm)  # type: ignore[arg-type]  # plain says it
            network.set_submodule(node.layer, instead(norm))  # type: ignore[arg-type]  # it is not None
            folded[node.layer] = before.layer
    return folded


def instead(norm: nn.Module) -> nn.Module | None:
    """What is left of a batch norm that is folded: nothing, or the activation that timm's classes have within."""
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return nn.Identity()
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        return act
    return None


@torch.no_grad()
def _merge(layer: nn.Linear | _ConvNd, norm: _BatchNorm) -> None:
    """y = γ(Wx + b − μ)/√(σ² + ε) + β as one layer, computed in double precision."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    wide = [
        tensor.double() if tensor is not None else None
        for tensor in (layer.weight, layer.bias, mean, var, norm.weight, norm.bias)
    ]
    weight, bias, mean_, var_, gain, shift = wide
    if isinstance(layer, nn.Linear):
        gain = torch.ones_like(mean_) if gain is None else gain  # type: ignore[arg-type]
        shift = torch.zeros_like(mean_) if shift is None else shift  # type: ignore[arg-type]
        merged = fuse_linear_bn_weights(weight, bias, mean_, var_, norm.eps, gain, shift)  # type: ignore[arg-type]
    else:
        merged = fuse_conv_bn_weights(
            weight, bias, mean_, var_, norm.eps, gain, shift, isinstance(layer, _ConvTransposeNd)  # type: ignore[arg-type]
        )  # fmt: skip
    learns, kind = layer.weight.requires_grad, layer.weight.dtype
    layer.weight = nn.Parameter(merged[0].to(kind), learns)
    layer.bias = nn.Parameter(merged[1].to(kind), learns)
