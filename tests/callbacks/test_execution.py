"""Compiled and channels-last networks compute what they computed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.optim import SGD

from lab import artifact
from lab.callbacks.ema import EMA
from lab.callbacks.execution import ChannelsLast, Compile
from lab.datamodules.digits import Digits
from lab.modules.supervised import Supervised
from lab.networks.convnet import ConvNet
from lab.objectives.classification import Classification


def trained(*callbacks: Callback, folder: Path) -> Supervised:
    seed_everything(0, verbose=False)
    module = Supervised(ConvNet(10, 1, 4), Classification(10), partial(SGD, lr=0.05))
    trainer = Trainer(
        callbacks=list(callbacks), logger=False, accelerator="cpu", default_root_dir=folder, max_steps=5,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits())
    return module


@pytest.mark.parametrize("callbacks", [(Compile(backend="aot_eager"),), (ChannelsLast(),), (ChannelsLast(), EMA(0.5))])
def test_training_gives_the_same_network(callbacks: tuple[Callback, ...], tmp_path: Path) -> None:
    ema = [EMA(0.5)] if len(callbacks) == 2 else []
    plain, other = trained(*ema, folder=tmp_path), trained(*callbacks, folder=tmp_path)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


def test_the_network_really_is_compiled_while_it_trains(tmp_path: Path) -> None:
    class Look(Callback):
        compiled = False

        def on_train_start(self, trainer: Trainer, module: Supervised) -> None:
            self.compiled = module.network._compiled_call_impl is not None

    look = Look()
    module = trained(Compile(backend="eager"), look, folder=tmp_path)
    assert look.compiled
    assert module.network._compiled_call_impl is None


def test_channels_last_weights_are_saved_as_any(tmp_path: Path) -> None:
    module = trained(ChannelsLast(), folder=tmp_path)
    weight = module.network.body[2][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    artifact.save(tmp_path, module.network, artifact.Description("networks", {"name": "convnet"}))
    again = ConvNet(10, 1, 4)
    artifact.load_weights(again, tmp_path / artifact.WEIGHTS)
    assert torch.equal(again.body[2][0].weight, weight)
