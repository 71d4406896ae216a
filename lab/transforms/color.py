"""What colour the pixels of an image in [0, 1] are; results stay in [0, 1]."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from typing_extensions import override

from lab.ranges import Fraction, NonNegative, checked
from lab.transforms import BatchTransform, Draw

LUMA = (0.299, 0.587, 0.114)
"""How bright red, green and blue look (ITU-R BT.601)."""


class ColorJitter(BatchTransform):
    """Changes brightness, contrast, saturation and hue, in this order.

    A factor f is drawn from [max(0, 1 − a), 1 + a] for each argument a. Brightness multiplies by f; contrast and
    saturation blend with the image's mean grey, and with the grey image: f·x + (1 − f)·grey. Hue turns the colours by
    an angle about the grey axis. Images of one channel keep what they have of saturation and hue: nothing.

    Args:
        brightness: a of the brightness.
        contrast: a of the contrast.
        saturation: a of the saturation.
        hue: greatest turn either way, as a part of the colour circle.

    Raises:
        ValueError: saturation or hue of images that have neither one channel nor three.
    """

    @checked
    def __init__(
        self,
        brightness: NonNegative = 0.4,
        contrast: NonNegative = 0.4,
        saturation: NonNegative = 0.4,
        hue: Annotated[float, Ge(0), Le(0.5)] = 0.0,
    ) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        brighter, stronger, purer = (
            draw.between(max(0.0, 1 - a), 1 + a)[:, None, None, None]
            for a in (self.brightness, self.contrast, self.saturation)
        )
        turn = draw.between(-self.hue, self.hue) * 2 * math.pi
        images = (inputs * brighter).clamp(0, 1)
        mean = grey(images).mean((1, 2, 3), keepdim=True)
        images = (stronger * images + (1 - stronger) * mean).clamp(0, 1)
        if inputs.shape[1] == 1 or not (self.saturation or self.hue):
            return images
        images = (purer * images + (1 - purer) * grey(images)).clamp(0, 1)
        return torch.einsum("bij,bjhw->bihw", _rotation(turn), images).clamp(0, 1) if self.hue else images


class Grayscale(BatchTransform):
    """Takes the colour out, keeping the channels.

    Args:
        p: of how many of the images.
    """

    @checked
    def __init__(self, p: Fraction = 0.1) -> None:
        self.p = p

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        return torch.where(draw.happens(self.p)[:, None, None, None], grey(inputs), inputs)


class Invert(BatchTransform):
    """Turns x into 1 − x.

    Args:
        p: of how many of the images.
    """

    @checked
    def __init__(self, p: Fraction = 0.5) -> None:
        self.p = p

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        return torch.where(draw.happens(self.p)[:, None, None, None], 1 - inputs, inputs)


def grey(images: Tensor) -> Tensor:
    """``[B, 1, H, W]`` of ``[B, C, H, W]`` images with one channel or three.

    Raises:
        ValueError: another number of channels.
    """
    channels = images.shape[1]
    if channels == 1:
        return images
    if channels != 3:
        raise ValueError(f"colours are those of images with 3 channels, or 1; these have {channels}")
    return (images * torch.tensor(LUMA, dtype=images.dtype)[:, None, None]).sum(1, keepdim=True)


def _rotation(angle: Tensor) -> Tensor:
    """``[B, 3, 3]``: turns colours by ``[B]`` radians about the grey axis (Rodrigues)."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    axis = 1 / math.sqrt(3)
    cross = axis * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cos * torch.eye(3) + sin * cross + (1 - cos) / 3
