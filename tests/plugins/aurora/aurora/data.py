"""Scikit-learn's digits behind plain loaders."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class Handwriting(L.LightningDataModule):
    """1,797 images of handwritten digits, 8×8 pixels."""

    facts = ("num_classes",)
    num_classes = 10

    def __init__(self, batch_size: int = 128):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(found.target)
        self.train = TensorDataset(images[:1400], labels[:1400])
        self.test = TensorDataset(images[1400:], labels[1400:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self):
        return DataLoader(self.test, batch_size=self.batch_size)
