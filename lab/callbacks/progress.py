"""Progress on a terminal: one line for each stage; in a file or a pipe, a few plain lines."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from lab.callbacks import Lean
from lab.ranges import checked

REFRESH = 0.2
"""Seconds between two drawings."""

LOOK = 1.0
"""Seconds between two looks at the metrics: reading a number waits for the GPU."""

QUIET = 10.0
"""Seconds between two plain lines, at least."""

PARTS = 10
"""Plain lines also lie at least one in this many parts of the training apart."""

BAR = range(8, 30)
"""Characters of the bar, as the terminal has room."""


class Progress(Lean):
    """Shows on stderr how far training, validation and tests are.

    On a terminal it is one line, drawn at most five times a second: the epoch, a bar, batches, elapsed < remaining
    time, the training loss, the validation's metrics. Elsewhere the first epoch, the last and at most ten between them
    have a line each. A terminal that breaks ends the display, not the training.

    Args:
        title: what is trained; lab gives the stage's name.
    """

    watches_only = True

    @checked
    def __init__(self, title: str = "") -> None:
        self.title = title
        self._work: _Work | None = None
        self._live: Live | None = None
        self._draw_at = math.inf
        self._look_at = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        work = _Work(
            self.title, _training_batches(trainer), _trained(trainer), _epoch(trainer, trainer.current_epoch + 1)
        )
        work.said_epoch = trainer.current_epoch
        self._begin(trainer, work, kept=True)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._work is not None:  # only now has the epoch before all its metrics
            self._work.where = _epoch(trainer, trainer.current_epoch + 1)
            self._say(trainer, self._work, due=self._work.line_due())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() >= self._draw_at:
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._work is not None:
            self._say(trainer, self._work, due=True)
            self._look_at = 0.0
            self._draw(trainer)
        self._stop()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = sum(trainer.num_val_batches)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._begin(trainer, _Work(f"{self.title} validation".strip(), batches))
        elif self._work is not None:
            self._work.aside = 0, batches

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._work is not None:
            self._work.evaluated()
        if time.monotonic() >= self._draw_at:
            self._draw(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._stop()
        elif self._work is not None:
            self._work.aside = None

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, _Work(f"{self.title} test".strip(), sum(trainer.num_test_batches)))

    on_test_batch_end = on_validation_batch_end

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, _Work(f"{self.title} prediction".strip(), sum(trainer.num_predict_batches)))

    on_predict_batch_end = on_validation_batch_end

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _begin(self, trainer: Trainer, work: _Work, *, kept: bool = False) -> None:
        if not trainer.is_global_zero:
            return
        self._work = work
        console = Console(stderr=True)
        if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
            stdout = sys.stdout.isatty()  # what modules print goes above the line; into a file it goes as ever
            self._live = Live(console=console, auto_refresh=False, transient=not kept, redirect_stdout=stdout)
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if self._live is None or self._work is None:
            return
        now = time.monotonic()
        self._draw_at = now + REFRESH
        if trainer.state.fn == TrainerFn.FITTING:
            self._work.done = _trained(trainer)
            if now >= self._look_at:
                self._look_at = now + LOOK
                self._work.metrics = _shown(trainer.callback_metrics)
        try:
            self._live.start()
            self._live.update(self._work.drawn(self._live.console.width), refresh=True)
        except Exception:  # whatever a terminal does to the display, the training goes on
            self._stop()

    def _say(self, trainer: Trainer, work: _Work, *, due: bool) -> None:
        """A plain line for the epoch that is over, where there is no terminal."""
        over, work.done = trainer.current_epoch, _trained(trainer)
        if self._live is not None or not due or over <= work.said_epoch:
            return
        work.said_epoch, work.said_done, work.said_after = over, work.done, work.elapsed
        work.metrics = _shown(trainer.callback_metrics)
        try:
            print(work.line(_epoch(trainer, over)), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody reads, or the stream is closed
            self._work = None

    def _stop(self) -> None:
        live, self._live, self._work, self._draw_at, self._look_at = self._live, None, None, math.inf, 0.0
        if live is not None:
            try:
                live.stop()
            except Exception:  # as above
                return


@dataclass
class _Work:
    """What is under way, counted in batches; an unknown ``total`` is infinite."""

    title: str
    total: float
    done: float = 0
    where: str = ""
    aside: tuple[int, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    said_epoch: int = 0
    said_done: float = 0
    said_after: float = 0

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.first = self.said_done = self.done

    def evaluated(self) -> None:
        """One batch more of a test, or of the validation within a training."""
        if self.aside is None:
            self.done += 1
        else:
            self.aside = self.aside[0] + 1, self.aside[1]

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.started

    def line_due(self) -> bool:
        """Whether it is time for a plain line: after the first epoch, later ever more rarely."""
        if self.said_after == 0:
            return True
        if self.elapsed < self.said_after + QUIET:
            return False
        if math.isinf(self.total):
            return self.elapsed >= 2 * self.said_after
        return self.done - self.said_done >= self.total / PARTS

    def line(self, where: str) -> str:
        """One plain line."""
        metrics = (f"{metric} {_number(value)}" for metric, value in self.metrics.items())
        return "  ".join(part for part in (self.title, where, *metrics, f"{self.elapsed:.1f} s") if part)

    def drawn(self, width: int) -> Text:
        """One line of the terminal; names are shown as they are, brackets too."""
        known = math.isfinite(self.total)
        count = f"{self.done:.0f}/{self.total:.0f}" if known else f"{self.done:.0f}"
        if self.aside is not None:
            count = f"val {self.aside[0]}/{self.aside[1]:.0f}"
        times = _clock(self.elapsed)
        if known and self.first < self.done < self.total:
            times += f" < {_clock(self.elapsed / (self.done - self.first) * (self.total - self.done))}"
        metrics = "  ".join(f"{metric} {_number(value)}" for metric, value in self.metrics.items())
        parts = [(self.title, "bold"), (self.where, ""), (count, "bright_black"), (times, ""), (metrics, "cyan")]
        room = width - 1 - sum(len(text) + 2 for text, _ in parts if text)
        if room < BAR.start:  # the bar says what the count says
            parts.pop(2)
        bar = min(max(room, BAR.start), BAR.stop)
        full = round(bar * self.done / self.total) if known and self.total else 0
        parts.insert(2, ("━" * full + "─" * (bar - full), "green"))
        line = Text("  ").join(Text(text.replace("\n", " "), style) for text, style in parts if text)
        line.truncate(width - 1, overflow="ellipsis")
        return line


def _trained(trainer: Trainer) -> int:
    """Batches trained on, over all epochs."""
    return trainer.fit_loop.total_batch_idx + 1


def _training_batches(trainer: Trainer) -> float:
    """Batches from the first epoch to the last, as far as the Trainer's limits tell."""
    total = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        total = trainer.num_training_batches * trainer.max_epochs
    if trainer.max_steps >= 0:
        total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
    return total


def _epoch(trainer: Trainer, epoch: int) -> str:
    limited = trainer.max_epochs is not None and trainer.max_epochs >= 0
    return f"epoch {epoch}/{trainer.max_epochs}" if limited else f"epoch {epoch}"


def _shown(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The training loss and up to three validation metrics, without the step and epoch forms that Lightning adds."""
    names = [name for name in metrics if not name.endswith(("_step", "_epoch"))]
    losses = [name for name in names if "loss" in name and not name.startswith(("val", "test"))]
    losses.sort(key=lambda name: name != "train/loss")
    return {name: float(metrics[name]) for name in (*losses[:1], *[n for n in names if n.startswith("val")][:3])}


def _number(value: float) -> str:
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
