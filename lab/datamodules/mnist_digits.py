"""MNIST and scikit-learn's digits: two collections of handwritten digits, of other people, scanners and preparation.

A small USPS ↔ MNIST: 5,000 images of 28×28 pixels (:mod:`lab.datamodules.mnist5k`) and 1,797 of 8×8
(:mod:`lab.datamodules.digits`), brought to one size. MNIST's digits stand in a box of 20 pixels with a border of 4;
the others fill their image. Neither is cut: the shift is in size, place and stroke.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from lab.batch import Labelled
from lab.datamodules.digits import Digits
from lab.datamodules.domains import Domains
from lab.datamodules.labelled import LabelledData
from lab.datamodules.loader import pixels
from lab.datamodules.mnist5k import MNIST5k
from lab.ranges import Count, Fraction, checked
from lab.transforms import Transform

Side = Annotated[int, Ge(8), Le(28)]


def resized(images: Tensor, side: int) -> Tensor:
    """``[N, C, H, W]`` in [0, 1] to ``[N, C, side, side]``: bilinear, what is made smaller averaged first."""
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


class MNISTDigits(Domains):
    """From MNIST's digits to scikit-learn's, or the other way; both ``(1, size, size)`` in [0, 1].

    Args:
        direction: which is the source, and which the target.
        train_on: what training and validation batches have: ``both`` domains, without the target's labels; or
            labelled samples of the ``source``, or of the ``target``.
        size: pixels of the images' sides.
        batch_size: training samples of each domain a batch and process.
        eval_batch_size: the same for validation and test.
        val_fraction: part of the samples to validate on.
        test_fraction: part of the samples to test on.
        transforms: what happens to training inputs of either domain, in this order, anew in every epoch.
        seed: of the orders of training and its augmentation.
        split_seed: of the splits.
        drop_last: leave a last, smaller training batch out.
    """

    @checked
    def __init__(
        self,
        direction: Literal["mnist_to_digits", "digits_to_mnist"] = "mnist_to_digits",
        train_on: Literal["both", "source", "target"] = "both",
        *,
        size: Side = 16,
        batch_size: Count = 64,
        eval_batch_size: Count = 512,
        val_fraction: Fraction = 0.1,
        test_fraction: Fraction = 0.2,
        transforms: tuple[Transform, ...] = (),
        seed: int = 0,
        split_seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        shared: dict[str, Any] = {
            "batch_size": batch_size, "eval_batch_size": eval_batch_size, "val_fraction": val_fraction,
            "test_fraction": test_fraction, "transforms": transforms, "seed": seed, "split_seed": split_seed,
            "drop_last": drop_last,
        }  # fmt: skip
        mnist, digits = (Resized(data, size, **shared) for data in (MNIST5k(), Digits()))
        ways: dict[str, tuple[LabelledData, LabelledData]] = {
            "mnist_to_digits": (mnist, digits),
            "digits_to_mnist": (digits, mnist),
        }
        source, target = ways[direction]
        super().__init__(source=source, target=target, train_on=train_on)
        self.direction = direction


class Resized(LabelledData):
    """Other labelled images, made as large as they are to be.

    Args:
        of: the data.
        side: pixels of the images' sides.
    """

    @checked
    def __init__(self, of: MNIST5k | Digits, side: Side, **labelled: Any) -> None:
        super().__init__(**labelled)
        self.of = of
        self.side = side

    def prepare_data(self) -> None:
        """Prepare those data."""
        self.of.prepare_data()

    def load(self) -> Labelled:
        """Their images in [0, 1]."""
        found = self.of.load()
        return Labelled(resized(pixels(found.inputs), self.side), found.targets)
