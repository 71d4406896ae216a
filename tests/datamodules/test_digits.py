from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from lab.datamodules.digits import Digits


def test_the_images_are_scikit_learns_in_zero_to_one() -> None:
    data = Digits(val_fraction=0, test_fraction=0)
    data.prepare_data()
    data.setup()
    original = load_digits()
    assert data.train.inputs.shape == (1797, 1, 8, 8)
    assert data.train.inputs.dtype == torch.float32
    assert torch.equal(data.train.inputs.flatten(1).double() * 16, torch.from_numpy(original.data))
    assert torch.equal(data.train.targets, torch.from_numpy(original.target))


def test_the_splits_have_the_sizes_that_the_docstring_says() -> None:
    data = Digits()
    data.setup()
    assert [len(split) for split in (data.train, data.val, data.test)] == [1258, 180, 359]
