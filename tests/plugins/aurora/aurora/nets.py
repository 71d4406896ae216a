"""Two networks: a function and a class."""

import torch
from torch import nn


def slim(num_classes: int, hidden: int = 16) -> nn.Module:
    """A thin perceptron for images of 8×8 pixels.

    Args:
        num_classes: outputs.
        hidden: units between.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


class Wide(nn.Module):
    """One layer, and a bias to start from."""

    def __init__(self, num_classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))
