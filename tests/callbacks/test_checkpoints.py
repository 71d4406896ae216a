from __future__ import annotations

import io
import math
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_fit import LIGHTNINGS_OWN, Classifier, fit, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lab import stopping
from lab.callbacks import checkpoints as module_under_test
from lab.callbacks.checkpoints import Checkpoints
from lab.errors import UserError

pytestmark = LIGHTNINGS_OWN

ALWAYS, NEVER = 0.0, 1e9  # seconds between two writes


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def weights(path: Path | None) -> Tensor:
    assert path is not None
    saved = torch.load(path, weights_only=True)["state_dict"]["network.weight"]
    assert isinstance(saved, Tensor)
    return saved


def score_fit(folder: Path, scores: list[float], mode: Any = "min", **arguments: Any) -> tuple[Classifier, Checkpoints]:
    module, checkpoints = Classifier(scores), Checkpoints("val/score", mode, **arguments)
    fit(module, folder, checkpoints, epochs=len(scores))
    return module, checkpoints


@pytest.mark.parametrize("every_seconds", [ALWAYS, NEVER])
@pytest.mark.parametrize(("mode", "epoch"), [("min", 2), ("max", 3)])
def test_best_has_the_weights_of_the_epoch_with_the_best_score_however_rarely_files_are_written(
    tmp_path: Path, every_seconds: float, mode: str, epoch: int
) -> None:
    scores = [3.0, 4.0, 1.0, 9.0, 2.0]
    module, checkpoints = score_fit(tmp_path, scores, mode, every_seconds=every_seconds)
    assert checkpoints.best == checkpoints.chosen == tmp_path / "checkpoints" / "best.ckpt"
    assert (checkpoints.best_epoch, checkpoints.best_score) == (epoch, scores[epoch])
    assert torch.equal(weights(checkpoints.best), module.weights[epoch])
    assert torch.equal(weights(checkpoints.last), module.network.weight)
    assert checkpoints.chosen_metrics["val/score"] == scores[epoch]
    assert {"val/accuracy", "train/loss"} < set(checkpoints.chosen_metrics)
    assert not torch.equal(module.weights[epoch], module.network.weight)


def test_nan_is_never_best(tmp_path: Path) -> None:
    module, checkpoints = score_fit(tmp_path, [math.nan, 3.0, math.nan, 2.0, math.nan])
    assert (checkpoints.best_epoch, checkpoints.best_score) == (3, 2.0)
    assert torch.equal(weights(checkpoints.best), module.weights[3])


def test_with_nothing_but_nan_the_last_weights_are_chosen(tmp_path: Path) -> None:
    _, checkpoints = score_fit(tmp_path, [math.nan, math.nan])
    assert (checkpoints.best, checkpoints.best_score, checkpoints.chosen_metrics) == (None, None, {})
    assert checkpoints.chosen == checkpoints.last == tmp_path / "checkpoints" / "last.ckpt"


def test_of_equal_scores_the_earlier_epoch_stays(tmp_path: Path) -> None:
    module, checkpoints = score_fit(tmp_path, [2.0, 1.0, 1.0, 1.0])
    assert checkpoints.best_epoch == 1
    assert torch.equal(weights(checkpoints.best), module.weights[1])


def test_the_sanity_check_does_not_count(tmp_path: Path) -> None:
    module, checkpoints = Classifier([3.0, 2.0], in_sanity_check=-1.0), Checkpoints("val/score")
    fit(module, tmp_path, checkpoints, epochs=2, num_sanity_val_steps=2)
    assert checkpoints.best_score == 2.0


def test_only_selectable_epochs_are_candidates(tmp_path: Path) -> None:
    class Pruned(Classifier):
        def selectable(self, epoch: int) -> bool:
            return epoch >= 2

    module, checkpoints = Pruned([0.125, 0.25, 1.0, 0.75]), Checkpoints("val/score")
    fit(module, tmp_path, checkpoints)
    assert (checkpoints.best_epoch, checkpoints.best_score) == (3, 0.75)


def test_if_no_epoch_was_selectable_the_last_weights_are_chosen(tmp_path: Path) -> None:
    class Never(Classifier):
        def selectable(self, epoch: int) -> bool:
            return False

    module, checkpoints = Never([0.1, 0.2]), Checkpoints("val/score")
    fit(module, tmp_path, checkpoints, epochs=2)
    assert checkpoints.best is None
    assert torch.equal(weights(checkpoints.chosen), module.network.weight)


def test_without_a_monitor_the_last_weights_are_chosen(tmp_path: Path) -> None:
    checkpoints = Checkpoints()
    module = Classifier()
    fit(module, tmp_path, checkpoints)
    assert files(tmp_path) == ["last.ckpt"]
    assert torch.equal(weights(checkpoints.chosen), module.network.weight)


def test_a_monitor_that_never_arrives_is_an_error_after_the_first_validation_that_names_those_that_did(
    tmp_path: Path,
) -> None:
    module = Classifier()
    with pytest.raises(UserError) as error:
        fit(module, tmp_path, Checkpoints("val/acuracy"))
    assert "no metric 'val/acuracy' was logged (did you mean 'val/accuracy'?)" in str(error.value)
    assert "train/loss, train/loss_epoch, train/loss_step, val/accuracy" in str(error.value)
    assert len(module.weights) == 1


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_without_validation_data_the_last_weights_are_chosen_and_a_monitor_is_warned_of(tmp_path: Path) -> None:
    checkpoints, module = Checkpoints("val/acc"), Classifier()
    with pytest.warns(
        UserWarning, match=r"'val/acc' was logged \(there are: train/loss, .*\); without validation data"
    ) as w:
        trainer(tmp_path, checkpoints).fit(module, loader(0, 500))
    assert len([warning for warning in w if "checkpoints" in str(warning.message)]) == 1
    assert torch.equal(weights(checkpoints.chosen), module.network.weight)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_an_empty_list_of_validation_loaders_is_no_validation(tmp_path: Path) -> None:
    checkpoints = Checkpoints("train/loss_epoch")
    trainer(tmp_path, checkpoints).fit(Classifier(), loader(0, 500), [])
    assert checkpoints.best_epoch == 3


@pytest.mark.parametrize("limit_val_batches", [0, 2])
def test_a_training_metric_can_decide_with_validation_and_without(tmp_path: Path, limit_val_batches: int) -> None:
    checkpoints = Checkpoints("train/loss_epoch")
    fit(Classifier(), tmp_path, checkpoints, limit_val_batches=limit_val_batches)
    assert checkpoints.best_epoch == 3
    assert checkpoints.best_score == checkpoints.chosen_metrics["train/loss_epoch"]


def test_each_validation_within_an_epoch_counts(tmp_path: Path) -> None:
    module, checkpoints = Classifier([5.0, 4.0, 1.0, 3.0]), Checkpoints("val/score", every_seconds=NEVER)
    fit(module, tmp_path, checkpoints, epochs=2, val_check_interval=0.5)
    assert (checkpoints.best_epoch, checkpoints.best_score) == (1, 1.0)
    assert torch.equal(weights(checkpoints.best), module.weights[2])


def test_a_score_of_earlier_weights_does_not_count_for_an_epoch_without_validation(tmp_path: Path) -> None:
    class FromThirdEpoch(Classifier):
        def selectable(self, epoch: int) -> bool:
            return epoch >= 2

    module, checkpoints = FromThirdEpoch([0.25, 0.5]), Checkpoints("val/score")
    fit(module, tmp_path, checkpoints, check_val_every_n_epoch=2)  # validates after the second and the fourth epoch
    assert (checkpoints.best_epoch, checkpoints.best_score) == (3, 0.5)


def test_epochs_between_every_n_are_no_candidates(tmp_path: Path) -> None:
    _, checkpoints = score_fit(tmp_path, [0.1, 0.7, 0.2, 0.6], every_n_epochs=2)
    assert checkpoints.best_epoch == 3


def test_both_files_are_lightning_checkpoints_that_load_without_running_code(tmp_path: Path) -> None:
    _, checkpoints = score_fit(tmp_path, [2.0, 1.0, 3.0])
    for path in (checkpoints.best, checkpoints.last):
        assert path is not None
        assert {"state_dict", "optimizer_states", "loops", "callbacks"} <= set(torch.load(path, weights_only=True))
    assert files(tmp_path) == ["best.ckpt", "last.ckpt"]


def test_lightning_finds_the_chosen_one_under_its_own_name(tmp_path: Path) -> None:
    module, checkpoints = Classifier([1.0, 2.0]), Checkpoints("val/score")
    made = fit(module, tmp_path, checkpoints, epochs=2)
    assert made.checkpoint_callback is checkpoints
    assert isinstance(checkpoints, Checkpoint)
    made.test(module, loader(600, 700), ckpt_path="best", verbose=False)
    assert torch.equal(module.network.weight, module.weights[0])


def test_what_would_not_load_safely_is_refused_at_the_first_checkpoint_by_name(tmp_path: Path) -> None:
    class Unsafe(Classifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {
                "fine": [1, 2.0, "three", None, torch.ones(2)],
                "folder": tmp_path,
                "past": [deque([1])],
            }

    with pytest.raises(TypeError, match=r"also holds mine\.folder \(PosixPath\), mine\.past\.0 \(deque\)$"):
        fit(Unsafe(), tmp_path, Checkpoints())
    assert not (tmp_path / "checkpoints").exists()


def test_files_are_written_after_the_first_step_and_then_at_most_every_so_many_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, str]] = []
    save = module_under_test._save

    def noted(trainer: Any, path: Path, content: io.BytesIO) -> None:
        written.append((trainer.current_epoch, path.stem))
        save(trainer, path, content)

    monkeypatch.setattr(module_under_test, "_save", noted)
    score_fit(tmp_path, [5.0, 4.0, 3.0, 2.0, 9.0], every_seconds=NEVER)
    assert written == [(0, "last"), (5, ".best-40"), (5, "last")]


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow past ``room`` bytes: a write stops halfway, as on a full disk."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


class DiskFillsUp(Classifier):
    unsaved = ("disk",)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.disk = full_disk(room=1000)
            self.disk.__enter__()


def test_a_full_disk_is_a_clear_error_and_the_former_files_stay_a_pair_to_go_on_from(tmp_path: Path) -> None:
    scores = [3.0, 2.0, 1.0]
    whole, _ = score_fit(tmp_path / "whole", scores)
    module, checkpoints = DiskFillsUp(scores), Checkpoints("val/score", every_seconds=ALWAYS)
    try:
        with pytest.raises(OSError, match=r"could not be written \(File too large\); the one before it is intact"):
            fit(module, tmp_path, checkpoints, epochs=3)
    finally:
        module.disk.__exit__(None, None, None)
    assert files(tmp_path) == ["best.ckpt", "last.ckpt"]
    assert torch.equal(weights(checkpoints.best), module.weights[0])
    resumed, again = Classifier(scores), Checkpoints("val/score")
    trainer(tmp_path, again, epochs=3).fit(
        resumed, loader(0, 500), loader(500, 600), ckpt_path=checkpoints.last, weights_only=True
    )
    assert torch.equal(resumed.network.weight, whole.network.weight)
    assert torch.equal(weights(again.best), whole.weights[2])


def test_an_error_leaves_the_state_before_the_step_that_failed_and_the_best_that_it_knows(tmp_path: Path) -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if (self.current_epoch, batch_idx) == (2, 5):
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module, checkpoints = Fails([3.0, 1.0, 2.0]), Checkpoints("val/score", every_seconds=ALWAYS)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, tmp_path, checkpoints)
    assert torch.equal(weights(checkpoints.best), module.weights[1])
    assert torch.load(checkpoints.last, weights_only=True)["global_step"] == 25
    assert torch.equal(weights(checkpoints.last), module.network.weight)


@pytest.mark.parametrize("killed_before", ["last.ckpt", "best.ckpt"])
def test_best_and_last_belong_together_whenever_the_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    class Killed(BaseException):
        pass

    original = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if Path(target).name == killed_before and killing:
            raise Killed
        return original(path, target)

    scores = [3.0, 1.0, 2.0]
    _, whole = score_fit(tmp_path / "whole", scores)
    monkeypatch.setattr(Path, "replace", replace)
    killing, module = False, Classifier(scores)

    class AfterSecondEpoch(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            nonlocal killing
            killing = module.current_epoch == 2

    checkpoints = Checkpoints("val/score", every_seconds=ALWAYS)
    with pytest.raises(Killed):
        fit(module, tmp_path / "run", checkpoints, AfterSecondEpoch())
    killing = False
    resumed, again = Classifier(scores), Checkpoints("val/score", every_seconds=NEVER)
    trainer(tmp_path / "run", again, epochs=3).fit(
        resumed, loader(0, 500), loader(500, 600), ckpt_path=checkpoints.last, weights_only=True
    )
    assert files(tmp_path / "run") == ["best.ckpt", "last.ckpt"]
    assert again.best_epoch == whole.best_epoch == 1
    assert torch.equal(weights(again.best), weights(whole.best))


def test_a_fit_that_fails_before_its_first_step_leaves_no_file(tmp_path: Path) -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fails(), tmp_path, Checkpoints("val/score"))
    assert not (tmp_path / "checkpoints").exists()


def test_sigterm_saves_the_step_that_just_ended(tmp_path: Path) -> None:
    class Asked(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (self.current_epoch, batch_idx) == (1, 3):
                os.kill(os.getpid(), signal.SIGTERM)

    checkpoints = Checkpoints(every_seconds=NEVER)
    with stopping.listening(), pytest.raises(stopping.Stopped) as stopped:
        fit(Asked(), tmp_path, checkpoints)
    assert (stopped.value.number, stopped.value.saved) == (signal.SIGTERM, True)
    assert torch.load(checkpoints.last, weights_only=True)["global_step"] == 14


@pytest.mark.parametrize("every_seconds", [ALWAYS, NEVER])
def test_a_resumed_fit_remembers_the_best_and_ends_as_one_that_was_not_interrupted(
    tmp_path: Path, every_seconds: float
) -> None:
    scores = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]
    whole, _ = score_fit(tmp_path / "whole", scores)
    first, checkpoints = score_fit(tmp_path / "run", [3.0, 1.0, 2.0], every_seconds=every_seconds)
    resumed = Classifier(scores)
    again = Checkpoints("val/score", every_seconds=every_seconds)
    trainer(tmp_path / "run", again, epochs=6).fit(
        resumed, loader(0, 500), loader(500, 600), ckpt_path=checkpoints.last, weights_only=True
    )
    assert len(resumed.weights) == 6  # an attribute of its own, and part of the state
    assert torch.equal(resumed.network.weight, whole.network.weight)
    assert (again.best_epoch, again.best_score) == (1, 1.0)
    assert torch.equal(weights(again.best), first.weights[1])


def test_a_best_whose_file_is_gone_or_that_another_metric_chose_is_forgotten_on_resuming(tmp_path: Path) -> None:
    _, checkpoints = score_fit(tmp_path, [1.0, 2.0])
    for monitor, mode in (("val/score", "max"), ("val/accuracy", "min"), ("val/score", "min")):
        if (monitor, mode) == ("val/score", "min"):
            (tmp_path / "checkpoints" / "best.ckpt").unlink()
        again = Checkpoints(monitor, mode)
        again.setup(trainer(tmp_path), Classifier(), "fit")
        again.load_state_dict(checkpoints.state_dict())
        assert again.best_score is None


def test_ranges_are_checked_at_construction() -> None:
    for wrong in ({"mode": "best"}, {"every_n_epochs": 0}, {"every_seconds": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Checkpoints(**wrong)  # type: ignore[arg-type]


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from digits_fit import Classifier, loader, trainer
from lab.callbacks.checkpoints import Checkpoints

class Unsure(Classifier):
    def on_validation_epoch_end(self) -> None:  # by what the second process sees, the last epoch would be best
        scores = [3.0, 1.0, 2.0] if self.global_rank == 0 else [3.0, 2.0, 1.0]
        self.log("val/score", scores[self.current_epoch])

folder, checkpoints = Path(sys.argv[1]), Checkpoints("val/score", every_seconds=1e9)
trainer(folder, checkpoints, epochs=3, devices=2, strategy="ddp_fork").fit(Unsure(), loader(0, 500), loader(500, 600))
print(checkpoints.chosen.name, checkpoints.best_epoch, checkpoints.best_score)
"""


def test_two_processes_agree_and_the_one_that_forked_them_knows_what_they_chose(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["best.ckpt", "1", "1.0"]
    assert files(tmp_path) == ["best.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 1
