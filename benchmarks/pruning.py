"""What a network gains by losing channels, or weights: latency beside the dense network, in one run.

    python benchmarks/pruning.py [ROUNDS]

timm's ResNet-18 on images of 3×224×224, batches of 8, two threads: dense; with 90 % of its weights zero; without the
channels that carry 70 % of its multiplications. Medians over the rounds, in which each is run in turn; the outputs of
the shrunk network are compared with those of the masked one.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lab import sparsity
from lab.callbacks.profile import multiplications
from lab.networks.timm import Timm

BATCH, SIDE, SHARE = 8, 224, 0.7


@torch.no_grad()
def zeroed(network: nn.Module, masks: sparsity.Masks) -> nn.Module:
    """A copy of a network with masks laid over it."""
    found = copy.deepcopy(network)
    for name, parameter in found.named_parameters():
        if name in masks:
            parameter.mul_(masks[name])
    return found


@torch.no_grad()
def variants(network: nn.Module, example: Tensor) -> tuple[dict[str, nn.Module], float]:
    """The networks to compare, and by how much the shrunk one's outputs differ from the masked one's."""
    weights = sparsity.weights_of(network, set())
    single = sparsity.smallest({name: weight**2 for name, weight in weights.items()}, 0.9, "global", {})
    groups = sparsity.groups_of(network, example, set())
    scored = sparsity.channel_scores(groups, {name: p**2 for name, p in network.named_parameters()})
    low, high, dense = 0.0, 1.0, multiplications(network, example[:1])
    for _ in range(10):
        share = (low + high) / 2
        masks = sparsity.channel_masks(network, groups, scored, share, "layer", round_to=8)
        masked = zeroed(network, masks)
        shrunk = copy.deepcopy(masked)
        sparsity.without(shrunk, example, groups, masks)
        low, high = (low, share) if multiplications(shrunk, example[:1]) <= (1 - SHARE) * dense else (share, high)
    masks = sparsity.channel_masks(network, groups, scored, high, "layer", round_to=8)
    masked = zeroed(network, masks)
    shrunk = copy.deepcopy(masked)
    sparsity.without(shrunk, example, groups, masks)
    before, after = masked(example), shrunk(example)
    difference = float((after - before).abs().max() / before.abs().max())
    return {"dense": network, "90 % of the weights zero": zeroed(network, single), "fewer channels": shrunk}, difference


@torch.no_grad()
def main(rounds: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    network, inputs = Timm(1000, 3, "resnet18").eval(), torch.randn(BATCH, 3, SIDE, SIDE)
    found, difference = variants(network, torch.randn(2, 3, SIDE, SIDE))
    times: dict[str, list[float]] = {name: [] for name in found}
    for at in range(rounds + 1):
        for name, variant in found.items():
            began = time.perf_counter()
            variant(inputs)
            if at:  # the first warms up
                times[name].append(time.perf_counter() - began)
    table = Table(
        "", "parameters", "MACs", "of dense", "ms", "of dense", title=f"ResNet-18, {BATCH} × 3 × {SIDE} × {SIDE}"
    )
    dense = multiplications(network, inputs[:1])
    for name, variant in found.items():
        macs = multiplications(variant, inputs[:1])
        ratio = statistics.median(own / base for own, base in zip(times[name], times["dense"], strict=True))
        parameters = sum(parameter.numel() for parameter in variant.parameters())
        median = 1000 * statistics.median(times[name])
        table.add_row(name, f"{parameters:,}", f"{macs:,}", f"{macs / dense:.3f}", f"{median:.1f}", f"{ratio:.3f}")
    Console().print(table, f"outputs, shrunk against masked: {difference:.1e} of the largest")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
