"""A quantized network as an ONNX exporter is to see it: QuantizeLinear and DequantizeLinear where numbers are rounded.

Weights are 8-bit integers, and a runtime computes what is between in integers. Dynamic quantization becomes
DynamicQuantizeLinear and MatMulInteger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lab import quantization, quantized
from lab.quantizer import Quantizer

OPSET = 21
"""Of ONNX: the first whose QuantizeLinear has all that is used here."""


def _said(operator: str, inputs: Sequence[Tensor | None], like: Tensor, kind: torch.dtype, **attributes: int) -> Tensor:
    """One ONNX operator, whose output has the shape of ``like``."""
    made: Tensor = torch.onnx.ops.symbolic(
        operator, inputs, {**attributes}, dtype=kind, shape=like.shape, version=OPSET
    )
    return made


class _Steps(nn.Module):
    """A quantizer as ONNX says it."""

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.float())
        self.register_buffer("zero", quantizer.zero.to(torch.uint8))
        low, high = ((bound - quantizer.zero) * quantizer.scale for bound in (quantizer.grid.low, quantizer.grid.high))
        self.bounds = (float(low), float(high)) if quantizer.grid.bits < quantization.MOST else None

    def forward(self, values: Tensor) -> Tensor:
        if self.bounds is not None:  # the type's own bounds are wider
            values = values.clamp(*self.bounds)
        steps = _said("QuantizeLinear", (values, self.scale, self.zero), values, torch.uint8)
        return _said("DequantizeLinear", (steps, self.scale, self.zero), values, torch.float32)


class _Whole(nn.Module):
    """A weight of whole numbers, as ONNX says it."""

    steps: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, steps: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("steps", steps.to(torch.int8))
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", torch.zeros_like(scale, dtype=torch.int8))
        self.attributes = {"axis": axis} if scale.ndim else {}

    def forward(self, weight: Tensor) -> Tensor:
        return _said("DequantizeLinear", (self.steps, self.scale, self.zero), weight, torch.float32, **self.attributes)


class _Dynamic(nn.Module):
    """A linear layer whose inputs get a scale of their own, as ONNX says it."""

    steps: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, steps: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("steps", steps.to(torch.int8).t().contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", bias)

    def forward(self, values: Tensor) -> Tensor:
        steps, scale, zero = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear", (values,), {}, dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(values.shape, (), ()), version=OPSET,
        )  # fmt: skip
        like = values[..., :1].expand(*values.shape[:-1], self.steps.shape[1])
        sums = _said("MatMulInteger", (steps, self.steps, zero), like, torch.int32)
        made = sums.float() * (scale * self.scale)
        return made if self.bias is None else made + self.bias


def in_integers(network: nn.Module) -> None:
    """Have a quantized network say what it does to an ONNX exporter."""
    plan: Mapping[str, Any] = getattr(network, "quantization", {})
    dynamic = bool(plan.get("dynamic")) and set(plan["inputs"].values()) == {8}
    for name, bits in plan.get("weights", {}).items():
        layer = network.get_submodule(name)
        found = quantized.steps_of(layer, bits, layer.get_parameter("weight"))
        if found is None:
            continue
        scale = layer.get_buffer("weight_scale")
        if dynamic:
            bias = None if layer.bias is None else layer.get_parameter("bias").detach()
            network.set_submodule(name, _Dynamic(found, scale, bias))
        else:
            part = _Whole(found, scale, quantization.axis_of(layer))
            parametrize.register_parametrization(layer, "weight", part, unsafe=True)
    if not plan.get("dynamic"):
        for name, quantizer in list(quantization.quantizers(network)):
            owner, _, what = name.rpartition(" ")
            network.get_submodule(owner).add_module(f"{what}_quantizer", _Steps(quantizer))
