"""Networks whose layers became smaller than their class builds them: what changed, as numbers that a file can hold.

A shrunk network is its class, its arguments, and for every layer that differs the sizes that it has now. Nothing here
is code, and nothing can grow: a description from elsewhere builds no more than its class would.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Changes = dict[str, dict[str, int]]
"""By a layer's name the sizes that are not those its class gives it."""

SIZES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("in_features", "out_features")),
    (_ConvNd, ("in_channels", "out_channels", "groups")),
    (_NormBase, ("num_features",)),
    (nn.GroupNorm, ("num_channels", "num_groups")),
)
"""The layers that can shrink, and what says how large they are."""


def sizes(network: nn.Module) -> Changes:
    """The sizes of every layer that can shrink, by its name."""
    return {name: {size: getattr(layer, size) for size in found} for name, layer, found in _layers(network)}


def changes(network: nn.Module, before: Mapping[str, Mapping[str, int]]) -> Changes:
    """What differs from sizes that a network had, together with what differed then."""
    known: Changes = {name: dict(found) for name, found in getattr(network, "surgery", {}).items()}
    for name, now in sizes(network).items():
        differing = {size: value for size, value in now.items() if before[name][size] != value}
        if differing:
            known.setdefault(name, {}).update(differing)
    return known


def shrink(network: nn.Module, found: Mapping[str, Mapping[str, int]]) -> None:
    """Give layers other sizes, in place; the weights of those are new, and wait for saved ones.

    Raises:
        ValueError: a layer is not there, cannot have such a size, or would grow.
    """
    if not found:
        return
    layers = {name: (layer, names) for name, layer, names in _layers(network)}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for name, wanted in found.items():
            if name not in layers:
                raise ValueError(f"{type(network).__name__} has no layer '{name}' that could have other sizes")
            layer, names = layers[name]
            for size, value in wanted.items():
                if size not in names or type(value) is not int or not 1 <= value <= getattr(layer, size):
                    raise ValueError(f"{name} is no layer of {size} {value!r}")
                setattr(layer, size, value)
            _renew(layer)
    network.surgery = {name: dict(wanted) for name, wanted in found.items()}  # type: ignore[assignment]


def _layers(network: nn.Module) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
    return [
        (name, layer, names)
        for name, layer in network.named_modules()
        for kind, names in SIZES
        if isinstance(layer, kind)
    ]


def _renew(layer: nn.Module) -> None:
    """Tensors of the sizes that a layer says."""
    shapes: dict[str, tuple[int, ...]]
    if isinstance(layer, nn.Linear):
        shapes = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    elif isinstance(layer, _ConvNd):
        if layer.in_channels % layer.groups or layer.out_channels % layer.groups:
            raise ValueError(
                f"{layer.in_channels} to {layer.out_channels} channels do not go into {layer.groups} groups"
            )
        ends = (layer.out_channels, layer.in_channels // layer.groups)
        ends = ends[::-1] if layer.transposed else ends
        shapes = {"weight": (*ends, *layer.kernel_size), "bias": (layer.out_channels,)}
    else:
        width = int(getattr(layer, "num_features", getattr(layer, "num_channels", 0)))
        shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (width,))
    for name, shape in shapes.items():
        tensor = getattr(layer, name, None)
        if isinstance(tensor, nn.Parameter):
            setattr(layer, name, nn.Parameter(tensor.new_empty(shape), tensor.requires_grad))
        elif tensor is not None:
            setattr(layer, name, tensor.new_empty(shape))
    layer.reset_parameters()  # type: ignore[operator]  # each of them has it
