"""What a step of adaptation costs: both domains in one pass through the network, against a pass for each.

    python benchmarks/adaptation.py [ROUNDS]

A DANN step (forward, backward, optimizer) on 64 + 64 images (3, 28, 28), one thread: in one pass, as lab does it, with
batch statistics of each domain and of the mixture, and in two passes. Blocks of 20 steps, in turns; medians over the
rounds, ratios to the two passes of the same round.
"""

from __future__ import annotations

import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lab.batch import SourceTarget
from lab.datamodules.mnist_blend import MNISTBlend
from lab.modules.adaptation import View
from lab.modules.dann import DANN
from lab.networks.convnet import ConvNet
from lab.networks.ganin import Ganin
from lab.networks.resnet import ResNet
from lab.objectives.classification import Classification

STEPS = 20
SHAPE = (3, 28, 28)
NETWORKS = {
    "ganin 20": lambda: Ganin(10, SHAPE, width=20),
    "ganin 20, batch norm": lambda: Ganin(10, SHAPE, width=20, batch_norm=True),
    "convnet 16": lambda: ConvNet(10, 3, 16),
    "resnet 8": lambda: ResNet(10, 3, depth=8, width=8),
}


class Twice(DANN):
    """A pass for each domain."""

    def views(self, batch: SourceTarget) -> tuple[View, View]:
        found = []
        for part in (batch.source, batch.target):
            features = self.features(part.inputs)
            found.append(View(features, self.head(features)))
        return found[0], found[1]


KINDS: dict[str, tuple[type[DANN], dict[str, Any]]] = {
    "two passes": (Twice, {}),
    "one, each domain's statistics": (DANN, {"batch_norm": "separate"}),
    "one, the mixture's": (DANN, {"batch_norm": "mixed"}),
}


class Stepping:
    """Trains a module outside a trainer."""

    def __init__(self, kind: str, network: str) -> None:
        torch.manual_seed(0)
        made, arguments = KINDS[kind]
        self.module = made(
            network=NETWORKS[network](), objective=Classification(10), input_shape=SHAPE, **arguments
        ).train()
        self.module._trainer = SimpleNamespace(global_step=50, log_every_n_steps=10**9)  # type: ignore[assignment]
        self.module.total_steps = 100
        self.module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 1e-4)

    def __call__(self, batches: list[SourceTarget]) -> float:
        """Milliseconds a step."""
        begin = time.perf_counter()
        for number, batch in enumerate(batches):
            self.optimizer.zero_grad()
            self.module.training_step(batch, number).backward()
            self.optimizer.step()
        return 1000 * (time.perf_counter() - begin) / len(batches)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    data = MNISTBlend(batch_size=64)
    data.prepare_data()
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(STEPS), strict=False)]
    table = Table("", *(f"{kind}, ms" for kind in KINDS), title="a step of 64 + 64 images (to two passes)")
    for network in NETWORKS:
        steps = {kind: Stepping(kind, network) for kind in KINDS}
        for step in steps.values():
            step(batches[:3])
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(rounds):
            order = list(steps)[turn % len(steps) :] + list(steps)[: turn % len(steps)]
            for kind in order:
                found[kind].append(steps[kind](batches))
        cells = []
        for values in found.values():
            ratio = statistics.median(a / b for a, b in zip(values, found["two passes"], strict=True))
            cells.append(f"{statistics.median(values):.1f} ({ratio:.2f})")
        table.add_row(network, *cells)
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
