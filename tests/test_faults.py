"""Whatever breaks in the middle of a training is said in one line; the last state is whole, and the run goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from lab import Run, files, fit, registry, stages
from lab.callbacks.checkpoints import Checkpoints
from lab.run import folders
from lab.stages import StageFailed

STEP = 12
RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "batch_size": 64},
    "trainer": {"max_epochs": 2},
    "callbacks": {"progress": None, "profile": None, "checkpoints": {"every_seconds": 0}},
    "module": {"name": "supervised", "network": {"name": "mlp", "hidden": [8], "dropout": 0.5}},
}


class Broken:
    """Whether what breaks is broken, and what happens then."""

    cause: BaseException | None = None


@pytest.fixture(autouse=True)
def mended() -> Iterator[None]:
    yield
    Broken.cause = None


class Breaks(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == STEP and Broken.cause is not None:
            raise Broken.cause


class Unreachable(Logger):
    name = "unreachable"  # type: ignore[assignment]
    version = 0  # type: ignore[assignment]

    def log_hyperparams(self, *_: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if Broken.cause is not None and step is not None and step >= STEP:
            raise Broken.cause


def breaking() -> dict[str, Any]:
    registry.callbacks.register("breaks")(Breaks)
    return {**RECIPE, "callbacks": {**RECIPE["callbacks"], "breaks": {}}}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.stage("main") / "network.safetensors")


def failed(recipe: dict[str, Any]) -> tuple[str, Run]:
    """What is said of a run that fails, and the run; its last state loads."""
    with pytest.raises(StageFailed) as failure:
        fit(recipe)
    run = failure.value.run
    assert run.status == run.results["stages"]["main"]["status"] == "failed"
    assert run.results["stages"]["main"]["error"] in str(failure.value)
    assert "Traceback" in (run.stage("main") / "error.txt").read_text()
    assert "state_dict" in torch.load(run.stage("main") / "checkpoints" / "last.ckpt", weights_only=True)
    return str(failure.value), run


def resumed_as_if_nothing_had_happened(recipe: dict[str, Any], run: Run) -> None:
    Broken.cause = None
    stages.resume(run)
    whole = fit(recipe, out="whole", fresh=True)
    assert run.status == "finished"
    assert all(torch.equal(weights(run)[name], tensor) for name, tensor in weights(whole).items())
    assert run.results["stages"]["main"]["metrics"] == whole.results["stages"]["main"]["metrics"]
    assert not (run.stage("main") / "error.txt").exists()


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (RuntimeError("the plugin's fault"), r"RuntimeError: the plugin's fault \(test_faults.py:\d+, in on_train_b"),
        (KeyError("lost"), r"KeyError: 'lost' \(test_faults.py:\d+, in on_train_batch_end\)"),
        (ValueError("a sentence for people"), r"stage main: a sentence for people$"),
        (torch.OutOfMemoryError("CUDA out of memory."), r"memory ran out: a smaller data\.batch_size .*needs less"),
        (MemoryError(), r"memory ran out"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_plugin_that_raises_is_named_with_its_place_and_the_run_goes_on_once_it_is_mended(
    cause: BaseException, said: str
) -> None:
    recipe, Broken.cause = breaking(), cause
    with pytest.raises(StageFailed, match=said) as failure:
        fit(recipe)
    resumed_as_if_nothing_had_happened(recipe, failure.value.run)


def test_a_logger_that_raises_is_named_and_the_run_goes_on_once_it_is_mended() -> None:
    registry.loggers.register("unreachable")(Unreachable)
    recipe, Broken.cause = {**RECIPE, "logger": "unreachable"}, ConnectionError("no route")
    said, run = failed(recipe)
    assert "ConnectionError: no route (test_faults.py:" in said
    resumed_as_if_nothing_had_happened(recipe, run)


def images() -> str:
    pixels, classes = load_digits(return_X_y=True)
    for i, (image, name) in enumerate(zip(pixels[:300], classes[:300], strict=True)):
        folder = Path("images", str(name))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype("uint8")).save(folder / f"{i}.png")
    return str(Path("images").resolve())


class KillsWorkers(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == STEP and Broken.cause is not None:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
                worker.join()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # a thread of torch that read from it
def test_a_worker_that_dies_is_said_and_the_run_goes_on() -> None:
    registry.callbacks.register("kills")(KillsWorkers)
    recipe = {
        **RECIPE,
        "data": {"name": "images", "path": images(), "in_memory": False, "num_workers": 1, "batch_size": 16},
        "callbacks": {**RECIPE["callbacks"], "kills": {}},
    }
    Broken.cause = RuntimeError()
    said, run = failed(recipe)
    assert "a process that reads data died: as when memory runs out" in said
    resumed_as_if_nothing_had_happened(recipe, run)


def test_a_disk_that_is_full_is_said_and_the_run_goes_on_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    original, kept = files.replacing, 0

    def full(path: Path) -> Any:
        nonlocal kept
        kept += path.name == "last.ckpt"
        if Broken.cause is not None and kept > STEP:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path)

    for module in ("lab.files", "lab.callbacks.checkpoints", "lab.artifact"):
        monkeypatch.setattr(f"{module}.replacing", full)
    Broken.cause = OSError()
    with pytest.raises(StageFailed, match=r"could not be written \(No space left on device\); the one before it is in"):
        fit(RECIPE)
    (folder,) = folders()
    assert json.loads((folder / "results.json").read_text())["status"] == "running"  # there was no room to say more
    resumed_as_if_nothing_had_happened(RECIPE, Run(folder))


def test_a_failure_after_training_is_resumed_without_training_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the test's fault")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "test", broken)
        with pytest.raises(StageFailed, match="the test's fault") as failure:
            fit(RECIPE)
    kept: list[Checkpoints] = []
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "keep", lambda self, trainer: kept.append(self))
        stages.resume(failure.value.run)
    assert not kept
    whole = fit(RECIPE, out="whole", fresh=True)
    assert all(torch.equal(weights(failure.value.run)[name], tensor) for name, tensor in weights(whole).items())
