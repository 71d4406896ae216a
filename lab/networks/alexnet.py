"""AlexNet for small images: five convolutions and three fully connected layers with dropout.

A. Krizhevsky, I. Sutskever, G. Hinton: ImageNet Classification with Deep Convolutional Neural Networks, NeurIPS 2012.
The paper's channels, 96, 256, 384, 384, 256 and twice 4,096 units, times ``width`` / 96. Departures, for small images:
the first convolution is 5×5 without a stride, overlapping 3×3 pooling halves three times, the last map is averaged to
3×3 positions so that any image size works; batch normalisation instead of local response normalisation; one GPU.
"""

from __future__ import annotations

from torch import Tensor, nn

from lab.networks.convnet import convolution
from lab.ranges import Count, Dropout, checked


class AlexNet(nn.Module):
    """AlexNet with batch normalisation, for images of any size.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        in_channels: channels of the image.
        width: channels of the first convolution; the paper's is 96.
        dropout: probability that a hidden unit is dropped in training, in [0, 1).
    """

    @checked
    def __init__(self, num_classes: Count, in_channels: Count, width: Count = 96, dropout: Dropout = 0.5) -> None:
        super().__init__()
        second, third, units = (max(size * width // 96, 1) for size in (256, 384, 4096))
        self.body = nn.Sequential(
            convolution(in_channels, width, 5),
            nn.MaxPool2d(3, 2, padding=1),
            convolution(width, second, 5),
            nn.MaxPool2d(3, 2, padding=1),
            convolution(second, third),
            convolution(third, third),
            convolution(third, second),
            nn.MaxPool2d(3, 2, padding=1),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(9 * second, units),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(units, units),
            nn.ReLU(),
        )
        self.head = nn.Linear(units, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, 4096 width / 96]`` features."""
        features: Tensor = self.body(x)  # (B, units)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits
