"""ResNet for small images: blocks of two convolutions that learn what to add to their input.

K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition, 2015, arXiv:1512.03385, section 4.2: the
networks for CIFAR-10, not ImageNet's (timm has those). A 3×3 convolution, then three stages of n blocks at H, H/2 and
H/4 pixels with w, 2w and 4w channels, ``depth`` = 6n + 2 layers, w = ``width``; shortcuts without parameters, zeros for
the channels that are new (the paper's option A); the mean over positions. With C input channels and K outputs it has
9Cw + (378n − 90)w² + (28n + 2)w + 4wK + K parameters: 269,722 for ResNet-20 on CIFAR-10, the paper's 0.27 M.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Ge
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from lab.networks.convnet import convolution
from lab.ranges import Count, checked


def _six_n_plus_two(depth: int) -> int:
    if depth % 6 != 2:
        raise PydanticCustomError("depth", "should be 6n + 2 (8, 14, 20, 26, 32, 44, 56, 110, ...)")
    return depth


Depth = Annotated[int, Ge(8), AfterValidator(_six_n_plus_two)]


class ResNet(nn.Module):
    """The residual network for small images, of any size.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        in_channels: channels of the image.
        depth: layers with weights, 6n + 2; the paper has 20, 32, 44, 56 and 110.
        width: channels of the first stage.
    """

    @checked
    def __init__(self, num_classes: Count, in_channels: Count, depth: Depth = 20, width: Count = 16) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        widths = [width] * blocks + [2 * width] * blocks + [4 * width] * blocks
        pairs = zip([width, *widths], widths, strict=False)
        self.body = nn.Sequential(convolution(in_channels, width), *(Block(before, after) for before, after in pairs))
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, 4 width]`` features."""
        x = self.body(x)  # (B, 4w, H/4, W/4)
        return x.mean(dim=(2, 3))  # (B, 4w)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits


class Block(nn.Module):
    """ReLU(x + F(x)) with F two 3×3 convolutions; where the channels grow, at half the resolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if channels == out_channels else 2
        self.new_channels = out_channels - channels
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride=self.stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(shortcut + self.residual(x))
