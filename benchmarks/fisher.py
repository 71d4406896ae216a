"""How long Fisher information takes: lab beside a loop over samples and beside squared mini-batch gradients.

    python benchmarks/fisher.py [ROUNDS]

The empirical Fisher information of 1,000 images of MNIST, one thread, on an MLP 784-256-256-10 and a small CNN. The
loop, one backward pass a sample, is the true value by definition. Squared gradients of mini-batches of 32 are what
Avalanche's EWC takes for it (its ``compute_importances``: the gradient of a batch's mean loss, squared, the mean over
the batches); how much of the true value they have is told beside. Times are medians over the rounds, ratios those of
the same round; memory is the most that a process of its own grew by.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lab.batch import Labelled
from lab.datamodules.mnist5k import MNIST5k
from lab.importance import fisher
from lab.networks.mlp import MLP

SAMPLES = 1000
AVALANCHES = 32

Information = dict[str, Tensor]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-256-256-10": lambda: MLP(10, (1, 28, 28), (256, 256)),
    "CNN 8-16": convolutional,
}


def looped(network: nn.Module, data: Labelled) -> Information:
    """One backward pass a sample."""
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for place in range(len(data)):
        loss = F.cross_entropy(network(data.inputs[place : place + 1]), data.targets[place : place + 1])
        for (name, _), gradient in zip(
            total.items(), torch.autograd.grad(loss, list(network.parameters())), strict=True
        ):
            total[name] += gradient.square()
    return {name: value / len(data) for name, value in total.items()}


def batched(network: nn.Module, data: Labelled) -> Information:
    """The mean of the squares of mini-batches' mean gradients."""
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for begin in range(0, len(data), AVALANCHES):
        part = data[begin : begin + AVALANCHES]
        loss = F.cross_entropy(network(part.inputs), part.targets)
        for (name, _), gradient in zip(
            total.items(), torch.autograd.grad(loss, list(network.parameters())), strict=True
        ):
            total[name] += gradient.square()
    return {name: value / -(-len(data) // AVALANCHES) for name, value in total.items()}


def labs(network: nn.Module, data: Labelled) -> Information:
    """In batches of 250."""
    sums, count = fisher(network, (data[begin : begin + 250] for begin in range(0, len(data), 250)), "empirical")
    return {name: value / count for name, value in sums.items()}


WAYS: dict[str, Callable[[nn.Module, Labelled], Information]] = {
    "loop over samples": looped, "squared mini-batches of 32": batched, "lab": labs,
}  # fmt: skip


def images() -> Labelled:
    data = MNIST5k()
    data.prepare_data()
    data.setup()
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    return Labelled(data.train.inputs[chosen].float() / 255, data.train.targets[chosen])


def learnt(name: str, data: Labelled) -> nn.Module:
    """A network that has learnt a little: what it hasn't learnt anything from has gradients of another kind."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(2):
        for begin in range(0, len(data), 50):
            part = data[begin : begin + 50]
            optimizer.zero_grad()
            F.cross_entropy(network(part.inputs), part.targets).backward()
            optimizer.step()
    return network.eval()


def grown(name: str, way: str, found: multiprocessing.Queue) -> None:
    """The MB by which a process's memory grew at most."""
    torch.set_num_threads(1)
    data = images()
    network = learnt(name, data)
    WAYS[way](network, data[:64])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, on Linux
    before = peak()
    WAYS[way](network, data)
    found.put(peak() - before)


def peak() -> float:
    """The most memory that this process has had, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def memory(name: str, way: str) -> float:
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=grown, args=(name, way, found))
    process.start()
    megabytes: float = found.get()
    process.join()
    return megabytes


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    data = images()
    for name in NETWORKS:
        network = learnt(name, data)
        true = looped(network, data)
        size = sum(float(value.sum()) for value in true.values())
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        results: dict[str, Information] = {}
        for round_ in range(rounds + 1):  # the first one warms up
            for way, find in WAYS.items():
                began = time.perf_counter()
                results[way] = find(network, data)
                if round_:
                    times[way].append(1000 * (time.perf_counter() - began))
        table = Table("", "ms", "times as fast as the loop", "of the true value", "largest error", "MB", title=name)
        for way, values in times.items():
            ratio = statistics.median(loop / own for loop, own in zip(times["loop over samples"], values, strict=True))
            share = sum(float(value.sum()) for value in results[way].values()) / size
            error = max(float((results[way][n] - v).abs().max() / v.abs().max()) for n, v in true.items())
            cells = f"{statistics.median(values):.1f}", f"{ratio:.1f}", f"{share:.1%}", f"{error:.1e}"
            table.add_row(way, *cells, f"{memory(name, way):.0f}")
        Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
