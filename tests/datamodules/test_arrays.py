from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits

from lab.batch import UNLABELLED
from lab.datamodules.arrays import Arrays

DIGITS = load_digits()
IMAGES = (DIGITS.images[:200] * 15).astype(np.uint8)


def ready(folder: Path, *, arguments: dict[str, Any] | None = None, **arrays: Any) -> Arrays:
    np.savez(folder / "mine.npz", **arrays)
    data = Arrays(folder / "mine.npz", **(arguments or {}))
    data.setup()
    return data


def test_whole_numbers_are_classes_and_images_get_a_channel_and_lie_in_zero_to_one(tmp_path: Path) -> None:
    data = ready(tmp_path, inputs=IMAGES, targets=DIGITS.target[:200].astype(np.uint8))
    assert (data.objective, data.num_classes, data.input_shape) == ("classification", 10, (1, 8, 8))
    assert [len(split) for split in (data.train, data.val, data.test)] == [140, 20, 40]
    assert torch.cat([b.inputs for b in data.train_dataloader()]).max() == torch.tensor(IMAGES.max() / 255).float()
    assert data.train.targets.dtype == torch.int64


def test_floating_point_targets_are_a_regression(tmp_path: Path) -> None:
    diabetes = load_diabetes()
    data = ready(tmp_path, inputs=diabetes.data, targets=diabetes.target)
    assert (data.objective, data.num_classes, data.in_channels) == ("regression", 1, 10)
    assert data.train.targets.shape == (len(data.train), 1)


def test_prediction_is_for_every_sample_of_the_file_in_its_order(tmp_path: Path) -> None:
    data = ready(tmp_path, inputs=IMAGES, targets=DIGITS.target[:200], arguments={"eval_batch_size": 64})
    batches = list(data.predict_dataloader())
    assert torch.equal(torch.cat([b.inputs for b in batches]) * 255, torch.from_numpy(IMAGES).unsqueeze(1).float())
    assert torch.cat([b.index for b in batches]).tolist() == list(range(200))
    assert torch.cat([b.targets for b in batches]).tolist() == DIGITS.target[:200].tolist()


def test_a_file_without_targets_can_be_predicted_on_but_not_tested(tmp_path: Path) -> None:
    data = ready(tmp_path, inputs=IMAGES)
    batches = list(data.predict_dataloader())
    assert sum(len(b) for b in batches) == 200
    assert all((b.targets == UNLABELLED).all() for b in batches)
    assert (data.objective, data.num_classes) == (None, None)
    with pytest.raises(ValueError, match="none of the 200 training samples of Arrays has a label"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="no labelled test samples"):
        data.test_dataloader()


@pytest.mark.parametrize("missing", [UNLABELLED, np.nan])
def test_samples_without_a_label_are_all_for_training(tmp_path: Path, missing: float) -> None:
    targets = DIGITS.target[:200].astype(np.int64 if missing == UNLABELLED else np.float64)
    targets[50:] = missing
    data = ready(tmp_path, inputs=IMAGES, targets=targets, arguments={"labels": 20})
    assert [len(split) for split in (data.train, data.val, data.test)] == [185, 5, 10]
    assert data.val.labelled.all()
    assert data.test.labelled.all()
    assert int(data.train.labelled.sum()) == 20


def test_every_labelled_sample_can_be_tested_on(tmp_path: Path) -> None:
    data = ready(
        tmp_path, inputs=IMAGES, targets=DIGITS.target[:200], arguments={"val_fraction": 0, "test_fraction": 1}
    )
    assert len(data.test) == 200


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES, "y": DIGITS.target[:200]}, r"needs an array 'inputs'.*x uint8 \(200, 8, 8\), y int64 \(200,\)"),
        ({"inputs": IMAGES, "targets": DIGITS.target[:150]}, r"differ in length.*\(200, 8, 8\).*\(150,\)"),
        ({"inputs": IMAGES, "targets": DIGITS.target[:200].reshape(-1, 1)}, r"\[N\] whole numbers.*int64 \(200, 1\)"),
        ({"inputs": IMAGES, "targets": np.array(["cat"] * 200)}, r"targets must be .*<U3 \(200,\)"),
        ({"inputs": IMAGES, "targets": DIGITS.target[:200] - 5}, "got -5"),
        ({"inputs": np.full((4, 2), np.inf)}, "8 values of inputs are not finite"),
        ({"inputs": np.ones((4, 2)), "targets": np.array([0, 1, 2, np.inf])}, "1 values of targets are infinite"),
        ({"inputs": np.ones((0, 2))}, r"got float64 \(0, 2\)"),
        ({"inputs": np.ones(4)}, r"\[N, F\] vectors, got float64 \(4,\)"),
        ({"inputs": np.array([{}, {}])}, "plain arrays"),
    ],
)
def test_an_error_names_the_file_and_what_it_holds(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ready(tmp_path, **arrays)
    assert "mine.npz" in str(caught.value)


def test_a_pickle_in_the_file_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    with pytest.raises(ValueError, match="plain arrays"):
        ready(tmp_path, inputs=np.array([Bomb(), Bomb()], dtype=object))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine.npz is no .npz file"):
        Arrays(tmp_path / "mine.npz").setup()


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"one array, float64 \(3, 2\)"):
        Arrays(tmp_path / "mine.npy").setup()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.npz is not there"):
        Arrays(tmp_path / "nothing.npz").setup()
