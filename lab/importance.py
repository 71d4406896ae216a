"""How much single samples depend on each weight: sums over samples of powers of their gradients.

Fisher information, and the importances made of it, are means of *squared per-sample* gradients. The square of a
mini-batch's mean gradient is another, smaller number. For a layer y = W a, with g_n the gradient of sample n's loss by
y::

    Σ_n (g_n a_nᵀ)² = (G²)ᵀ A²                          one position a sample and one call a pass: a single product
    Σ_n (Σ_t g_nt a_ntᵀ)²                               several positions t (tokens, pixels, repeated calls)

A convolution is such a product over its patches. The gradients G come from one backward pass to the layers' outputs.
Parameters of which no such product is known (tied, normalisation's, recurrent, anyone's own) are differentiated sample
by sample, many at a time where ``torch.func.vmap`` can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from lab.batch import Labelled
from lab.modes import evaluating

ROOM = 2**26
"""Bytes that the gradients of the samples that are looked at together may take."""
CACHE = 2**21
"""Bytes of a convolution's patches that are made at once: those that a processor's cache holds are read again soon."""
AGREEMENT = 1e-3
"""Relative difference up to which a layer's product is the parameter's whole gradient."""
PROBED = 3
"""Samples on which that is tried."""

Kind = Literal["exact", "sampled", "empirical"]
Likelihood = Literal["classification", "regression"]
Losses = Callable[[Tensor, Tensor], Tensor]
"""Of outputs ``[b, ...]`` and positions ``[b]`` in the batch: ``[b]``."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding)


def per_sample(
    network: nn.Module, losses: Losses, inputs: Tensor, *, power: Literal[1, 2] = 2, layered: set[str] | None = None
) -> dict[str, Tensor]:
    """Σ_n |∂ℓ_n/∂θ|^power for every trainable parameter of a network, in evaluation mode.

    Gradients, modes, buffers and random state are left as they are.

    Args:
        losses: from outputs ``[b, ...]`` of some samples and their positions ``[b]`` in the batch to their losses
            ``[b]``; a sample's may depend on its own outputs alone.
        inputs: ``[B, ...]``.
        power: 1 or 2.
        layered: parameters that are known to be their layer's alone (:func:`layered_parameters`); found where it is
            left out, for two backward passes of a few samples.

    Returns:
        by parameter name, of the parameter's shape and type.
    """
    return next(_powers(network, lambda outputs: [losses], inputs, power, layered))


def fisher(
    network: nn.Module,
    batches: Iterable[Labelled],
    kind: Kind,
    *,
    likelihood: Likelihood = "classification",
    active: Callable[[Tensor | None], Tensor | None] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The diagonal of the Fisher information, as a sum over samples and their number; the mean is one by the other.

    ``exact`` is Σ_c p_c (∂ log p_c)² for classes c, or Σ_k (∂f_k)² for a regression's outputs k, whose noise is taken
    as normal, of variance 1; it takes a backward pass for each of them. ``sampled`` draws one c, or one normal
    residual, of the network's own answer; ``empirical`` takes the label, and passes over samples without one.

    Args:
        batches: inputs ``[B, ...]`` and targets, on the network's device.
        active: from a batch's ``task`` to ``[K]`` or ``[B, K]`` bool, the outputs among which a class is; None: all.
        generator: of the sampled kind.

    Returns:
        sums by parameter name, and the number of samples.
    """
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters() if p.requires_grad}
    layered: set[str] | None = None
    count = 0
    for batch in batches:
        samples = batch[batch.labelled] if kind == "empirical" else batch
        if not len(samples):
            continue
        asked = active(samples.task) if active is not None else None
        layered = layered_parameters(network, samples.inputs) if layered is None else layered

        def losses(outputs: Tensor, asked: Tensor | None = asked, targets: Tensor = samples.targets) -> list[Losses]:
            return _Answer(likelihood, asked, outputs).losses(kind, targets, generator)

        for sums in _powers(network, losses, samples.inputs, 2, layered):
            for name, value in sums.items():
                total[name] += value
        count += len(samples)
    return total, count


class _Answer:
    """What a network's outputs ``[B, K]`` say, as losses whose squared gradients are information."""

    def __init__(self, likelihood: Likelihood, asked: Tensor | None, outputs: Tensor) -> None:
        self.likelihood = likelihood
        self.asked = None if asked is None else asked.expand(outputs.shape)
        self.outputs = outputs.flatten(1)

    def losses(self, kind: Kind, targets: Tensor, generator: torch.Generator | None) -> list[Losses]:
        """One for each backward pass."""
        if self.likelihood == "regression":
            if kind == "exact":
                return [partial(self._column, k) for k in range(self.outputs.shape[1])]
            residuals = self.outputs - targets.flatten(1) if kind == "empirical" else self._noise(generator)
            return [partial(self._weighted, residuals)]
        if kind == "exact":
            everyone = range(self.outputs.shape[1])
            return [
                partial(self._weighted_class, torch.full_like(targets, c))
                for c in everyone
                if self.asked is None or bool(self.asked[:, c].any())
            ]
        if kind == "sampled":
            targets = torch.multinomial(self._scores(self.outputs, slice(None)).exp(), 1, generator=generator).squeeze(
                1
            )
        return [partial(self._class, targets)]

    def _noise(self, generator: torch.Generator | None) -> Tensor:
        like = self.outputs
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    def _scores(self, outputs: Tensor, places: Tensor | slice) -> Tensor:
        """log p, ``[b, K]``; of outputs that are not asked a large negative number without gradient."""
        if self.asked is None:
            return outputs.log_softmax(1)
        asked = self.asked[places]
        scores = outputs.masked_fill(~asked, -torch.inf).log_softmax(1)
        return torch.where(asked, scores, torch.finfo(outputs.dtype).min)

    def _class(self, classes: Tensor, outputs: Tensor, places: Tensor) -> Tensor:
        return self._scores(outputs, places).gather(1, classes[places][:, None]).squeeze(1)

    def _weighted_class(self, classes: Tensor, outputs: Tensor, places: Tensor) -> Tensor:
        """√p_c · log p_c with √p_c held: its squared gradient is p_c (∂ log p_c)²."""
        scores = self._class(classes, outputs, places)
        return scores.detach().div(2).exp() * scores

    def _column(self, column: int, outputs: Tensor, places: Tensor) -> Tensor:
        return outputs.flatten(1)[:, column]

    def _weighted(self, weights: Tensor, outputs: Tensor, places: Tensor) -> Tensor:
        return (weights[places] * outputs.flatten(1)).sum(1)


def layered_parameters(network: nn.Module, inputs: Tensor) -> set[str]:
    """The parameters whose gradients follow, sample by sample, from their layer's inputs and its outputs' gradients.

    Which they are is seen by trying, on a few samples: a weight that is tied, read by somebody else or computed from
    other parameters gets another gradient from autograd, and where samples are not a layer's first dimension, the first
    sample's loss reaches other rows of its outputs.

    Args:
        inputs: ``[B, ...]``.
    """
    candidates, found = _candidates(network), set[str]()
    few = inputs[:PROBED] if len(inputs) > 1 else torch.cat([inputs, inputs])
    with evaluating(network):
        outputs, calls = _watched(network, candidates, few)
        if not calls:
            return found
        seed = torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        weighted = (outputs * seed.view_as(outputs)).flatten(1).sum(1)
        parameters = dict(network.named_parameters())
        names = [name for layer in calls for name in candidates[layer]]
        asked = [parameters[name] for name in names]
        true = torch.autograd.grad(weighted.sum(), asked, retain_graph=True, allow_unused=True)
        gradient_of = dict(zip(names, true, strict=True))
        of_all, of_first = _gradients(weighted.sum(), calls), _gradients(weighted[0], calls)
        for layer, gradients in of_all.items():
            if not _separate(calls[layer], of_first[layer], len(few)):
                continue
            for name, value in _sums(layer, candidates[layer], calls[layer], gradients, power=0).items():
                gradient = gradient_of[name]
                if gradient is not None and _agree(value, gradient):
                    found.add(name)
    return found


def _separate(calls: list[_Call], gradients: list[Tensor | None], samples: int) -> bool:
    """Whether rows are samples, of inputs and of outputs."""
    rows = all(len(call.inputs) == samples for call in calls)
    return rows and all(g is None or (len(g) == samples and not bool(g[1:].any())) for g in gradients)


def _agree(value: Tensor, true: Tensor) -> bool:
    scale = float(true.abs().max())
    return float((value - true).abs().max()) <= AGREEMENT * scale if scale else not bool(value.any())


def _powers(
    network: nn.Module,
    losses: Callable[[Tensor], list[Losses]],
    inputs: Tensor,
    power: int,
    layered: set[str] | None,
) -> Iterator[dict[str, Tensor]]:
    """For each kind of loss, of those that the outputs ask for, the sums; all of one pass through the network."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    layered = layered_parameters(network, inputs) if layered is None else layered
    layered = layered & trained.keys()
    candidates = {
        layer: kept
        for layer, names in _candidates(network).items()
        if (kept := {n: w for n, w in names.items() if n in layered})
    }
    rest = {name: parameter for name, parameter in trained.items() if name not in layered}
    with evaluating(network):
        outputs, calls = _watched(network, candidates, inputs)
        for loss in losses(outputs.detach()):
            found: dict[str, Tensor] = {}
            gradients = (
                _gradients(loss(outputs, torch.arange(len(inputs), device=inputs.device)).sum(), calls) if calls else {}
            )
            for layer, of_layer in gradients.items():
                found |= _sums(layer, candidates[layer], calls[layer], of_layer, power)
            if rest:
                found |= _one_by_one(network, rest, loss, inputs, power)
            yield {name: found[name] for name in trained}


def _candidates(network: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Layers whose products are known, each with its parameters' names: the network's, and the layer's own."""
    trained = {id(p): name for name, p in network.named_parameters() if p.requires_grad}
    found: dict[nn.Module, dict[str, str]] = {}
    for module in network.modules():
        if isinstance(module, _LAYERS):
            own = {trained[id(p)]: key for key, p in module._parameters.items() if p is not None and id(p) in trained}
            if own:
                found[module] = own
    return found


class _Call:
    """A layer's inputs, and where in the graph its outputs are."""

    def __init__(self, inputs: Tensor, edge: GradientEdge) -> None:
        self.inputs = inputs
        self.edge = edge


def _watched(
    network: nn.Module, layers: Iterable[nn.Module], inputs: Tensor
) -> tuple[Tensor, dict[nn.Module, list[_Call]]]:
    """The network's outputs, and the calls of layers that they came about by."""
    calls: dict[nn.Module, list[_Call]] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:  # the edge of now: what follows may change the tensor in place
            calls.setdefault(layer, []).append(_Call(arguments[0].detach(), get_gradient_edge(output)))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.enable_grad():
            outputs: Tensor = network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, calls


def _gradients(total: Tensor, calls: Mapping[nn.Module, list[_Call]]) -> dict[nn.Module, list[Tensor | None]]:
    """Of a scalar, by the outputs of every call."""
    edges = [call.edge for of_layer in calls.values() for call in of_layer]
    flat = iter(torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True))
    return {layer: [next(flat) for _ in of_layer] for layer, of_layer in calls.items()}


def _sums(
    layer: nn.Module, names: Mapping[str, str], calls: list[_Call], gradients: list[Tensor | None], power: int
) -> dict[str, Tensor]:
    """Of a layer's parameters, Σ_n |∂ℓ_n|^power; with power 0 the plain sum Σ_n ∂ℓ_n."""
    pairs = [(call.inputs, g) for call, g in zip(calls, gradients, strict=True) if g is not None]
    if not pairs:
        return {name: torch.zeros_like(getattr(layer, own)) for name, own in names.items()}
    found: dict[str, Tensor] = {}
    for name, own in names.items():
        parameter = getattr(layer, own)
        if own == "bias":
            whole = torch.stack([_summed(layer, g) for _, g in pairs]).sum(0)  # (N, O)
            value = _power(whole, power).sum(0)
        elif isinstance(layer, nn.Linear):
            value = _linear(pairs, power)
        elif isinstance(layer, nn.Embedding):
            value = _embedding(layer, pairs, power)
        elif isinstance(layer, _CONVOLUTIONS):
            value = _convolution(layer, pairs, power)
        else:
            whole = torch.stack([_summed(layer, g * _normalised(layer, a)) for a, g in pairs]).sum(0)
            value = _power(whole, power).sum(0)
        found[name] = value.reshape(parameter.shape)
    return found


def _summed(layer: nn.Module, values: Tensor) -> Tensor:
    """``[N, O]``: outputs' values added up over a sample's positions."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return values.reshape(len(values), -1, int(torch.Size(layer.normalized_shape).numel())).sum(1)
    if isinstance(layer, nn.Linear):
        return values.reshape(len(values), -1, values.shape[-1]).sum(1)
    return values.flatten(2).sum(2) if values.ndim > 2 else values


def _normalised(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer of normalisation multiplies its weight with."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return F.rms_norm(inputs, layer.normalized_shape, None, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(inputs, layer.num_groups, None, None, layer.eps)
    assert isinstance(layer, _BatchNorm)
    if layer.running_mean is None:
        return F.batch_norm(inputs, None, None, None, None, True, 0.0, layer.eps)
    return F.batch_norm(inputs, layer.running_mean, layer.running_var, None, None, False, 0.0, layer.eps)


def _embedding(layer: nn.Embedding, pairs: list[tuple[Tensor, Tensor]], power: int) -> Tensor:
    """Of a weight ``[V, D]``: a sample's gradient is that of all places of a token together."""
    tokens = torch.cat([a.reshape(len(a), -1) for a, _ in pairs], dim=1)  # (N, T)
    gradient = torch.cat([g.reshape(len(g), -1, g.shape[-1]) for _, g in pairs], dim=1)  # (N, T, D)
    size = layer.num_embeddings
    places = torch.arange(len(tokens), device=tokens.device)[:, None] * size + tokens
    known, which = places.reshape(-1).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    sums = gradient.new_zeros(len(known), gradient.shape[-1]).index_add_(0, which, gradient.flatten(0, 1))
    total = gradient.new_zeros(size, gradient.shape[-1]).index_add_(0, known % size, _power(sums, power))
    if layer.padding_idx is not None:
        total[layer.padding_idx] = 0
    return total


def _power(values: Tensor, power: int) -> Tensor:
    return values.square() if power == 2 else values.abs() if power == 1 else values


def _linear(pairs: list[tuple[Tensor, Tensor]], power: int) -> Tensor:
    """Of a weight ``[O, I]``."""
    if len(pairs) == 1 and pairs[0][0].ndim == 2:
        inputs, gradient = pairs[0]
        return _power(gradient, power).T @ _power(inputs, power)
    inputs = torch.cat([a.reshape(len(a), -1, a.shape[-1]) for a, _ in pairs], dim=1)  # (N, T, I)
    gradient = torch.cat([g.reshape(len(g), -1, g.shape[-1]) for _, g in pairs], dim=1)  # (N, T, O)
    return _products(gradient.transpose(1, 2), inputs, power)


def _convolution(layer: Any, pairs: list[tuple[Tensor, Tensor]], power: int) -> Tensor:
    """Of a weight ``[O, I/groups, *kernel]``: positions are the patches."""
    groups = layer.groups
    size = len(pairs[0][0])
    total = torch.zeros(groups, layer.out_channels // groups, layer.weight[0].numel(), device=pairs[0][0].device,
                        dtype=pairs[0][0].dtype)  # fmt: skip
    patch_bytes = sum(layer.weight[0].numel() * groups * g[0, 0].numel() * a.element_size() for a, g in pairs)
    step = max(1, min(ROOM, CACHE) // max(patch_bytes, 1))
    for begin in range(0, size, step):
        part = slice(begin, begin + step)
        patches = _joined([_patches(layer, a[part]) for a, _ in pairs])  # (n, groups, I/groups·kernel, T)
        gradient = _joined([g[part].flatten(2) for _, g in pairs])  # (n, O, T)
        gradient = gradient.reshape(len(gradient), groups, -1, gradient.shape[2])
        for group in range(groups):
            total[group] += _products(gradient[:, group], patches[:, group].transpose(1, 2), power)
    return total


def _joined(parts: list[Tensor]) -> Tensor:
    """Positions of several calls, the last dimension, end to end."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _patches(layer: Any, inputs: Tensor) -> Tensor:
    """What each output position of a convolution sees: ``[N, groups, I/groups · kernel, positions]``."""
    kernel, dimensions = layer.kernel_size, len(layer.kernel_size)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    if dimensions == 2:  # torch's own is the fastest
        unfolded = F.unfold(inputs, kernel, layer.dilation, 0, layer.stride)
        return unfolded.reshape(len(inputs), layer.groups, -1, unfolded.shape[2])
    for axis in range(dimensions):
        reach = layer.dilation[axis] * (kernel[axis] - 1) + 1
        inputs = inputs.unfold(2 + axis, reach, layer.stride[axis])[..., :: layer.dilation[axis]]
    # (N, I, *positions, *kernel) to (N, I, *kernel, positions)
    kernels = range(2 + dimensions, 2 + 2 * dimensions)
    ordered = inputs.permute(0, 1, *kernels, *range(2, 2 + dimensions)).flatten(2 + dimensions)
    return ordered.reshape(len(inputs), layer.groups, -1, ordered.shape[-1])


def _products(gradient: Tensor, inputs: Tensor, power: int) -> Tensor:
    """Σ_n |G_n A_n|^power of ``[N, O, T]`` and ``[N, T, I]``: ``[O, I]``, some samples at a time."""
    if power == 0:
        return torch.einsum("not,nti->oi", gradient, inputs)
    size = gradient.shape[1] * inputs.shape[2] * gradient.element_size()
    step = max(1, ROOM // size)
    total = gradient.new_zeros(gradient.shape[1], inputs.shape[2])
    for begin in range(0, len(gradient), step):
        product = torch.bmm(gradient[begin : begin + step], inputs[begin : begin + step])
        total += product.square_().sum(0) if power == 2 else product.abs_().sum(0)
    return total


def _one_by_one(
    network: nn.Module, parameters: Mapping[str, Tensor], losses: Losses, inputs: Tensor, power: int
) -> dict[str, Tensor]:
    """Of any parameters, by the gradients of every sample for itself."""
    plain = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss(values: dict[str, Tensor], sample: Tensor, place: Tensor) -> Tensor:
        return losses(functional_call(network, values, (sample[None],)), place[None]).squeeze(0)

    places = torch.arange(len(inputs), device=inputs.device)
    size = sum(value.numel() * value.element_size() for value in plain.values())
    step = max(1, ROOM // max(size, 1))
    total = {name: torch.zeros_like(value) for name, value in plain.items()}
    gradients_of = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")  # of what vmap does by a loop
            for part in torch.split(places, step):
                for name, value in gradients_of(plain, inputs[part], part).items():
                    total[name] += _power(value, power).sum(0)
    except (RuntimeError, ValueError):  # what vmap cannot do is done sample by sample
        total = {name: torch.zeros_like(value) for name, value in plain.items()}
        for place in torch.split(places, 1):
            with torch.enable_grad():
                own = losses(network(inputs[place]), place).sum()
            gradients = torch.autograd.grad(own, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(plain, gradients, strict=True):
                if gradient is not None:
                    total[name] += _power(gradient, power)
    return total
