"""GoogLeNet for small images: nine Inception modules, each several convolutions of the same input side by side.

C. Szegedy et al.: Going Deeper with Convolutions, 2014, arXiv:1409.4842, table 1. Departures, usual on small images:
the stem keeps half the resolution instead of an eighth, batch normalisation (Ioffe and Szegedy 2015,
arXiv:1502.03167), no auxiliary classifiers. All channels are the paper's times ``width`` / 64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lab.networks.convnet import convolution
from lab.ranges import Count, Dropout, checked

# 1×1 | 1×1 before 3×3, 3×3 | 1×1 before 5×5, 5×5 | 1×1 after pooling: table 1's rows, in its order.
_STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class GoogLeNet(nn.Module):
    """GoogLeNet with batch normalisation, for images of any size.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        in_channels: channels of the image.
        width: channels of the first convolution; the paper's is 64.
        dropout: probability that a feature is dropped before the last layer in training, in [0, 1).
    """

    @checked
    def __init__(self, num_classes: Count, in_channels: Count, width: Count = 64, dropout: Dropout = 0.4) -> None:
        super().__init__()
        channels = 3 * width
        self.body = nn.Sequential(convolution(in_channels, width), _halved(), convolution(width, channels))
        for number, stage in enumerate(_STAGES):
            if number:
                self.body.append(_halved())
            for sizes in stage:
                inception = Inception(channels, [max(size * width // 64, 1) for size in sizes])
                self.body.append(inception)
                channels = inception.out_channels
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, 16 width]`` features."""
        x = self.body(x)  # (B, 16w, H/8, W/8)
        features: Tensor = self.dropout(x.mean(dim=(2, 3)))  # (B, 16w)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits


class Inception(nn.Module):
    """A 1×1, a 3×3, a 5×5 convolution and a pooling of the same input, their channels side by side (figure 2b)."""

    def __init__(self, channels: int, sizes: list[int]) -> None:
        super().__init__()
        one, before_three, three, before_five, five, pooled = sizes
        self.out_channels = one + three + five + pooled
        self.branches = nn.ModuleList(
            [
                convolution(channels, one, 1),
                nn.Sequential(convolution(channels, before_three, 1), convolution(before_three, three)),
                nn.Sequential(convolution(channels, before_five, 1), convolution(before_five, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), convolution(channels, pooled, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]`` to ``[B, out_channels, H, W]``."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _halved() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, padding=1)
