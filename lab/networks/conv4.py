"""The four convolutions of few-shot learning, each with normalisation and ReLU, and a linear layer.

O. Vinyals et al.: Matching Networks for One Shot Learning, NeurIPS 2016, arXiv:1606.04080, section 4.1; as C. Finn et
al. have it for MAML (arXiv:1703.03400, section 5.2): 3×3 convolutions of 64 channels, made smaller by strides of 2 on
Omniglot's small images, and by pooling, with 32 channels, on mini-ImageNet's. With ``width`` w, C input channels, f
positions after the last block and K outputs it has 9Cw + 27w² + 12w + fwK + K parameters.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lab.ranges import Count, checked

BLOCKS = 4


class Conv4(nn.Module):
    """Four blocks of a 3×3 convolution, normalisation and ReLU, each halving the image, and a linear layer.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        input_shape: of one image, ``(C, H, W)``.
        width: channels of each convolution.
        downsample: by a ``stride`` of 2, or by maximum ``pool``ing, which computes four times as much.
        norm: ``batch``, ``group`` (of 8 channels each, or all in one), ``layer``, ``instance`` or ``none``.

    Raises:
        ValueError: the inputs are no images, pooling leaves nothing of them, or ``instance`` one pixel to normalise.
    """

    @checked
    def __init__(
        self,
        num_classes: Count,
        input_shape: tuple[Count, ...],
        width: Count = 64,
        downsample: Literal["stride", "pool"] = "stride",
        norm: Literal["batch", "group", "layer", "instance", "none"] = "batch",
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"conv4 takes images (C, H, W), the inputs have shape {input_shape}: mlp takes any shape")
        channels, *sides = input_shape
        if downsample == "pool" and min(sides) < 2**BLOCKS:
            raise ValueError(
                f"conv4 halves images four times: pooling takes {2**BLOCKS}×{2**BLOCKS} pixels at least, "
                f"these are {sides[0]}×{sides[1]}; downsample: stride takes any"
            )
        self.body = nn.Sequential()
        for _ in range(BLOCKS):
            stride = 2 if downsample == "stride" else 1
            sides = [-(-side // stride) for side in sides]
            self.body.append(nn.Conv2d(channels, width, 3, stride=stride, padding=1))
            if norm == "instance" and sides == [1, 1]:
                raise ValueError("conv4 leaves one pixel of these images, which instance norm makes zero: norm: group")
            if norm != "none":
                self.body.append(_normalisation(norm, width, sides))
            self.body.append(nn.ReLU())
            if downsample == "pool":
                self.body.append(nn.MaxPool2d(2))
                sides = [side // 2 for side in sides]
            channels = width
        self.body.append(nn.Flatten())
        self.head = nn.Linear(width * sides[0] * sides[1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, F]`` features, width times the positions that are left."""
        features: Tensor = self.body(x)  # (B, F)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits


def _normalisation(norm: str, width: int, sides: list[int]) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width)
    if norm == "group":
        return nn.GroupNorm(width // 8 if width % 8 == 0 else 1, width)
    return nn.LayerNorm([width, *sides]) if norm == "layer" else nn.InstanceNorm2d(width, affine=True)
