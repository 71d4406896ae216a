"""What a step costs as tasks grow: the same with 1, 10 and 50 tasks behind it.

    python benchmarks/continual.py [ROUNDS]

A step of each technique on permuted MNIST, an MLP 784-400-400-10, batches of 64, one thread, after so many tasks were
learnt (for a batch each). Medians over the rounds of 50 steps; ratios are to the naive technique's step of the same
round.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch.optim import SGD

from lab.datamodules.mnist5k import MNIST5k
from lab.datamodules.permuted import Permuted
from lab.modules.ewc import EWC
from lab.modules.lwf import LwF
from lab.modules.mas import MAS
from lab.modules.naive import Naive
from lab.modules.replay import Replay
from lab.modules.si import SI
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification

BEHIND = (1, 10, 50)
STEPS = 50
KINDS: dict[str, Callable[..., LightningModule]] = {
    "naive": Naive, "ewc": EWC, "ewc online": partial(EWC, online=True), "si": SI, "mas": MAS, "lwf": LwF,
    "replay": Replay,
}  # fmt: skip


class Timed(Callback):
    """The seconds of the last task's steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def step(self) -> float:
        last = self.times[-STEPS:]
        return (last[-1] - last[0]) / (len(last) - 1)


def milliseconds(kind: str, tasks: int) -> float:
    """Of a step in the last task of a stream with so many before it; each is learnt for one epoch of some batches."""
    torch.manual_seed(0)
    data = Permuted(MNIST5k(labels=64 * STEPS, batch_size=64), tasks=tasks + 1)
    data.prepare_data()
    network, optimizer = MLP(10, (1, 28, 28), (400, 400)), partial(SGD, lr=1e-4)
    module = KINDS[kind](network=network, objective=Classification(10), optimizer=optimizer, tasks=tasks + 1)
    module.judged = lambda: torch.full((tasks + 1,), torch.nan)  # what is measured at a task's end is no step's cost
    timed = Timed()
    trainer = Trainer(
        max_epochs=1, limit_train_batches=STEPS, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", callbacks=[timed],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return 1000 * timed.step


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: dict[tuple[str, int], list[float]] = {(kind, tasks): [] for kind in KINDS for tasks in BEHIND}
    for _ in range(rounds):
        for (kind, tasks), values in found.items():
            values.append(milliseconds(kind, tasks))
    table = Table("", *(f"{tasks} tasks, ms (to naive)" for tasks in BEHIND), "50 to 1", title="a step")
    for kind in KINDS:
        cells = []
        for tasks in BEHIND:
            ratio = statistics.median(
                own / naive for own, naive in zip(found[kind, tasks], found["naive", tasks], strict=True)
            )
            cells.append(f"{statistics.median(found[kind, tasks]):.2f} ({ratio:.2f})")
        grown = statistics.median(b / a for a, b in zip(found[kind, 1], found[kind, 50], strict=True))
        table.add_row(kind, *cells, f"{grown:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
