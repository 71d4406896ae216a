"""The network of DANN's digits: two convolutions are the features, and a head of three fully connected layers.

Y. Ganin et al.: Domain-Adversarial Training of Neural Networks, JMLR 17, 2016, arXiv:1505.07818, figure 4a (its "MNIST
architecture", after LeNet-5): 5×5 convolutions of 32 and 48 channels, each with ReLU and 2×2 max pooling, then 100, 100
and K units. What is aligned, and what a domain discriminator sees, are the 48 maps as they are, not yet a layer that
the classes have decided about. With ``batch_norm`` batch normalisation follows each convolution (not in the paper).
"""

from __future__ import annotations

from torch import Tensor, nn

from lab.ranges import Count, checked

_SMALLEST = 16  # pixels a side: 12 after a convolution, 6, 2, and one pixel after the second pooling


class Ganin(nn.Module):
    """Two convolutions and three fully connected layers, for images of 16×16 pixels and more.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        input_shape: ``(C, H, W)`` of one image.
        width: channels of the first convolution; the second has half as many again, as in the paper.
        hidden: units of each hidden layer of the head.
        batch_norm: whether batch normalisation follows each convolution.

    Raises:
        ValueError: the input is no image, or it is too small.
    """

    @checked
    def __init__(
        self,
        num_classes: Count,
        input_shape: tuple[Count, ...],
        width: Count = 32,
        hidden: tuple[Count, ...] = (100, 100),
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"ganin takes images (C, H, W), the inputs have shape {input_shape}: mlp takes any shape")
        channels, *sides = input_shape
        if min(sides) < _SMALLEST:
            raise ValueError(
                f"ganin takes images of at least {_SMALLEST}×{_SMALLEST} pixels, these are {sides[0]}×{sides[1]}: "
                "convnet and mlp take smaller ones"
            )
        second = width * 3 // 2
        height, breadth = (((side - 4) // 2 - 4) // 2 for side in sides)
        self.body = nn.Sequential(
            *_convolution(channels, width, batch_norm), *_convolution(width, second, batch_norm), nn.Flatten()
        )
        sizes = (second * height * breadth, *hidden)
        self.head = nn.Sequential()
        for inputs, outputs in zip(sizes, hidden, strict=False):
            self.head.extend([nn.Linear(inputs, outputs), nn.ReLU()])
        self.head.append(nn.Linear(sizes[-1], num_classes))

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, F]``: the last maps, end to end."""
        features: Tensor = self.body(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits


def _convolution(channels: int, out_channels: int, batch_norm: bool) -> list[nn.Module]:
    """A 5×5 convolution, normalisation where it is wanted, ReLU, pooling."""
    normalisation = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    return [nn.Conv2d(channels, out_channels, 5, bias=not batch_norm), *normalisation, nn.ReLU(), nn.MaxPool2d(2)]
