"""LeNet-5: two convolutions and three fully connected layers.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-Based Learning Applied to Document Recognition, Proceedings of the
IEEE 86(11), 1998, section II.B. The sizes are the paper's (6, 16, 120, 84): 61,706 parameters on 1×28×28 and ten
classes. Departures, all usual today: ReLU for the scaled tanh, max pooling for the trained average, every map of the
second convolution sees all six maps of the first, and a linear output layer for the radial basis functions.
"""

from __future__ import annotations

from torch import Tensor, nn

from lab.ranges import Count, checked

_SMALLEST = 12  # pixels a side: with its padding 16, then 12, 6, 2, and one pixel after the second pooling


class LeNet(nn.Module):
    """LeNet-5 with ReLU, for images of 12×12 pixels and more.

    Sides under the paper's 32 pixels are padded with two zeros at each end, as the paper does with MNIST's 28.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        input_shape: ``(C, H, W)`` of one image.

    Raises:
        ValueError: the input is no image, or it is too small for two 5×5 convolutions and two poolings.
    """

    @checked
    def __init__(self, num_classes: Count, input_shape: tuple[Count, ...]) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"lenet takes images (C, H, W), the inputs have shape {input_shape}: mlp takes any shape")
        channels, *sides = input_shape
        if min(sides) < _SMALLEST:
            raise ValueError(
                f"lenet takes images of at least {_SMALLEST}×{_SMALLEST} pixels, these are {sides[0]}×{sides[1]}: "
                "convnet and mlp take smaller ones"
            )
        (top, height), (left, width) = (_padded(side) for side in sides)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=(top, left)),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * height * width, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
        )
        self.head = nn.Linear(84, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, 84]`` features."""
        features: Tensor = self.body(x)  # (B, 84)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits


def _padded(side: int) -> tuple[int, int]:
    """The padding of a side, and what two 5-pixel convolutions, each with a pooling, leave of it."""
    padding = 2 if side < 32 else 0
    return padding, ((side + 2 * padding - 4) // 2 - 4) // 2
