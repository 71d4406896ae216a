"""Handwritten digits, 8×8: the smallest real images, for a first look.

1,797 images of 43 people, every pixel a count from 0 to 16 of set dots in a 4×4 block (E. Alpaydin and C. Kaynak:
Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998; here from scikit-learn).
"""

from __future__ import annotations

import torch

from lab.batch import Labelled
from lab.datamodules.labelled import LabelledData


class Digits(LabelledData):
    """1,797 images ``(1, 8, 8)`` in [0, 1] of ten digits: 1,258 to train on, 180 to validate, 359 to test."""

    def load(self) -> Labelled:
        """scikit-learn's digits."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float() / 16
        return Labelled(images.unsqueeze(1), torch.from_numpy(digits.target))
