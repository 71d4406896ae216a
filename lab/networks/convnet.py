"""A small convolutional network: three 3×3 convolutions, batch normalisation, global average pooling.

The plain pattern that most image networks of today share: convolution, normalisation, ReLU (Ioffe and Szegedy 2015,
arXiv:1502.03167), the last feature map averaged over its positions instead of flattened (Lin, Chen and Yan 2014,
arXiv:1312.4400), so that any image size works. With ``width`` w, C input channels and K outputs it has
9Cw + 54w² + 10w + 2wK + K parameters: about a quarter for half the width.

``separable`` splits the second and third convolution into one per channel and one of 1×1 across channels, as
MobileNet does (Howard et al. 2017, arXiv:1704.04861): 9Cw + 6w² + 43w + 2wK + K parameters.
"""

from __future__ import annotations

from torch import Tensor, nn

from lab.ranges import Count, checked


class ConvNet(nn.Module):
    """Three convolutions of ``width``, ``2 width`` and ``2 width`` channels, each followed by batch normalisation.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        in_channels: channels of the image.
        width: channels of the first convolution.
        separable: whether the second and third convolution are depthwise-separable.
    """

    @checked
    def __init__(self, num_classes: Count, in_channels: Count, width: Count = 16, separable: bool = False) -> None:
        super().__init__()
        layer = separable_convolution if separable else convolution
        self.body = nn.Sequential(
            convolution(in_channels, width),
            nn.MaxPool2d(2, ceil_mode=True),
            layer(width, 2 * width),
            nn.MaxPool2d(2, ceil_mode=True),
            layer(2 * width, 2 * width),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, 2 width]`` features."""
        x = self.body(x)  # (B, 2w, H/4, W/4)
        return x.mean(dim=(2, 3))  # (B, 2w)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits


def convolution(channels: int, out_channels: int, kernel: int = 3, *, groups: int = 1) -> nn.Sequential:
    """A convolution of an odd ``kernel`` that keeps the image's size, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),  # would subtract the convolution's bias
        nn.ReLU(),
    )


def separable_convolution(channels: int, out_channels: int) -> nn.Sequential:
    """A 3×3 convolution of each channel alone, then a 1×1 across them (MobileNet, figure 3)."""
    return nn.Sequential(convolution(channels, channels, groups=channels), convolution(channels, out_channels, 1))
