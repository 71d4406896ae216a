"""A tiny classifier of scikit-learn's digits, its data, and a Trainer with nothing but the callbacks under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LIGHTNINGS_OWN = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # would slow a tiny set
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # of torch, in Lightning's loaders
]


class Classifier(LightningModule):
    """Learns digits, and says of each validated epoch what the test dictates, as ``val/score``."""

    def __init__(self, scores: Sequence[float] = (), in_sanity_check: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(64, 10)
        self.scores = scores
        self.in_sanity_check = in_sanity_check
        self.weights: list[Tensor] = []  # at each validation

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.network(inputs), targets)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val/accuracy", (self.network(inputs).argmax(1) == targets).float().mean())

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self.log("val/score", self.in_sanity_check)
            return
        if self.scores:
            self.log("val/score", self.scores[len(self.weights)])
        self.weights.append(self.network.weight.detach().clone())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("test/accuracy", (self.network(inputs).argmax(1) == targets).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(first: int, last: int) -> DataLoader[Any]:
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images[first:last] / 16, dtype=torch.float32)
    return DataLoader(TensorDataset(inputs, torch.tensor(labels[first:last])), batch_size=50)


def trainer(folder: Path, *callbacks: Callback, epochs: int = 4, **arguments: Any) -> Trainer:
    defaults = {"logger": False, "enable_checkpointing": bool(callbacks), "num_sanity_val_steps": 0}
    return Trainer(
        **{**defaults, **arguments},
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(module: LightningModule, folder: Path, *callbacks: Callback, epochs: int = 4, **arguments: Any) -> Trainer:
    """Ten training batches and two validation batches an epoch."""
    made = trainer(folder, *callbacks, epochs=epochs, **arguments)
    made.fit(module, loader(0, 500), loader(500, 600))
    return made
