"""The multilayer perceptron: fully connected layers with ReLU, or tanh, between them.

D. Rumelhart, G. Hinton, R. Williams: Learning Representations by Back-Propagating Errors, Nature 323, 1986; rectified
units after Nair and Hinton 2010, dropout after Srivastava et al. 2014.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from lab.ranges import Count, Dropout, checked


class MLP(nn.Module):
    """Fully connected layers on the flattened input.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        input_shape: shape of one input, without the batch dimension.
        hidden: units of each hidden layer; with none the network is linear.
        dropout: probability that a hidden unit is dropped in training, in [0, 1).
        activation: what a hidden unit makes of its sum; tanh is usual for policies.
    """

    @checked
    def __init__(
        self,
        num_classes: Count,
        input_shape: tuple[Count, ...],
        hidden: tuple[Count, ...] = (256, 256),
        dropout: Dropout = 0.0,
        activation: Literal["relu", "tanh"] = "relu",
    ) -> None:
        super().__init__()
        sizes = (math.prod(input_shape), *hidden)
        self.body = nn.Sequential(nn.Flatten())
        for inputs, outputs in pairwise(sizes):
            unit = nn.ReLU() if activation == "relu" else nn.Tanh()
            self.body.extend([nn.Linear(inputs, outputs), unit, nn.Dropout(dropout)])
        self.head = nn.Linear(sizes[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, *input_shape]`` to the last hidden layer, ``[B, hidden[-1]]``.

        Raises:
            ValueError: the inputs are token ids.
        """
        if x.dtype == torch.int64:
            raise ValueError("mlp takes numbers, the inputs are token ids: use a network for text, such as transformer")
        features: Tensor = self.body(x)  # (B, hidden[-1])
        return features

    def forward(self, x: Tensor) -> Tensor:
        """``[B, *input_shape]`` to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits
