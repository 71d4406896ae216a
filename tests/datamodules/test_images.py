from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_data import DIGITS, PIXELS, batches, covered_once, fitted, predicted, write_images
from PIL import Image
from sklearn.datasets import load_sample_images

from lab.cli import main
from lab.datamodules.images import Images
from lab.datamodules.lazy import Lazy

PHOTOS = [photo.copy() for photo in load_sample_images().images]  # two, (427, 640, 3)


def ready(folder: Path, **arguments: Any) -> Images:
    data = Images(folder, **arguments)
    data.setup()
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "digits", range(120))
    return tmp_path / "digits"


def test_a_folder_per_class_is_split_and_its_sorted_names_are_the_classes(folder: Path) -> None:
    data = ready(folder)
    assert data.classes == [f"digit{digit}" for digit in range(10)]
    assert [len(split) for split in (data.train, data.val, data.test)] == [84, 12, 24]
    assert (data.num_classes, data.input_shape, data.in_channels, data.objective) == (
        *(10, (1, 8, 8), 1),
        "classification",
    )


def test_every_pixel_is_the_files_and_prediction_is_in_the_order_of_the_paths(folder: Path) -> None:
    served = list(ready(folder).predict_dataloader())
    rows = [int(path.stem) for path in sorted(folder.rglob("*.png"))]
    assert torch.equal(torch.cat([b.inputs for b in served]) * 255, torch.from_numpy(PIXELS[rows])[:, None].float())
    assert torch.cat([b.targets for b in served]).tolist() == DIGITS.target[rows].tolist()


def test_data_that_come_split_stay_so_and_a_missing_split_is_cut_from_training(tmp_path: Path) -> None:
    for split, rows in {"train": range(100), "validation": range(100, 130), "test": range(130, 170)}.items():
        write_images(tmp_path / "data" / split, rows)
    data = ready(tmp_path / "data")
    assert [len(split) for split in (data.train, data.val, data.test)] == [100, 30, 40]
    assert sum(len(b) for b in data.predict_dataloader()) == 170
    for name in (tmp_path / "data" / "validation").rglob("*.png"):
        name.unlink()
    for name in sorted((tmp_path / "data" / "validation").rglob("*"), reverse=True):
        name.rmdir()
    (tmp_path / "data" / "validation").rmdir()
    data = ready(tmp_path / "data")
    assert [len(split) for split in (data.train, data.val, data.test)] == [90, 10, 40]


def test_hidden_files_other_files_and_nested_folders_are_no_trouble(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / "digit0" / ".hidden.png").write_bytes(b"")
    (folder / "digit0" / "notes.txt").write_text("nothing")
    (folder / "README.md").write_text("digits")
    (folder / "digit0" / "more" / "still").mkdir(parents=True)
    Image.fromarray(PIXELS[0]).save(folder / "digit0" / "more" / "still" / "a.PNG")
    assert sum(len(b) for b in ready(folder).predict_dataloader()) == 121


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_streamed_is_what_memory_would_hold_to_the_bit(folder: Path, workers: int) -> None:
    near = ready(folder, in_memory=True, transforms=())
    far = ready(folder, in_memory=False, num_workers=workers)
    assert isinstance(far.train.inputs, Lazy)
    assert not isinstance(near.train.inputs, Lazy)
    assert torch.equal(batches(near), batches(far))
    assert torch.equal(*(torch.cat([b.inputs for b in data.predict_dataloader()]) for data in (near, far)))


def test_folds_cover_every_image_once_with_each_class_in_its_part(folder: Path) -> None:
    counts = covered_once([ready(folder, folds=5, fold=fold) for fold in range(5)])
    assert (counts.max(0).values - counts.min(0).values).max() <= 1


def test_labels_are_withheld_and_the_images_stay(folder: Path) -> None:
    data = ready(folder, labels=20)
    assert (len(data.train), int(data.train.labelled.sum())) == (84, 20)


def test_size_resizes_the_shorter_side_and_cuts_out_the_centre(tmp_path: Path) -> None:
    for name, photo in zip(("china", "flower"), PHOTOS, strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(photo).save(tmp_path / "photos" / name / "1.png")
        Image.fromarray(photo[:300]).save(tmp_path / "photos" / name / "2.png")
    with pytest.raises(ValueError, match=r"1\.png has 427 × 640 pixels.*2\.png 300 × 640; .*`size: 427`"):
        ready(tmp_path / "photos")
    data = ready(tmp_path / "photos", size=96, val_fraction=0, test_fraction=0)
    assert data.input_shape == (3, 96, 96)
    expected = torch.from_numpy(PHOTOS[0]).permute(2, 0, 1)[None, :, :, 106:533].float()  # the centre square
    expected = torch.nn.functional.interpolate(expected, (96, 96), mode="bilinear", antialias=True)[0]
    assert (data.train.inputs[0].float() - expected).abs().mean() < 2
    assert ready(tmp_path / "photos", size=(40, 60)).input_shape == (3, 40, 60)
    assert ready(tmp_path / "photos", size=50, channels=1).input_shape == (1, 50, 50)


def one(tmp_path: Path, image: Image.Image, suffix: str = "png", **saved: Any) -> torch.Tensor:
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        image.save(tmp_path / "two" / name / f"1.{suffix}", **saved)
    return ready(tmp_path / "two", val_fraction=0, test_fraction=0).train.inputs[0]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_the_exif_orientation_is_followed(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    found = one(tmp_path, Image.fromarray(PHOTOS[0]), suffix, exif=exif)
    assert torch.equal(found, torch.from_numpy(np.rot90(PHOTOS[0], -1).copy()).permute(2, 0, 1))


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    alpha = np.full((*PHOTOS[0].shape[:2], 1), 255, np.uint8)
    alpha[:100] = 0
    found = one(tmp_path, Image.fromarray(np.concatenate([PHOTOS[0], alpha], axis=2)))
    assert (found[:, :100] == 255).all()
    assert torch.equal(found[:, 100:], torch.from_numpy(PHOTOS[0]).permute(2, 0, 1)[:, 100:])


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path) -> None:
    found = one(tmp_path, Image.fromarray(PIXELS[0].astype(np.uint16) * 257))
    assert torch.equal(found, torch.from_numpy(PIXELS[0])[None])


def test_grey_images_among_coloured_ones_get_three_channels(folder: Path) -> None:
    Image.fromarray(PIXELS[0]).convert("RGB").save(folder / "digit0" / "colour.png")
    assert ready(folder).input_shape == (3, 8, 8)


def empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def only_one_class(folder: Path) -> None:
    for digit in range(1, 10):
        empty(folder / f"digit{digit}")
        (folder / f"digit{digit}").rmdir()


def a_class_without_images(folder: Path) -> None:
    (folder / "digit10").mkdir()


def a_test_class_that_training_has_not(folder: Path) -> None:
    write_images(folder / "test", range(30))
    (folder / "test" / "digit3").rename(folder / "test" / "digit_3")
    (folder / "train").mkdir()
    for digit in range(10):
        (folder / f"digit{digit}").rename(folder / "train" / f"digit{digit}")


def a_cut_off_image(folder: Path) -> None:
    path = next((folder / "digit7").glob("*.png"))
    path.write_bytes(path.read_bytes()[:60])


def no_image_at_all(folder: Path) -> None:
    next((folder / "digit7").glob("*.png")).write_text("a text")


def an_image_beside_the_classes(folder: Path) -> None:
    Image.fromarray(PIXELS[0]).save(folder / "loose.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty, r"digits holds no images"),
        (only_one_class, r"digits has images of one class only, 'digit0'"),
        (a_class_without_images, r"no images in the class folder digit10"),
        (a_test_class_that_training_has_not, r"test: the class 'digit_3' is unknown to training.*'digit3'"),
        (a_cut_off_image, r"digit7/\d+\.png cannot be read as an image"),
        (no_image_at_all, r"digit7/\d+\.png cannot be read as an image: it is empty or none of PNG"),
        (an_image_beside_the_classes, r"loose\.png lies beside the class folders digit0, digit1"),
    ],
)
def test_an_error_names_what_is_wrong(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        ready(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_off_image_is_named_when_it_is_served(folder: Path, workers: int) -> None:
    a_cut_off_image(folder)
    data = ready(folder, in_memory=False, num_workers=workers)
    with pytest.raises(ValueError, match=r"digit7/\d+\.png cannot be read as an image") as caught:
        list(data.predict_dataloader())
    assert "Traceback" not in str(caught.value)


def test_a_missing_folder_is_an_error_of_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"digit is not there \(did you mean 'digits'\?\)"):
        Images(folder.parent / "digit")
    text = "data: {name: images, path: digit}\nmodule: {name: supervised, network: mlp}\n"
    (folder.parent / "recipe.yaml").write_text(text)
    for command in ("check", "fit"):
        assert main([command, str(folder.parent / "recipe.yaml")]) == 2
        assert "recipe.yaml:1:28: data.path: " in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_predicts_images_without_folders_and_tests_by_the_order_of_its_own_classes(folder: Path) -> None:
    run = fitted({"name": "images", "path": str(folder)})
    assert json.loads((run.stage("main") / "data.json").read_text())["learnt"]["channels"] == 1
    write_images(Path("new"), range(200, 210), names=False)
    found = predicted(run, "data.path=new")
    assert found["index"] == list(range(10))
    assert found["target"] == [-1] * 10
    for row in range(120, 180):  # classes 5 to 9 only: by themselves they would be 0 to 4
        if DIGITS.target[row] >= 5:
            write_images(Path("some"), range(row, row + 1))
    found = predicted(run, "data.path=some")
    assert found["target"] == [int(path.parent.name[-1]) for path in sorted(Path("some").rglob("*.png"))]


def test_a_new_class_is_refused_by_a_run_that_does_not_know_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fitted({"name": "images", "path": str(folder)}, epochs=1)
    write_images(Path("new"), range(20))
    Path("new/digit3").rename("new/three")
    assert main(["test", str(run.folder), "data.path=new"]) != 0
    assert "new: the class 'three' is unknown to training" in capsys.readouterr().err
