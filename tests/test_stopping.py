"""Asked to stop: the step ends and is saved, asked again everything ends at once, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from lab import Run, fit, registry, stages, stopping
from lab.cli import main
from lab.stopping import Stopped

STEP = 9
RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "batch_size": 64},
    "trainer": {"max_epochs": 2},
    "callbacks": {"progress": None, "profile": None, "checkpoints": {"every_seconds": 1e9}, "asked": {}},
    "module": {"name": "supervised", "network": {"name": "mlp", "hidden": [8], "dropout": 0.5}},
}


class Asked(Callback):
    """Sends the process a signal in the middle of a step."""

    watches_only = True
    signals: tuple[int, ...] = ()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == STEP - 1:
            for number in Asked.signals:
                os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def asking() -> None:
    registry.callbacks.register("asked")(Asked)
    Asked.signals = ()


@pytest.mark.parametrize(
    ("number", "raised", "status", "code"),
    [
        (signal.SIGTERM, stages.Terminated, "stopped", 143),
        (signal.SIGINT, stages.Interrupted, "interrupted", 130),
    ],
)
def test_the_step_is_finished_and_saved_and_the_run_goes_on(
    number: int, raised: type[BaseException], status: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fit(RECIPE, out="whole")
    Asked.signals = (number,)
    with pytest.raises(raised) as stopped:
        fit(RECIPE)
    run: Run = stopped.value.run  # type: ignore[attr-defined]
    assert run.status == run.results["stages"]["main"]["status"] == status
    state = run.stage("main") / "checkpoints" / "last.ckpt"
    assert torch.load(state, weights_only=True)["global_step"] == STEP
    assert main(["fit", str(run.recipe), "--fresh"]) == code
    assert f"the step is finished and saved first{'; Ctrl-C' * (code == 130)}" in capsys.readouterr().err
    Asked.signals = ()
    stages.resume(run)
    one, other = (load_file(each.stage("main") / "network.safetensors") for each in (whole, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.results["stages"]["main"]["metrics"] == run.results["stages"]["main"]["metrics"]


def test_asked_again_it_ends_at_once() -> None:
    Asked.signals = (signal.SIGINT, signal.SIGINT)
    with pytest.raises(stages.Interrupted) as stopped:
        fit(RECIPE)
    state = stopped.value.run.stage("main") / "checkpoints" / "last.ckpt"
    assert torch.load(state, weights_only=True)["global_step"] == 1  # the one after the first step


def test_outside_of_training_a_signal_ends_everything_at_once() -> None:
    with stopping.listening(), pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_that_code_waits_for_is_noted_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    with stopping.listening(), stopping.patiently():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked() == signal.SIGTERM
        assert not stopping.overdue()
    assert stopping.asked() is None
    assert "SIGTERM: the step is finished and saved first" in capsys.readouterr().err


def test_handlers_are_as_they_were_and_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        terminated = signal.getsignal(signal.SIGTERM)
        with stopping.listening():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != terminated
        assert signal.getsignal(signal.SIGTERM) == terminated
    finally:
        signal.signal(signal.SIGINT, before)


DISTRIBUTED = """
import sys
from lab.cli import main
sys.exit(main(sys.argv[1:]))
"""


def distributed(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DISTRIBUTED, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def ranks(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_one_of_two_processes_that_is_killed_ends_the_stage_with_the_cause_and_the_run_goes_on() -> None:
    Path("two.yaml").write_text(
        "data: {name: digits, batch_size: 32}\n"
        "trainer: {max_epochs: 12, devices: 2, strategy: ddp, accelerator: cpu}\n"
        "callbacks: {progress: null, profile: null, checkpoints: {every_seconds: 0.2}}\n"
        "module: {name: supervised, network: {name: mlp, hidden: [8], dropout: 0.5}}\n",
        encoding="utf-8",
    )
    training = distributed("fit", "two.yaml")
    while not (states := list(Path("runs").glob("*/*/main/checkpoints/last.ckpt"))):
        assert training.poll() is None, training.communicate()[1]
        time.sleep(0.05)
    os.kill(ranks(training.pid)[1], signal.SIGKILL)
    _, said = training.communicate(timeout=60)
    run = Run(states[0].parents[2])
    assert training.returncode == 1
    assert "stage main: process 1 of 2 was killed by signal 9 (SIGKILL)" in said
    assert run.status == "failed"
    resuming, whole = distributed("resume", str(run.folder)), distributed("fit", "two.yaml", "--out", "whole")
    for process in (resuming, whole):
        assert process.communicate(timeout=200)[1] is not None
        assert process.returncode == 0
    one, other = (load_file(path) for path in sorted(Path().glob("*/two/*/main/network.safetensors")))
    assert all(torch.equal(one[name], other[name]) for name in one)
