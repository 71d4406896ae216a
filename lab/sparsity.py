"""Which weights and which channels of a network count least, and a network without them.

Scores are sums that are 0 where nothing is lost: w² for ``magnitude``; ½ F w² for ``fisher``, the loss that a weight's
removal is expected to cost (Y. LeCun, J. Denker and S. Solla: Optimal Brain Damage, NIPS 1989, with the Fisher
information in the place of the Hessian). A channel's score is the sum over all that goes with it: its filter, its
normalisation, and what reads it. What goes together is Torch-Pruning's dependency graph (G. Fang et al.: DepGraph,
CVPR 2023, arXiv:2301.12900).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lab import surgery
from lab.modes import evaluating

Scope = Literal["global", "layer"]
Masks = dict[str, Tensor]
"""By a parameter's name which of its weights stay: bool, of its shape."""
SHOWN = 12
"""How many layers an error lists."""


def layers_of(network: nn.Module) -> list[str]:
    """The names of the layers whose weights can go: those with a matrix or a kernel."""
    return [name for name, part in network.named_modules() if isinstance(part, nn.Linear | _ConvNd)]


def ignored(network: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The layers that patterns name.

    Raises:
        ValueError: one names none; lists the layers. Or none is left.
    """
    known = layers_of(network)
    if not known:
        raise ValueError(f"{type(network).__name__} has no linear or convolutional layer")
    found: set[str] = set()
    for pattern in patterns:
        matching = [name for name in known if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not matching:
            more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
            raise ValueError(f"ignore: no layer's name fits '{pattern}'; there are: {', '.join(known[:SHOWN])}{more}")
        found.update(matching)
    if len(found) == len(known):
        raise ValueError("ignore: leaves no layer")
    return found


def weights_of(network: nn.Module, left: set[str]) -> dict[str, nn.Parameter]:
    """The weights of the layers that are not left alone, by name; one that several layers share once."""
    wanted = {f"{name}.weight" for name in layers_of(network) if name not in left}
    return {name: parameter for name, parameter in network.named_parameters() if name in wanted}


def smallest(scores: Mapping[str, Tensor], sparsity: float, scope: Scope, before: Mapping[str, Tensor]) -> Masks:
    """Masks that leave 1 − ``sparsity`` of the weights, those of the highest scores; what was gone stays so.

    Args:
        scores: of any shape, at least 0.
        scope: whether the share is of all weights together, or of each tensor's.
    """
    alive = {
        name: torch.where(before[name], score, score.new_tensor(-1.0)) if name in before else score
        for name, score in scores.items()
    }
    if scope == "layer":
        return {name: _highest(score.flatten(), sparsity).view_as(score) for name, score in alive.items()}
    together = _highest(torch.cat([score.flatten() for score in alive.values()]), sparsity)
    parts = torch.split(together, [score.numel() for score in alive.values()])
    return {name: part.view_as(score) for (name, score), part in zip(alive.items(), parts, strict=True)}


def _highest(scores: Tensor, sparsity: float) -> Tensor:
    """Of a vector which stay: exactly round((1 − sparsity) · N) of them."""
    kept = round((1 - sparsity) * len(scores))
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[scores.topk(kept).indices] = True
    return mask & (scores >= 0)


@dataclass(frozen=True)
class Group:
    """Channels that can only go together, layer by layer.

    Args:
        root: the layer whose output they are.
        channels: how many.
        parts: for each channel the slices of parameters that go with it: name, dimension, indices.
    """

    root: str
    channels: int
    parts: list[list[tuple[str, int, list[int]]]]


def groups_of(network: nn.Module, example: Tensor, left: set[str]) -> list[Group]:
    """The groups of channels that a network can lose; its outputs stay as many as they are.

    Args:
        example: ``[B, ...]``, inputs to follow through the network.
        left: names of layers to leave alone.

    Raises:
        ValueError: the network has attention, which has no channels of that kind, or nothing that can go.
    """
    attention = [name for name, part in network.named_modules() if hasattr(part, "num_heads")]
    if attention:
        raise ValueError(f"{attention[0]} is attention: only weights can be pruned there, not channels")
    graph, names = _graph(network, example)
    parameters = dict(network.named_parameters())
    last = _last_layers(network)
    keep = [part for name, part in network.named_modules() if name in left or part in last]
    found: list[Group] = []
    for group in graph.get_all_groups(ignored_layers=keep):
        layers = [item.dep.target.module for item in group]
        if any(isinstance(layer, _ConvNd) and 1 < layer.groups < layer.in_channels for layer in layers):
            continue
        root = group[0].dep.target.module
        channels = len(group[0].idxs)
        parts: list[list[tuple[str, int, list[int]]]] = [[] for _ in range(channels)]
        sized = [(name, dim, item) for item in group for name, dim in _tensors(item.dep, names)]
        if any(max(item.idxs) >= parameters[name].shape[dim] for name, dim, item in sized):
            continue  # channels that arithmetic of the network's own moves about, such as a shortcut that pads
        for name, dim, item in sized:
            by_channel: dict[int, list[int]] = {}
            for index, channel in zip(item.idxs, item.root_idxs, strict=True):
                by_channel.setdefault(int(channel), []).append(int(index))
            for channel, indices in by_channel.items():
                parts[channel].append((name, dim, indices))
        found.append(Group(names[root], channels, parts))
    if not found:
        raise ValueError(f"{type(network).__name__} has no channels that could go")
    return found


def channel_scores(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> list[Tensor]:
    """For each group ``[channels]``: the sums of what goes with each of them, over the group's mean.

    Args:
        scores: of every parameter that a group has a part of.
    """
    found = []
    for group in groups:
        sums: dict[tuple[str, int], Tensor] = {}
        values = []
        for parts in group.parts:
            total = scores[parts[0][0]].new_zeros(())
            for name, dim, indices in parts:
                key = (name, dim)
                if key not in sums:
                    score = scores[name]
                    sums[key] = score.sum([d for d in range(score.ndim) if d != dim]) if score.ndim > 1 else score
                total = total + sums[key][indices].sum()
            values.append(total)
        scored = torch.stack(values)
        found.append(scored / scored.mean().clamp_min(torch.finfo(scored.dtype).tiny))
    return found


def channel_masks(
    network: nn.Module,
    groups: Sequence[Group],
    scored: Sequence[Tensor],
    share: float,
    scope: Scope,
    *,
    round_to: int = 1,
) -> Masks:
    """Masks without a share of the channels, those of the lowest scores; every group keeps at least ``round_to``.

    Channels whose score is 0 are gone already, and stay so.
    """
    least = [min(round_to, group.channels) for group in groups]
    if scope == "layer":
        kept = [max(round((1 - share) * group.channels), few) for group, few in zip(groups, least, strict=True)]
    else:
        order = torch.cat(list(scored)).argsort(descending=True, stable=True)
        wanted = round((1 - share) * sum(group.channels for group in groups))
        owner = torch.cat([torch.full((group.channels,), i) for i, group in enumerate(groups)])
        counts = torch.bincount(owner[order[:wanted].cpu()], minlength=len(groups))
        kept = [max(int(count), few) for count, few in zip(counts, least, strict=True)]
    kept = [min(count, max(int((score > 0).sum()), 1)) for count, score in zip(kept, scored, strict=True)]
    masks: Masks = {}
    parameters = dict(network.named_parameters())
    for group, score, count in zip(groups, scored, kept, strict=True):
        rounded = min(max(round(count / round_to), 1) * round_to, group.channels) if round_to > 1 else count
        gone = score.argsort(descending=True, stable=True)[rounded:].tolist()
        for channel in gone:
            for name, dim, indices in group.parts[channel]:
                if name not in masks:
                    masks[name] = torch.ones_like(parameters[name], dtype=torch.bool)
                masks[name].index_fill_(dim, torch.tensor(indices, device=masks[name].device), value=False)
    return masks


@torch.no_grad()
def without(network: nn.Module, example: Tensor, groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
    """Take the channels out of a network that masks have made zero, in place; what changed is its ``surgery``.

    Raises:
        ValueError: what is left cannot be built again from its class and its layers' sizes.
    """
    before, whole = surgery.sizes(network), copy.deepcopy(network)
    graph, names = _graph(network, example)
    modules = {name: module for module, name in names.items()}
    for group in groups:
        mask = masks.get(f"{group.root}.weight")
        if mask is None:
            continue
        root = modules[group.root]
        outputs = 1 if getattr(root, "transposed", False) else 0
        gone = [channel for channel in range(group.channels) if not mask.select(outputs, channel).any()]
        if gone:
            cut = graph.get_pruner_of_module(root).prune_out_channels
            graph.get_pruning_group(root, cut, gone).prune()
    now = surgery.sizes(network)
    surgery.shrink(whole, {name: found for name, found in now.items() if found != before[name]})
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name, tensor in whole.state_dict().items():
        if shapes.get(name) != tensor.shape:
            raise ValueError(f"{name} shrinks, but is no layer's: {type(network).__name__} cannot be saved so")
    network.surgery = surgery.changes(network, before)  # type: ignore[assignment]


def _graph(network: nn.Module, example: Tensor) -> tuple[Any, dict[nn.Module, str]]:
    """Torch-Pruning's graph of a network, and its layers' names."""
    import torch_pruning

    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        for parameter in network.parameters():
            parameter.requires_grad_(True)  # the graph is that of autograd
        with evaluating(network), torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=example[:1])
    finally:
        for parameter, requires in wanted:
            parameter.requires_grad_(requires)
    return graph, {part: name for name, part in network.named_modules()}


def _tensors(dependency: Any, names: Mapping[nn.Module, str]) -> list[tuple[str, int]]:
    """The parameters that a dependency takes slices of, and along which dimension."""
    layer = dependency.target.module
    if layer not in names or not list(layer.parameters(recurse=False)):
        return []
    name = names[layer]
    inwards = dependency.handler.__name__.endswith("in_channels")
    if not isinstance(layer, nn.Linear | _ConvNd):
        return [(f"{name}.{own}", 0) for own, _ in layer.named_parameters(recurse=False)]
    depthwise = isinstance(layer, _ConvNd) and layer.groups > 1
    transposed = bool(getattr(layer, "transposed", False))
    if inwards and not depthwise:
        return [(f"{name}.weight", 0 if transposed else 1)]
    outward = [(f"{name}.weight", 1 if transposed and not depthwise else 0)]
    return outward + ([(f"{name}.bias", 0)] if layer.bias is not None else [])


def _last_layers(network: nn.Module) -> list[nn.Module]:
    """The layers that make a network's outputs: its head, or else the last."""
    head = getattr(network, "head", None)
    whole = head if isinstance(head, nn.Module) and layers_of(head) else network
    found: list[nn.Module] = [part for part in whole.modules() if isinstance(part, nn.Linear | _ConvNd)]
    return found[-1:] if whole is network else found
