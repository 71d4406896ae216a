"""Averaged weights: the average itself, and who uses it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.optim import SGD

from lab import fit
from lab.artifact import load_weights
from lab.callbacks.ema import EMA
from lab.datamodules.digits import Digits
from lab.modules.supervised import Supervised
from lab.networks.convnet import ConvNet
from lab.objectives.classification import Classification


class Seen(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.weights.append({name: tensor.clone() for name, tensor in module.state_dict().items()})


def trained(callbacks: list[Callback], folder: Path) -> Supervised:
    seed_everything(0, verbose=False)
    module = Supervised(ConvNet(10, 1, 4), Classification(10), partial(SGD, lr=0.1, momentum=0.9))
    trainer = Trainer(
        callbacks=callbacks, logger=False, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=2, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits(batch_size=256))
    return module


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.5, True)])
def test_the_average_is_the_recursion_over_every_steps_weights(decay: float, warmup: bool, tmp_path: Path) -> None:
    seen = Seen()
    module = trained([seen, EMA(decay, warmup)], tmp_path)
    average = {name: tensor.clone() for name, tensor in seen.weights[0].items()}
    for step, weights in enumerate(seen.weights[1:], 2):
        d = min(decay, (1 + step) / (10 + step)) if warmup else decay
        for name, tensor in weights.items():
            average[name] = d * average[name] + (1 - d) * tensor if tensor.is_floating_point() else tensor
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, average[name])
    assert not torch.equal(module.network.head.weight, seen.weights[-1]["network.head.weight"])


def test_the_steps_themselves_are_as_without_it(tmp_path: Path) -> None:
    alone, beside = Seen(), Seen()
    trained([alone], tmp_path)
    trained([beside, EMA()], tmp_path)
    for one, other in zip(alone.weights, beside.weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_validated_selected_and_saved_is_the_average(tmp_path: Path) -> None:
    run = fit(
        {
            "data": {"name": "digits"},
            "module": {"name": "supervised", "network": {"name": "convnet", "width": 4}},
            "trainer": {"max_epochs": 3},
            "callbacks": {"ema": {"decay": 0.99}},
        }
    )
    result = run.results["stages"]["main"]
    saved = torch.load(run.folder / result["checkpoint"], weights_only=True)
    network = ConvNet(10, 1, 4)
    load_weights(network, run.stage("main") / "network.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, saved["state_dict"][f"network.{name}"])
        if name.endswith("weight"):
            assert not torch.equal(tensor, saved["current_model_state"][f"network.{name}"])
    data = Digits()
    data.setup()
    outputs = network.eval()(data.val.inputs)
    accuracy = (outputs.argmax(1) == data.val.targets).float().mean()
    assert result["metrics"]["val/accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
