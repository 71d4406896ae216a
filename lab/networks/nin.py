"""Network in Network: after every convolution a small multilayer perceptron at each position, as 1×1 convolutions.

M. Lin, Q. Chen, S. Yan: Network In Network, 2014, arXiv:1312.4400: three blocks of one spatial and two 1×1
convolutions, dropout and pooling between them, the mean over positions at the end. The sizes are those of the
authors' network for CIFAR-10 in proportion to ``width`` w: w, 5w/6, w/2 channels, then w. Departures: batch
normalisation; the last 1×1 convolution comes after the mean, as ``head`` (without a ReLU on it the two commute).
"""

from __future__ import annotations

from torch import Tensor, nn

from lab.networks.convnet import convolution
from lab.ranges import Count, Dropout, checked


class NiN(nn.Module):
    """Network in Network, for images of any size.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        in_channels: channels of the image.
        width: channels of the first convolution; the authors' is 192.
        dropout: probability that a unit is dropped between the blocks in training, in [0, 1).
    """

    @checked
    def __init__(self, num_classes: Count, in_channels: Count, width: Count = 192, dropout: Dropout = 0.5) -> None:
        super().__init__()
        middle, narrow = max(round(width * 5 / 6), 1), max(round(width / 2), 1)
        self.body = nn.Sequential(
            convolution(in_channels, width, 5),
            convolution(width, middle, 1),
            convolution(middle, narrow, 1),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Dropout(dropout),
            convolution(narrow, width, 5),
            convolution(width, width, 1),
            convolution(width, width, 1),
            nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
            nn.Dropout(dropout),
            convolution(width, width),
            convolution(width, width, 1),
        )
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, width]`` features."""
        x = self.body(x)  # (B, w, H/4, W/4)
        return x.mean(dim=(2, 3))  # (B, w)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits
