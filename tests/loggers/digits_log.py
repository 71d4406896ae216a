"""A tiny classifier of scikit-learn's digits that logs as people do: on steps, on epochs, in validation and in test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LIGHTNINGS_OWN = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # would slow a tiny set
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # of torch, in Lightning's loaders
]


class Classifier(LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.network = nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.network(inputs), targets)
        self.log("train/loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train/weights", self.network.weight.norm())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val/accuracy": self._accuracy(batch), "val/third": torch.tensor(1 / 3, dtype=torch.float64)})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/accuracy", self._accuracy(batch))

    def _accuracy(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return (self.network(inputs).argmax(1) == targets).float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(first: int, last: int) -> DataLoader[Any]:
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images[first:last] / 16, dtype=torch.float32)
    return DataLoader(TensorDataset(inputs, torch.tensor(labels[first:last])), batch_size=50)


def fit(loggers: list[Logger], *, epochs: int = 3, test: bool = True) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        logger=loggers,
        log_every_n_steps=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = Classifier()
    trainer.fit(module, loader(0, 500), loader(500, 700))
    if test:
        trainer.test(module, loader(700, 900), verbose=False)
    return trainer
