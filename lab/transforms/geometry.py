"""Where the pixels of an image are: flips, crops, affine maps, erased rectangles."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor
from typing_extensions import override

from lab.ranges import Fraction, NonNegative, Positive, Whole, checked
from lab.transforms import BatchTransform, Draw

Share = Annotated[float, Gt(0), Le(1)]


class Flip(BatchTransform):
    """Mirrors images.

    Args:
        horizontal: probability of exchanging left and right.
        vertical: probability of exchanging top and bottom.
    """

    @checked
    def __init__(self, horizontal: Fraction = 0.5, vertical: Fraction = 0.0) -> None:
        self.horizontal = horizontal
        self.vertical = vertical

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        for axis, probability in ((-1, self.horizontal), (-2, self.vertical)):
            flipped = draw.happens(probability)
            if probability:
                inputs = torch.where(flipped[:, None, None, None], inputs.flip(axis), inputs)
        return inputs


class Crop(BatchTransform):
    """Pads images on all sides and cuts their own size out again, anywhere.

    Args:
        padding: pixels a side.
        mode: ``constant`` pads with zeros, ``reflect`` and ``replicate`` with the image.
    """

    @checked
    def __init__(self, padding: Whole = 4, mode: Literal["constant", "reflect", "replicate"] = "constant") -> None:
        self.padding = padding
        self.mode = mode

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        height, width = inputs.shape[-2:]
        places = 2 * self.padding + 1
        top, left = (draw.uniform(2) * places).long().unbind(1)
        padded = F.pad(inputs, [self.padding] * 4, mode=self.mode)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, places, places, H, W), a view
        return windows[torch.arange(len(inputs)), :, top, left]


class ResizedCrop(BatchTransform):
    """Cuts a random rectangle out and stretches it to a size ("Inception crop").

    C. Szegedy et al.: Going Deeper with Convolutions, CVPR 2015, arXiv:1409.4842, section 6.

    Args:
        size: height and width of the result; the images' own where it is left out.
        scale: least and greatest part of the image's area.
        ratio: least and greatest width for height.
    """

    @checked
    def __init__(
        self,
        size: Annotated[int, Gt(0)] | None = None,
        scale: tuple[Share, Share] = (0.08, 1.0),
        ratio: tuple[Positive, Positive] = (0.75, 1.3333333333333333),
    ) -> None:
        self.size = size
        self.scale = scale
        self.ratio = ratio

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        height, width = _cut(draw, self.scale, self.ratio, inputs)
        centre = (draw.uniform(2) * 2 - 1) * (1 - torch.stack([width, height], 1))  # of the window, in [-1, 1]
        maps = torch.zeros(len(inputs), 2, 3)
        maps[:, 0, 0], maps[:, 1, 1], maps[:, :, 2] = width, height, centre
        size = (self.size or inputs.shape[-2], self.size or inputs.shape[-1])
        return _resampled(inputs, maps, size, "reflection")


class Affine(BatchTransform):
    """Rotates, shifts, scales and shears images about their middle; what comes from outside is zero.

    Args:
        degrees: greatest rotation either way.
        translate: greatest shift, as a part of the height and the width.
        scale: least and greatest enlargement.
        shear: greatest horizontal shear either way, in degrees.
    """

    @checked
    def __init__(
        self,
        degrees: NonNegative = 10.0,
        translate: Fraction = 0.1,
        scale: tuple[Positive, Positive] = (0.9, 1.1),
        shear: NonNegative = 0.0,
    ) -> None:
        self.degrees = degrees
        self.translate = translate
        self.scale = scale
        self.shear = shear

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        height, width = inputs.shape[-2:]
        angle = torch.deg2rad(draw.between(-self.degrees, self.degrees))
        slant = torch.tan(torch.deg2rad(draw.between(-self.shear, self.shear)))
        enlarged = draw.between(*self.scale)
        shift = draw.between(-2 * self.translate, 2 * self.translate, 2)
        cos, sin = angle.cos() / enlarged, angle.sin() / enlarged
        # From the result back to the image, in [-1, 1] coordinates: a pixel is not square where H ≠ W.
        maps = torch.zeros(len(inputs), 2, 3)
        maps[:, 0, 0], maps[:, 0, 1] = cos - slant * sin, (sin + slant * cos) * height / width
        maps[:, 1, 0], maps[:, 1, 1] = -sin * width / height, cos
        maps[:, :, 2] = -(maps[:, :, :2] @ shift[:, :, None]).squeeze(2)
        return _resampled(inputs, maps, (height, width), "zeros")


class Erasing(BatchTransform):
    """Paints a random rectangle over.

    Z. Zhong et al.: Random Erasing Data Augmentation, AAAI 2020, arXiv:1708.04896.

    Args:
        p: the part of the images that loses a rectangle.
        scale: least and greatest part of the image's area.
        ratio: least and greatest width for height.
        value: what is painted.
    """

    @checked
    def __init__(
        self,
        p: Fraction = 0.25,
        scale: tuple[Share, Share] = (0.02, 0.33),
        ratio: tuple[Positive, Positive] = (0.3, 3.3),
        value: float = 0.0,
    ) -> None:
        self.p = p
        self.scale = scale
        self.ratio = ratio
        self.value = value

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        inside = rectangle(draw, _cut(draw, self.scale, self.ratio, inputs), inputs)
        return inputs.masked_fill(inside & draw.happens(self.p)[:, None, None, None], self.value)


def rectangle(draw: Draw, sides: tuple[Tensor, Tensor], inputs: Tensor) -> Tensor:
    """A rectangle anywhere within each image.

    Args:
        sides: ``[B]`` heights and ``[B]`` widths, as parts of the image's.

    Returns:
        ``[B, 1, H, W]`` bool: its pixels; a side is rounded to whole pixels.
    """
    spans = []
    for side, size in zip(sides, inputs.shape[-2:], strict=True):
        length = (side * size).round().long()
        start = (draw.uniform() * (size - length + 1)).long()
        pixel = torch.arange(size)
        spans.append((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))
    rows, columns = spans
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _cut(draw: Draw, scale: tuple[float, float], ratio: tuple[float, float], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """``[B]`` heights and widths of rectangles, as parts of the image's, of an area and a ratio in these ranges."""
    image_height, image_width = inputs.shape[-2:]
    area = draw.between(*scale)
    aspect = draw.between(math.log(ratio[0]), math.log(ratio[1])).exp() * (image_height / image_width)
    width = (area * aspect).sqrt().clamp(max=1)
    return (area / width).clamp(max=1), width


def _resampled(inputs: Tensor, maps: Tensor, size: tuple[int, int], padding: str) -> Tensor:
    grid = F.affine_grid(maps, [len(inputs), inputs.shape[1], *size], align_corners=False)
    return F.grid_sample(inputs, grid, mode="bilinear", padding_mode=padding, align_corners=False)
