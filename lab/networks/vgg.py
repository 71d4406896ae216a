"""VGG for small images: 3×3 convolutions in five stages, each at half the resolution of the one before.

K. Simonyan, A. Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014, arXiv:1409.1556,
table 1: A (``depth`` 11), B (13), D (16) and E (19), w, 2w, 4w, 8w and 8w channels with w = ``width``. Departures,
all usual on small images: batch normalisation, and the mean over positions with one linear layer instead of the two
fully connected layers of 4,096 units (timm has the paper's, for ImageNet). A convolution from c to d channels has 9cd
parameters, its normalisation 2d: 9,227,210 for depth 11 on 1×28×28 and ten classes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lab.networks.convnet import convolution
from lab.ranges import Count, checked

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """VGG with batch normalisation and average pooling, for images of any size.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        in_channels: channels of the image.
        depth: layers with weights that the paper's network has; two of them are left out here.
        width: channels of the first stage; the paper's is 64.
    """

    @checked
    def __init__(
        self, num_classes: Count, in_channels: Count, depth: Literal[11, 13, 16, 19] = 11, width: Count = 64
    ) -> None:
        super().__init__()
        self.body = nn.Sequential()
        channels = in_channels
        for convolutions, factor in zip(_STAGES[depth], (1, 2, 4, 8, 8), strict=True):
            for _ in range(convolutions):
                self.body.append(convolution(channels, factor * width))
                channels = factor * width
            self.body.append(nn.MaxPool2d(2, ceil_mode=True))
        self.head = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, 8 width]`` features."""
        x = self.body(x)  # (B, 8w, H/32, W/32)
        return x.mean(dim=(2, 3))  # (B, 8w)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits
