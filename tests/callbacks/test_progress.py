from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from digits_fit import LIGHTNINGS_OWN, Classifier, fit, loader, trainer
from torch import Tensor

from lab.callbacks import progress as module_under_test
from lab.callbacks.progress import Progress

pytestmark = LIGHTNINGS_OWN

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SHOW_CURSOR = "\x1b[?25h"


class Terminal:
    """A real one, as far as programs can tell: a pseudo-terminal as stderr."""

    def __init__(self) -> None:
        self.ours, self.theirs = os.openpty()
        self.stream: TextIO = os.fdopen(self.theirs, "w", buffering=1)
        self.content = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def connect(self, patch: pytest.MonkeyPatch) -> None:
        """Within the test: pytest sets its own stderr after the fixtures."""
        patch.setattr(sys, "stderr", self.stream)

    def _read(self) -> None:
        try:
            while chunk := os.read(self.ours, 65536):
                self.content += chunk
        except OSError:  # closed
            return

    @property
    def text(self) -> str:
        """All that came so far."""
        self.stream.flush()
        time.sleep(0.05)
        return self.content.decode()

    def lines(self) -> list[str]:
        """What was ever drawn, without the codes."""
        return [line for line in re.split(r"[\r\n]+", CODES.sub("", self.text)) if line.strip()]

    def left(self) -> list[str]:
        """What stands there in the end, erased and drawn-over lines gone."""
        rows, row = [""], 0
        for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", self.text):
            if part == "\n":
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif part == "\x1b[1A":
                row -= 1
            elif part == "\x1b[2K":
                rows[row] = ""
            elif part != "\r" and not part.startswith("\x1b"):
                rows[row] += part
        return [text.rstrip() for text in rows if text.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    made = Terminal()
    yield made
    made.stream.close()
    os.close(made.ours)


def quiet(*callbacks: Any, **arguments: Any) -> dict[str, Any]:
    return {"enable_checkpointing": False, **arguments}


def test_on_a_terminal_one_line_stays_for_a_training_and_none_for_its_test(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.connect(monkeypatch)
    module = Classifier()
    made = fit(module, tmp_path, Progress(title="distill/student"), epochs=3, **quiet())
    made.test(module, loader(600, 700), verbose=False)
    left = [line for line in terminal.left() if "student" in line]
    assert len(left) == 1
    assert re.fullmatch(
        r"distill/student  epoch 3/3  ━+  30/30  0:0\d  train/loss 0\.\d{3}  val/accuracy 0\.\d{3}", left[0]
    )
    assert any("student test" in line for line in terminal.lines())
    assert terminal.text.count(SHOW_CURSOR) == terminal.text.count("\x1b[?25l") == 2


def test_while_it_trains_the_line_tells_the_epoch_the_batches_and_the_validation(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.connect(monkeypatch)
    monkeypatch.setattr(module_under_test, "REFRESH", 0.0)
    monkeypatch.setattr(module_under_test, "LOOK", 0.0)
    fit(Classifier(), tmp_path, Progress(title="student"), epochs=2, **quiet())
    drawn = terminal.lines()
    assert any(re.search(r"epoch 1/2  ━+─+  3/20  0:00 < 0:0\d  train/loss", line) for line in drawn), drawn
    assert any(re.search(r"epoch 2/2 .* val 1/2 ", line) for line in drawn)
    assert any(re.search(r"epoch 2/2 .* 20/20 .* val/accuracy 0\.", line) for line in drawn)


def test_names_with_rich_markup_are_shown_as_they_are(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.connect(monkeypatch)

    class Named(Classifier):
        def on_validation_epoch_end(self) -> None:
            self.log("val/[red]x[/red]", 0.5)

    fit(Named(), tmp_path, Progress(title="[bold]a[/oops]"), epochs=1, **quiet())
    last = terminal.left()[-1]
    assert last.startswith("[bold]a[/oops]  epoch 1/1")
    assert "val/[red]x[/red] 0.500" in last


def test_a_terminal_is_drawn_at_most_five_times_a_second(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.connect(monkeypatch)
    drawn: list[float] = []
    draw = module_under_test._Work.drawn

    def noted(self: Any, width: int) -> Any:
        drawn.append(time.monotonic())
        return draw(self, width)

    monkeypatch.setattr(module_under_test._Work, "drawn", noted)
    began = time.monotonic()
    fit(Classifier(), tmp_path, Progress(), epochs=30, **quiet())
    assert len(drawn) <= (time.monotonic() - began) / module_under_test.REFRESH + 2


def test_metrics_are_read_at_most_once_a_second(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.connect(monkeypatch)
    reads: list[int] = []
    shown = module_under_test._shown
    monkeypatch.setattr(module_under_test, "_shown", lambda metrics: reads.append(1) or shown(metrics))
    began = time.monotonic()
    fit(Classifier(), tmp_path, Progress(), epochs=20, **quiet())
    assert len(reads) <= time.monotonic() - began + 2


def test_in_a_pipe_a_short_training_has_a_line_for_its_first_and_its_last_epoch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = fit(Classifier(), tmp_path, Progress(title="[red]student"), epochs=5, **quiet())
    made.test(Classifier(), loader(600, 700), verbose=False)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if "student" in line]
    assert [line.split("  train")[0] for line in lines] == ["[red]student  epoch 1/5", "[red]student  epoch 5/5"]
    assert re.search(r"  train/loss 0\.\d{3}  val/accuracy 0\.\d{3}  \d+\.\d s$", lines[1]), lines[1]
    assert out == ""
    assert "\x1b" not in err


def test_in_a_pipe_a_long_training_has_about_ten_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "QUIET", 0.0)
    fit(
        Classifier(),
        tmp_path,
        Progress(title="student"),
        epochs=60,
        limit_train_batches=1,
        limit_val_batches=1,
        **quiet(),
    )
    lines = [line for line in capfd.readouterr().err.splitlines() if "student" in line]
    assert 10 <= len(lines) <= 12
    assert "epoch 1/60" in lines[0]
    assert "epoch 60/60" in lines[-1]


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.connect(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    fit(Classifier(), tmp_path, Progress(title="student"), epochs=1, **quiet())
    assert "\x1b" not in terminal.text
    assert "student  epoch 1/1  train/loss" in terminal.text


def test_a_terminal_that_takes_no_more_ends_the_display_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.openpty()
    os.set_blocking(theirs, False)
    stream = os.fdopen(theirs, "w")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module_under_test, "REFRESH", 0.0)

    class FillsUp(Classifier):
        def on_train_epoch_end(self) -> None:
            while select.select([], [theirs], [], 0.1)[1]:  # the kernel makes room once more after the first refusal
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(theirs, b"nobody reads this")

    made = fit(FillsUp(), tmp_path, Progress(title="student"), epochs=3, **quiet())
    assert made.current_epoch == 3
    assert sys.stderr is stream
    with pytest.raises(BlockingIOError):
        os.write(theirs, b"full to the end")
    with contextlib.suppress(BlockingIOError):  # what the display could not write, where the stream held it back
        stream.close()
    os.close(ours)


def test_a_pipe_that_nobody_reads_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    stream = os.fdopen(theirs, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    made = fit(Classifier(), tmp_path, Progress(), epochs=3, **quiet())
    assert made.current_epoch == 3
    with pytest.raises(BrokenPipeError):
        stream.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_when_a_training_stops_the_terminal_is_given_back(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    terminal.connect(monkeypatch)

    class Stops(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 5:
                raise error("on purpose")
            return super().training_step(batch, batch_idx)

    stdout, stderr = sys.stdout, sys.stderr
    with pytest.raises((SystemExit, RuntimeError)):
        fit(Stops(), tmp_path, Progress(title="student"), **quiet())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning had ignored
    assert terminal.text.count("\x1b[?25l") == terminal.text.count(SHOW_CURSOR) == 1
    assert terminal.text.endswith(("\n", SHOW_CURSOR))
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


def test_other_processes_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, Progress(title="student"), epochs=1, enable_checkpointing=False)
    monkeypatch.setattr(type(made), "is_global_zero", False)
    made.fit(Classifier(), loader(0, 100), loader(500, 600))
    assert "student" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"epochs": -1, "max_steps": 25}, r"epoch 3  ━+  25/25"),
        ({"epochs": 3, "max_steps": 15}, r"epoch 2/3  ━+  15/15"),
        ({"epochs": 2, "accumulate_grad_batches": 2}, r"epoch 2/2  ━+  20/20"),
        ({"epochs": 2, "val_check_interval": 0.5}, r"epoch 2/2  ━+  20/20"),
    ],
)
def test_the_bar_ends_where_the_training_does(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], where: str
) -> None:
    terminal.connect(monkeypatch)
    fit(Classifier(), tmp_path, Progress(), **quiet(**arguments))
    last = terminal.left()[-1]
    assert re.search(where + "  0:0", last), last


def test_without_a_known_end_it_counts(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.connect(monkeypatch)

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield torch.rand(64), 1

    made = trainer(tmp_path, Progress(title="student"), epochs=-1, max_time={"seconds": 1}, enable_checkpointing=False)
    made.fit(Classifier(), torch.utils.data.DataLoader(Endless(), batch_size=10), loader(500, 600))
    last = terminal.left()[-1]
    assert re.search(r"student  epoch 1  ─+  \d+  0:0\d  train/loss", last), last
