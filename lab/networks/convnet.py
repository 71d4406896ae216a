"""A small convolutional network: three 3×3 convolutions, batch normalisation, global average pooling.

The plain pattern that most image networks of today share: convolution, normalisation, ReLU (Ioffe and Szegedy 2015,
arXiv:1502.03167), the last feature map averaged over its positions instead of flattened (Lin, Chen and Yan 2014,
arXiv:1312.4400), so that any image size works. With ``width`` w, C input channels and K outputs it has
9Cw + 54w² + 10w + 2wK + K parameters: about a quarter for half the width.
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
    """

    @checked
    def __init__(self, num_classes: Count, in_channels: Count, width: Count = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(in_channels, width),
            nn.MaxPool2d(2, ceil_mode=True),
            _convolution(width, 2 * width),
            nn.MaxPool2d(2, ceil_mode=True),
            _convolution(2 * width, 2 * width),
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


def _convolution(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),  # the normalisation would subtract a bias
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
