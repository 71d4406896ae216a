"""Quantization: weights and activations are whole numbers of few bits times a scale.

B. Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR
2018, arXiv:1712.05877. A number x becomes q = clamp(round(x / s) + z) and counts as (q − z)·s. Weights have a scale for
each output channel and z = 0; activations one scale and one z a tensor, such that zero is exact. In training, gradients
pass the rounding unchanged, and the scales learn (S. Esser et al.: Learned Step Size Quantization, ICLR 2020,
arXiv:1902.08153).

The network stays the modules that it is: a layer's weight has a parametrization, and where activations are rounded a
module has an ``output_quantizer`` or ``input_quantizer``. Batch norms after a layer are folded into it beforehand, so
what is trained and tested computes what the exported network computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lab.distributed import summed
from lab.folding import fold
from lab.quantizer import Observer, Quantizer, Seen, grid_of, weight_range
from lab.wiring import PASSING, RECTIFYING, Wiring

Plan = dict[str, Any]
"""What is quantized, as plain values: ``weights``, ``outputs`` and ``inputs`` with the bits of each by a module's name;
``folded``, the batch norms that are in the layer before them; ``per_channel``; ``dynamic``."""
FEWEST, MOST = 2, 8
"""Bits."""
NAMED = 8
"""How many weights an error names."""


def plan(
    network: nn.Module,
    example: Tensor,
    left: set[str],
    *,
    bits: int,
    activation_bits: int,
    ends: int,
    per_channel: bool = True,
    dynamic: bool = False,
) -> Plan:
    """What to quantize in a network; batch norms that follow a layer are folded into it, in place.

    Weights of linear and convolutional layers that a pass calls, and the activations that enter them. The output of a
    convolution is rounded as well where anything but rectification stands between it and a layer that rounds its input:
    an integer convolution gives integers.

    Args:
        left: names of layers to leave alone.
        bits: of weights.
        activation_bits: of activations.
        ends: bits of the first and the last layer's weights, and of what enters them, where that is more.
        dynamic: linear layers alone, each input with a scale of its own.

    Raises:
        ValueError: nothing can be quantized.
    """
    folded = {} if dynamic else fold(network, Wiring(network, example), left)
    wiring = Wiring(network, example)
    kinds = (nn.Linear,) if dynamic else (nn.Linear, _ConvNd)
    called = list(dict.fromkeys(node.layer for node in wiring.nodes if node.layer is not None))
    parts = dict(network.named_modules())
    layers = [name for name in called if isinstance(parts[name], kinds) and name not in left]
    if not layers:
        others = ", ".join(exact(network, {}, left)[:NAMED])
        raise ValueError(
            f"{type(network).__name__} calls no {'linear' if dynamic else 'linear or convolutional'} layer that is "
            f"not left alone{f'; it has other weights: {others}' if others else ''}"
        )
    owners: dict[int, str] = {}
    for name in layers:
        if parametrize.is_parametrized(parts[name], "weight"):
            raise ValueError(f"{name}'s weight is made of others already, by weight_norm say: leave it alone")
        first = owners.setdefault(id(parts[name].weight), name)
        if first != name:
            raise ValueError(f"{name} has the weight of {first}: leave one of them alone")
    outer = {layers[0], layers[-1]} if ends > min(bits, activation_bits) else set()
    found: Plan = {
        "weights": {name: max(bits, ends) if name in outer else bits for name in layers},
        "outputs": {}, "inputs": {}, "folded": folded, "per_channel": per_channel, "dynamic": dynamic,
    }  # fmt: skip
    _place(wiring, parts, found, activation_bits, {name: max(activation_bits, ends) for name in outer})
    return found


def exact(network: nn.Module, weights: Iterable[str], left: set[str]) -> list[str]:
    """The names of matrices and kernels that stay exact, and that nobody asked to be left: of recurrent layers, say.

    Args:
        weights: names of the layers whose weights are rounded.
        left: names of layers that are left alone.
    """
    passed = {*weights, *left}
    return [n for n, p in network.named_parameters() if p.ndim > 1 and n.rpartition(".")[0] not in passed]


def _place(wiring: Wiring, parts: Mapping[str, nn.Module], found: Plan, bits: int, outer: Mapping[str, int]) -> None:
    """Where activations are rounded."""
    rounded_at: set[int] = set()
    for layer in found["weights"]:
        for place in wiring.of(layer):
            source = wiring.origin(wiring.nodes[place].inputs[0])
            at = None if found["dynamic"] else wiring.output_of(source)
            kind, name = ("outputs", at) if at is not None else ("inputs", layer)
            found[kind][name] = max(found[kind].get(name, 0), outer.get(layer, bits))
            if at is not None:
                rounded_at.add(source)
    for layer in found["weights"]:
        if found["dynamic"] or not isinstance(parts[layer], _ConvNd):
            continue
        for place in wiring.of(layer):
            here, last = place, place
            while here not in rounded_at:
                after = wiring.consumers[here]
                if not after or all(wiring.nodes[other].layer in found["inputs"] for other in after):
                    break  # the network's own output, or it is rounded as it enters
                if len(after) == 1 and wiring.nodes[after[0]].kind in (*PASSING, *RECTIFYING):
                    here = after[0]
                    last = here if wiring.nodes[here].kind in RECTIFYING and wiring.output_of(here) else last
                    continue
                at = wiring.output_of(last) or layer
                found["outputs"][at] = max(found["outputs"].get(at, 0), bits)
                break


def insert(network: nn.Module, found: Plan, *, learned: bool = False) -> None:
    """Have weights and activations rounded as a plan says, with scales that await calibration."""
    network.quantization = found  # type: ignore[assignment]
    for name, bits in found["weights"].items():
        layer = network.get_submodule(name)
        quantizer = of_weight(layer, bits, found["per_channel"], learned=learned)
        quantizer.to(layer.get_parameter("weight").device)
        parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    hook(network, found, learned=learned)


def axis_of(layer: nn.Module) -> int:
    """The dimension of a layer's weight that has its outputs."""
    return 1 if isinstance(layer, _ConvTransposeNd) and layer.groups == 1 else 0


def of_weight(layer: nn.Module, bits: int, per_channel: bool, *, learned: bool = False) -> Quantizer:
    """What rounds a layer's weight, its scales not yet known."""
    axis, weight = axis_of(layer), layer.get_parameter("weight")
    return Quantizer(bits, signed=True, channels=weight.shape[axis] if per_channel else 0, axis=axis, learned=learned)


def hook(network: nn.Module, found: Plan, *, learned: bool = False) -> None:
    """Have activations rounded as a plan says, with scales that await values."""
    like = _kind(next(network.parameters()))
    for kind, attribute in (("outputs", "output_quantizer"), ("inputs", "input_quantizer")):
        for name, bits in found[kind].items():
            part = network.get_submodule(name)
            part.add_module(attribute, Quantizer(bits, dynamic=found["dynamic"], learned=learned).to(**like))
            if kind == "outputs":
                part.register_forward_hook(_output)
            else:
                part.register_forward_pre_hook(_input)


def _kind(weight: Tensor) -> dict[str, Any]:
    """Where scales of a weight are, and of what type: no narrower than 32 bits."""
    return {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}


def _output(module: nn.Module, args: Any, made: Tensor) -> Tensor:
    quantizer: nn.Module = module.output_quantizer  # type: ignore[assignment]
    rounded_: Tensor = quantizer(made)
    return rounded_


def _input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer: nn.Module = module.input_quantizer  # type: ignore[assignment]
    return (quantizer(args[0]), *args[1:])


def quantizers(network: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """The quantizers, each by the name of its layer or module and what it rounds: ``conv1 weight``, ``act1 output``."""
    for name, part in network.named_modules():
        if isinstance(part, Quantizer):
            owner, _, what = name.partition(".parametrizations.") if ".parametrizations." in name else (
                name.rpartition(".")[0], "", name.rpartition(".")[2].removesuffix("_quantizer")
            )  # fmt: skip
            yield f"{owner} {what.removesuffix('.0')}", part


@torch.no_grad()
def calibrate(
    network: nn.Module,
    batches: Callable[[], Iterable[Tensor]],
    observer: Observer = "mse",
    percentile: float = 99.99,
) -> None:
    """Give all scales values: weights' from the weights, activations' from what passes, of all processes together.

    Args:
        network: in evaluation mode.
        batches: gives the inputs, ``[B, ...]`` each, and the same ones when it is asked again.
        observer: how a range is chosen: all of it (``minmax``), all but the outermost (``percentile``), or what has
            the least squared error (``mse``).
        percentile: of that observer.

    Raises:
        ValueError: there are no samples, or something that was planned for was never called.
    """
    activations = {}
    for name, quantizer in quantizers(network):
        if quantizer.grid.signed:
            layer = network.get_submodule(name.partition(" ")[0])
            original = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
            quantizer.scale.copy_(weight_range(original, quantizer, observer, percentile))
        elif not quantizer.dynamic:
            activations[name] = quantizer
    if not activations:
        return
    try:
        for quantizer in activations.values():
            quantizer.seen = Seen(counting=observer != "minmax")
        _pass(network, batches)
        for name, quantizer in activations.items():
            if quantizer.seen is None or not quantizer.seen.agree():
                raise ValueError(f"calibration never reached {name}")
        if observer != "minmax":
            _pass(network, batches)
        for quantizer in activations.values():
            assert quantizer.seen is not None
            scale, zero = grid_of(*quantizer.seen.chosen(observer, percentile, quantizer.grid), quantizer.grid)
            quantizer.scale.copy_(scale)
            quantizer.zero.copy_(zero)
    finally:
        for quantizer in activations.values():
            quantizer.seen = None


def _pass(network: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
    with exactly(network):
        any_ = False
        for inputs in batches():
            any_ = True
            network(inputs)
    if not any_:
        raise ValueError("calibration needs samples, and the data gave none")


@torch.no_grad()
def correct(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Shift biases by as much as the rounding of weights shifts the means of the layers' outputs, channel by channel.

    M. Nagel et al.: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
    arXiv:1906.04721, section 4.2, with means over samples. Layers without a bias are left as they are.

    Args:
        network: calibrated, in evaluation mode.
        batches: inputs, ``[B, ...]`` each, of this process; means are those of all.
    """
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def compare(layer: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> None:
        quantizer: Quantizer = layer.parametrizations["weight"][0]  # type: ignore[index, assignment]
        outputs = []
        for quantizer.enabled in (False, True):
            outputs.append(type(layer).forward(layer, *args))  # on the inputs as they are rounded
        away = (outputs[0] - outputs[1]).double().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        sums[layer] = sums.get(layer, torch.zeros_like(away[:, 0])) + away.sum(1)
        counts[layer] = counts.get(layer, 0) + away.shape[1]

    layers = [network.get_submodule(name) for name in network.quantization["weights"]]  # type: ignore[index]
    handles = [layer.register_forward_hook(compare, prepend=True) for layer in layers if layer.bias is not None]
    try:
        for inputs in batches:
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer, total in sums.items():
        shift, count = summed(total, counts[layer])
        bias = layer.get_parameter("bias")
        bias.add_((shift / count).to(bias.dtype))


@contextmanager
def exactly(network: nn.Module, except_for: Sequence[Quantizer] = ()) -> Iterator[None]:
    """Nothing is rounded for a while, except by some."""
    found = [quantizer for _, quantizer in quantizers(network)]
    before = [quantizer.enabled for quantizer in found]
    for quantizer in found:
        quantizer.enabled = quantizer in except_for
    try:
        yield
    finally:
        for quantizer, enabled in zip(found, before, strict=True):
            quantizer.enabled = enabled


@torch.no_grad()
def sensitivity(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """How much each quantizer alone costs: signal to noise of the network's outputs, in decibels; less is worse.

    Args:
        inputs: ``[B, ...]``.
    """
    with exactly(network):
        exact = network(inputs).double()
    found = {}
    for name, quantizer in quantizers(network):
        with exactly(network, [quantizer]):
            noise = (network(inputs).double() - exact).square().sum()
        found[name] = float(10 * torch.log10(exact.square().sum() / noise.clamp_min(1e-30)))
    return found


@torch.no_grad()
def settle(network: nn.Module) -> None:
    """Make rounded weights plain ones, and learned scales too: each layer keeps its weight's as ``weight_scale``."""
    for name in network.quantization["weights"]:  # type: ignore[index]
        layer = network.get_submodule(name)
        quantizer = layer.parametrizations["weight"][0]  # type: ignore[index]
        assert isinstance(quantizer, Quantizer)
        quantizer.settle()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        layer.register_buffer("weight_scale", quantizer.scale.clone())
    for _, quantizer in quantizers(network):
        quantizer.settle()
