"""Two tasks: one around any network, one that is its own."""

from collections.abc import Callable, Iterable

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn


class Classify(L.LightningModule):
    """Trains any network with cross-entropy.

    Args:
        network: images to logits.
        lr: of Adam, where no optimizer is given.
        optimizer: waits for the parameters.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 0.01,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.lr = lr
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/accuracy", (self.network(x).argmax(1) == y).float().mean(), batch_size=len(x))

    def predict_step(self, batch, batch_idx):
        return self.network(batch[0]).argmax(1)

    def configure_optimizers(self):
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Linear(L.LightningModule):
    """Logistic regression: the module itself is the network."""

    def __init__(self, num_classes: int, lr: float = 0.1):
        super().__init__()
        self.layer = nn.Linear(64, num_classes)
        self.lr = lr

    def forward(self, x):
        return self.layer(x.flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)
