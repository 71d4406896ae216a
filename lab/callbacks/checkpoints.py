"""Which weights a stage ends with: the best that may be selected, else the last; each in a file that loads safely."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint
from typing_extensions import override

from lab.callbacks import Lean
from lab.callbacks.exact import Exact
from lab.errors import UserError
from lab.files import replacing
from lab.ranges import Count, NonNegative, checked
from lab.registry import nearest


class Checkpoints(Lean, Checkpoint):
    """Keeps ``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``, ordinary Lightning checkpoints.

    ``monitor`` is read after every validation, and where there is none after every training epoch. An epoch's weights
    are the best if ``selectable(epoch)`` of module, data and callbacks, where they have it, allows them and the metric
    is strictly better than before: of equals the earlier stays, NaN never wins, and the sanity check doesn't count.

    ``last.ckpt`` is what a training goes on from (:mod:`lab.callbacks.exact`). It is written after the first step, so
    that what cannot be saved is told at once, then at most once in ``every_seconds``, when the process is asked to
    stop, and when training ends; never more than a twentieth of the time goes into it. The best weights wait in memory,
    as the bytes of their file, until the next such moment: the two files always belong together, whenever a process is
    killed.

    Args:
        monitor: the metric that decides; None: there is no best. lab gives the module's.
        mode: whether ``min`` or ``max`` of it is best.
        every_n_epochs: epochs in between are no candidates.
        every_seconds: seconds between two writes, at least.
    """

    @checked
    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        every_n_epochs: Count = 1,
        every_seconds: NonNegative = 20.0,
    ) -> None:
        self.monitor = monitor
        self.mode = mode
        self.every_n_epochs = every_n_epochs
        self.every_seconds = every_seconds
        self._folder: Path | None = None
        self._best: _Best | None = None
        self._held: io.BytesIO | None = None  # the best, not yet on disk
        self._due_at = 0.0
        self._validated_after = -1

    @property
    def best(self) -> Path | None:
        """The file of the best weights; None if no epoch's could be selected."""
        return self._existing("best.ckpt") if self._best else None

    @property
    def last(self) -> Path | None:
        """The file of the last weights written."""
        return self._existing("last.ckpt")

    @property
    def chosen(self) -> Path | None:
        """``best``, else ``last``."""
        return self.best or self.last

    @property
    def best_score(self) -> float | None:
        """The monitored metric of the best weights."""
        return self._best.score if self._best else None

    @property
    def best_epoch(self) -> int | None:
        """The epoch, from 0, that ended with the best weights."""
        return self._best.epoch if self._best else None

    @property
    def chosen_metrics(self) -> dict[str, float]:
        """All metrics as they were with the best weights; empty where the last ones are chosen."""
        return dict(self._best.metrics) if self._best else {}

    @property
    def best_model_path(self) -> str:
        """``chosen`` under Lightning's name, for ``trainer.test(ckpt_path="best")``."""
        return str(self.chosen or "")

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Take over what processes that Lightning forked or spawned have chosen: the file says what they knew."""
        if path:
            self._folder = Path(path).parent
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if state := saved["callbacks"].get(self.state_key):
                self.load_state_dict(state)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.default_root_dir) / "checkpoints"
        if stage == "fit" and not _saves_one_file(trainer.strategy):
            raise UserError(
                f"checkpoints writes one file, but {type(trainer.strategy).__name__} saves a folder of shards; "
                "use ddp or fsdp, or remove it (callbacks: {checkpoints: null}) and bring a ModelCheckpoint"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning adds it outside
        if stage == "fit" and not any(isinstance(callback, Exact) for callback in callbacks):
            callbacks.append(Exact())  # it knows when states can be kept

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due_at = 0.0

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._validated_after = _finished(trainer)
        if not trainer.is_last_batch:  # else the epoch's end is next, with the metrics of its training too
            self._consider(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._consider(trainer, pl_module)

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._due_at

    def keep(self, trainer: Trainer) -> None:
        """Write the best that is held, and the training as it is.

        The best gets its name only when the other file knows of it: a process that is killed in between leaves a pair.
        """
        assert self._folder is not None
        began = time.monotonic()
        content = _checkpoint(trainer)
        if self._held is not None and self._best is not None:
            _save(trainer, self._folder / self._best.candidate, self._held)
            self._held = None
        _save(trainer, self._folder / "last.ckpt", content)
        if trainer.is_global_zero:
            self._settle()
        trainer.strategy.barrier("checkpoints")
        now = time.monotonic()
        self._due_at = now + max(self.every_seconds, (now - began) * SPARE if self.every_seconds else 0.0)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._best is None:
            return {}
        return {"monitor": self.monitor, "mode": self.mode, **vars(self._best)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best so far; without its file, or by another metric, there is none yet."""
        state = dict(state_dict)
        if state and (state.pop("monitor"), state.pop("mode")) == (self.monitor, self.mode):
            self._best = _Best(**state)
        self._settle()
        if not self._existing("best.ckpt"):
            self._best = None

    def _settle(self) -> None:
        """Give the candidate that is known its name; any other is of a time that never came."""
        if self._folder is None:
            return
        for path in self._folder.glob(f"{CANDIDATE}*"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if self._best is not None and path.name == self._best.candidate:
                    path.replace(self._folder / "best.ckpt")
                else:
                    path.unlink()

    def _existing(self, name: str) -> Path | None:
        path = self._folder / name if self._folder else None
        return path if path is not None and path.exists() else None

    def _consider(self, trainer: Trainer, module: LightningModule) -> None:
        """See whether the weights are the best."""
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if self.monitor is not None and (self._validated_after == _finished(trainer) or not _validates(trainer)):
            self._judge(trainer, module, self.monitor)

    def _judge(self, trainer: Trainer, module: LightningModule, monitor: str) -> None:
        """Hold the weights as they are if they are the best."""
        metrics = trainer.callback_metrics
        if monitor not in metrics:
            if _validates(trainer):
                raise UserError(_unknown(monitor, metrics))
            if self._validated_after < 0:
                rank_zero_warn(f"{_unknown(monitor, metrics)}; without validation data the last weights are chosen")
                self._validated_after = 0
            return
        for part in (module, getattr(trainer, "datamodule", None), *trainer.callbacks):  # type: ignore[attr-defined]
            selectable = getattr(part, "selectable", None)
            if callable(selectable) and not selectable(trainer.current_epoch):
                return
        score = float(metrics[monitor])
        better = not math.isnan(score) and (
            self._best is None or (score < self._best.score if self.mode == "min" else score > self._best.score)
        )
        better, score = trainer.strategy.broadcast((better, score))  # processes may have seen other samples
        if better:
            known = {name: float(value) for name, value in metrics.items()}
            self._best = _Best(score, trainer.current_epoch, _finished(trainer), known)
            self._held = _checkpoint(trainer)


CANDIDATE = ".best-"
"""What the names begin with of files that are about to be ``best.ckpt``."""
SPARE = 20
"""Times as long as a write took, at least, until the next."""


@dataclass
class _Best:
    score: float
    epoch: int
    batches: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def candidate(self) -> str:
        """What its file is called until it is the best."""
        return f"{CANDIDATE}{self.batches}.ckpt"


def _finished(trainer: Trainer) -> int:
    """Batches whose step is over, in all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


def _validates(trainer: Trainer) -> bool:
    """Whether there is validation data; until the first validation asks for it, as far as is known."""
    return trainer.enable_validation and (trainer.val_dataloaders is None or sum(trainer.num_val_batches) > 0)


def _saves_one_file(strategy: Strategy) -> bool:
    return type(strategy).save_checkpoint is Strategy.save_checkpoint or (
        getattr(strategy, "_state_dict_type", None) == "full"
    )


def _unknown(monitor: str, metrics: Mapping[str, Tensor]) -> str:
    hint = nearest(monitor, metrics)
    logged = f"; logged were: {', '.join(sorted(metrics))}" if "did you mean" in hint else ""
    return f"checkpoints: no metric '{monitor}' was logged{hint}{logged}"


def _checkpoint(trainer: Trainer) -> io.BytesIO:
    """The bytes of a Lightning checkpoint; every process takes part, rank zero has the result.

    Raises:
        TypeError: it has values that don't load with ``weights_only=True``; the message names them.
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    if not trainer.is_global_zero:
        return io.BytesIO()
    content, safe = _saved(checkpoint)
    if not safe:
        raise TypeError(
            "a checkpoint holds numbers, strings, tensors, and lists and mappings of them, so that loading it runs no "
            f"code; this one also holds {', '.join(_unsafe(checkpoint))}"
        )
    return content


def _saved(value: Any) -> tuple[io.BytesIO, bool]:
    """What ``torch.save`` makes of a value, and whether that loads with ``weights_only=True``."""
    content = io.BytesIO()
    torch.save(value, content)
    content.seek(0)
    return content, not get_unsafe_globals_in_checkpoint(content)


def _unsafe(value: Any, place: str = "") -> Iterator[str]:
    """Where the values are that don't load so, and their types."""
    if _saved(value)[1]:
        return
    parts: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        parts = value
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value))
    inside = [found for key, part in parts.items() for found in _unsafe(part, f"{place}.{key}".removeprefix("."))]
    yield from inside or [f"{place} ({type(value).__qualname__})"]


def _save(trainer: Trainer, path: Path, content: io.BytesIO) -> None:
    if not trainer.is_global_zero:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content.getbuffer())
    except OSError as cause:
        said = f"the checkpoint could not be written ({cause.strerror}); the one before it is intact"
        raise OSError(cause.errno, said, str(path)) from cause
