"""Pictures of stages: drawn when a stage ends, handed to loggers, never the reason that a run is lost."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure

from lab import fit, pictures, registry
from lab.objectives.classification import Classification
from lab.objectives.regression import SAMPLES, Regression

QUICK: dict[str, Any] = {
    "data": {"name": "digits"},
    "trainer": {"max_epochs": 2, "limit_train_batches": 3},
    "callbacks": {"progress": None, "profile": None},
    "module": {"name": "supervised", "network": {"name": "mlp", "hidden": [8]}},
}
PNG = b"\x89PNG"


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_a_stage_ends_with_its_curves_and_its_confusions() -> None:
    folder = fit(QUICK, smoke=True).stage("main") / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.png", "curves.png"]
    assert all(path.read_bytes().startswith(PNG) for path in folder.iterdir())


def test_a_regression_shows_what_it_predicts(tmp_path: Path) -> None:
    inputs = numpy.random.default_rng(0).random((80, 4), dtype=numpy.float32)
    numpy.savez(tmp_path / "lines.npz", inputs=inputs, targets=inputs @ numpy.float32([1, 2, 3, 4]))
    run = fit({**QUICK, "data": {"name": "arrays", "path": str(tmp_path / "lines.npz")}})
    assert (run.stage("main") / "pictures" / "predictions.png").read_bytes().startswith(PNG)


def test_the_confusion_matrix_counts_the_whole_test_by_class() -> None:
    chart = Classification(3).chart()
    for truth, likeliest in (([0, 0, 1], [0, 1, 1]), ([2, 2], [2, 0])):
        chart.update(torch.eye(3)[likeliest] * 5, torch.tensor(truth))
    counts = chart.compute()
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    figure = chart.draw(counts, ["cat", "dog", "$eel_1$"])["confusion"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog", "$eel_1$"]
    assert texts(figure) == ["1"] * 5
    assert figure.axes[0].get_title(loc="left") == "60.00% of 5 right"


def test_colours_are_shares_of_the_true_class() -> None:
    figure = pictures.confusion(numpy.array([[3, 1], [0, 0]]))
    assert figure.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]


def test_many_classes_are_drawn_without_counts_and_too_many_not_at_all() -> None:
    assert texts(pictures.confusion(numpy.eye(21, dtype=int))) == []
    assert pictures.png(pictures.confusion(numpy.eye(200, dtype=int))).startswith(PNG)
    assert Classification(1001).chart() is None


def test_nothing_tested_draws_nothing() -> None:
    chart = Classification(3).chart()
    assert chart.draw(torch.zeros(3, 3, dtype=torch.long), None) == {}
    assert Regression().chart().draw(torch.empty(0, 2, 1), None) == {}


def test_the_scatter_keeps_as_many_samples_as_it_draws() -> None:
    chart = Regression().chart()
    for _ in range(3):
        chart.update(torch.rand(900, 2), torch.rand(900, 2))
    assert chart.compute().shape == (SAMPLES, 2, 4)
    assert len(chart.draw(chart.compute(), None)["predictions"].axes) == 2
    chart.reset()
    assert len(chart.pairs) == 0


def test_curves_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss,val/loss,val_acc,test/loss\n0,0,3.0,,,\n1,0,,2.0,0.5,\n2,1,1.0,nan,0.75,9\n")
    figure = pictures.curves(path)
    lines = {
        (ax.get_title(loc="left"), line.get_label()): line.get_xydata().tolist()
        for ax in figure.axes
        for line in ax.lines
    }
    assert lines == {
        ("loss", "train"): [[0, 3.0], [2, 1.0]], ("loss", "val"): [[1, 2.0]], ("acc", "val"): [[1, 0.5], [2, 0.75]],
    }  # fmt: skip


@pytest.mark.parametrize("content", [None, "", "step\n", "nothing,to,see\n1,2,3\n", "step,val/a\nx,y\n"])
def test_a_file_without_curves_has_no_picture(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    assert pictures.of_training(tmp_path) == {}


def test_a_callback_draws_and_loggers_get_its_pictures() -> None:
    class Paints(Callback):
        def pictures(self, trainer: Any, module: Any) -> dict[str, Any]:
            return {"plain": Figure(), "moving": b"GIF89a"}

    class Gallery(Logger):
        name, version = "gallery", "0"

        def log_metrics(self, *_: Any, **__: Any) -> None: ...
        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...
        def log_image(self, key: str, images: list[Any], **_: Any) -> None:
            shown[key] = images

    shown: dict[str, list[str]] = {}
    registry.callbacks.register("paints")(Paints)
    registry.loggers.register("gallery")(Gallery)
    run = fit({**QUICK, "callbacks": {**QUICK["callbacks"], "paints": {}}, "logger": "gallery"}, smoke=True)
    folder = run.stage("main") / "pictures"
    assert (folder / "moving.gif").read_bytes() == b"GIF89a"
    assert shown == {
        "curves": [str(folder / "curves.png")], "confusion": [str(folder / "confusion.png")],
        "plain": [str(folder / "plain.png")], "moving": [str(folder / "moving.gif")],
    }  # fmt: skip


def test_a_picture_that_cannot_be_drawn_is_a_warning_and_the_run_goes_on() -> None:
    class Spills(Callback):
        def pictures(self, trainer: Any, module: Any) -> dict[str, Any]:
            raise OSError("no ink")

    registry.callbacks.register("spills")(Spills)
    with pytest.warns(UserWarning, match="stage main: a picture is missing: OSError: no ink"):
        run = fit({**QUICK, "callbacks": {**QUICK["callbacks"], "spills": {}}}, smoke=True)
    assert run.status == "finished"


@pytest.mark.parametrize("name", ["../out", "", "a/b", ".hidden"])
def test_a_picture_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a name is letters"):
        pictures.keep(tmp_path, name, b"GIF89a")


def test_names_in_any_script_are_drawn_without_complaint() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.png(pictures.confusion(numpy.eye(2, dtype=int), ["猫", "$\\bad{"])).startswith(PNG)


def test_a_process_without_samples_adds_none_to_the_picture() -> None:
    chart = Regression().chart()
    chart.update(torch.ones(5, 1), torch.zeros(5, 1))
    gathered = torch.cat([chart.pairs, Regression().chart().pairs])
    (points,) = [ax.collections[0].get_offsets() for ax in chart.draw(gathered, None)["predictions"].axes]
    assert points.tolist() == [[0, 1]] * 5


def test_comparing_and_drawing_import_no_torch() -> None:
    code = "import sys, lab.page, lab.pictures; sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
