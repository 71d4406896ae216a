"""What a file holds of a quantized network: the plan, the scales, and weights as whole numbers of their bits.

A network is built as its class builds it, :func:`restore` makes of it one that was quantized as the plan says, and
:func:`unpacked` gives its weights back. A weight that has left its grid since, trained on say, is saved as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lab import sharing
from lab.folding import instead
from lab.quantization import FEWEST, MOST, axis_of, hook, of_weight
from lab.quantizer import Grid

STEPS = "#steps"
"""What a file calls the whole numbers of a weight, after its name."""


def restore(network: nn.Module, found: Mapping[str, Any]) -> None:
    """Make of a network as its class builds it one that was quantized so; scales and weights await saved ones.

    Raises:
        ValueError: the plan is not of this network.
    """
    if not found:
        return
    parts = dict(network.named_modules())
    _check(parts, found)
    for norm, name in found["folded"].items():
        layer = parts[name]
        network.set_submodule(norm, instead(parts[norm]))  # type: ignore[arg-type]  # _check saw it
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(_outputs(layer)))
    for name, bits in found["weights"].items():
        layer = parts[name]
        layer.register_buffer("weight_scale", of_weight(layer, bits, bool(found["per_channel"])).scale)
    hook(network, dict(found))
    network.quantization = dict(found)  # type: ignore[assignment]


def _outputs(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _check(parts: Mapping[str, nn.Module], found: Mapping[str, Any]) -> None:
    """Whether a plan fits a network's parts."""
    if set(found) != {"weights", "outputs", "inputs", "folded", "per_channel", "dynamic"}:
        raise ValueError("this is no plan of quantization")
    for norm, layer in found["folded"].items():
        if norm not in parts or instead(parts[norm]) is None or not isinstance(parts.get(layer), nn.Linear | _ConvNd):
            raise ValueError(f"'{norm}' is no batch norm that could be in '{layer}'")
    for kind in ("weights", "outputs", "inputs"):
        for name, bits in found[kind].items():
            fits = isinstance(parts.get(name), nn.Linear | _ConvNd) if kind == "weights" else name in parts
            if not fits or type(bits) is not int or not FEWEST <= bits <= MOST:
                raise ValueError(f"'{name}' has no {kind} of {bits!r} bits")


def packed(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for a file: rounded weights as whole numbers of their bits, if they still are on their grid."""
    found = dict(state)
    plan_: Mapping[str, Any] = getattr(network, "quantization", {})
    for name, bits in plan_.get("weights", {}).items():
        key = f"{name}.weight"
        if key in state and (steps := steps_of(network.get_submodule(name), bits, state[key])) is not None:
            found[key + STEPS] = sharing.pack((steps + Grid(bits, signed=True).high).long().flatten(), bits)
            del found[key]
    return found


def steps_of(layer: nn.Module, bits: int, weight: Tensor) -> Tensor | None:
    """The whole numbers that a settled layer's weight is made of; None where it left its grid."""
    scale = _spread(layer)
    steps = (weight / scale).round()
    fits = bool((steps.abs() <= Grid(bits, signed=True).high).all()) and torch.equal(steps * scale, weight)
    return steps if fits else None


def unpacked(network: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, whole numbers as the weights that they are.

    Raises:
        ValueError: whole numbers of no quantized weight, or not as many as it has.
    """
    found = {key: tensor for key, tensor in saved.items() if not key.endswith(STEPS)}
    plan_: Mapping[str, Any] = getattr(network, "quantization", {})
    for key in saved.keys() - found.keys():
        name = key.removesuffix(f".weight{STEPS}")
        bits, scale = plan_.get("weights", {}).get(name), saved.get(f"{name}.weight_scale")
        if bits is None or scale is None:
            raise ValueError(f"{key}: whole numbers of what is no quantized weight, or without a scale")
        layer = network.get_submodule(name)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        size = math.ceil(weight.numel() * bits / 8)
        if saved[key].dtype != torch.uint8 or saved[key].shape != (size,) or scale.shape != layer.weight_scale.shape:
            raise ValueError(f"{key}: not as many whole numbers, or scales, as {name} has weights")
        steps = sharing.unpack(saved[key], bits, weight.numel()) - Grid(bits, signed=True).high
        found[f"{name}.weight"] = steps.view(weight.shape).to(scale.dtype) * _spread(layer, scale)
    return found


def _spread(layer: nn.Module, scale: Tensor | None = None) -> Tensor:
    """A weight's scales, of a shape that its own is multiplied with."""
    scale = layer.get_buffer("weight_scale") if scale is None else scale
    shape = [1] * layer.get_parameter("weight").ndim
    if scale.ndim:
        shape[axis_of(layer)] = -1
    return scale.view(shape)
