"""Blocks that are computed again train the same weights, and keep less meanwhile."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

from lab import fit
from lab.callbacks.activation_checkpointing import ActivationCheckpointing, blocks_of
from lab.callbacks.execution import Compile
from lab.datamodules.digits import Digits
from lab.errors import UserError
from lab.modules.supervised import Supervised
from lab.networks.convnet import ConvNet
from lab.networks.googlenet import GoogLeNet
from lab.networks.mlp import MLP
from lab.networks.resnet import ResNet
from lab.networks.transformer import Transformer
from lab.objectives.classification import Classification
from lab.stages import StageFailed

RESNET = {"name": "resnet", "depth": 8, "width": 4}
DOMAINS = {"name": "domains", "source": "digits", "target": "digits"}
TASKS = {"name": "permuted", "source": "digits", "tasks": 2}


def recipe(module: dict[str, Any], data: Any = "digits", trainer: Any = None, callbacks: Any = None) -> dict[str, Any]:
    short = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2, "limit_test_batches": 2}
    return {
        "seed": 1, "data": data, "module": module, "logger": "csv",
        "trainer": {**short, "accelerator": "cpu", **(trainer or {})},
        "callbacks": {"progress": None, "profile": None, **(callbacks or {})},
    }  # fmt: skip


def trained(said: dict[str, Any], blocks: Any = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor that a run leaves, and its results; with blocks computed again where they are given."""
    again = {} if blocks is None else {"activation_checkpointing": blocks}
    run = fit({**said, "callbacks": {**said["callbacks"], **again}}, fresh=True)
    folder = run.stage("main")
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = {f"last.{name}": tensor for name, tensor in last.items() if isinstance(tensor, Tensor)}
    return {**load_file(folder / "network.safetensors"), **kept}, run.results["stages"]["main"]


@pytest.mark.parametrize(
    ("said", "blocks"),
    [
        (recipe({"name": "supervised", "network": {"name": "convnet", "width": 4}}), 3),
        (recipe({"name": "supervised", "network": RESNET}, callbacks={"ema": {"decay": 0.5}}), 4),
        (recipe({"name": "supervised", "network": RESNET}, trainer={"precision": "bf16-mixed"}), 4),
        (recipe({"name": "supervised", "network": {"name": "transformer", "dropout": 0.2}}, "docstrings"), 2),
        (
            recipe(
                {"name": "distill", "network": RESNET, "teacher": {"name": "convnet", "width": 4},
                 "hints": {"body.1.residual.2": "body.0"}}
            ),
            4,
        ),
        (recipe({"name": "finetune", "network": RESNET, "unfreeze_every": 1}), 4),
        (recipe({"name": "finetune", "network": RESNET, "train": "lora"}), 4),
        (recipe({"name": "quantize", "network": RESNET, "method": "qat"}), 4),
        (recipe({"name": "supervised", "network": RESNET}, callbacks={"sharing": {}}), 4),
        (recipe({"name": "dann", "network": RESNET}, DOMAINS), 4),
        (recipe({"name": "ewc", "network": RESNET}, TASKS), 4),
        (recipe({"name": "supervised", "network": RESNET}, trainer={"devices": 2, "strategy": "ddp"}), 4),
    ],
    ids=lambda value: value["module"]["name"] if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_weights_and_buffers_are_those_of_a_training_without(said: dict[str, Any], blocks: int) -> None:
    (plain, without), (other, results) = trained(said), trained(said, {})
    assert results["recomputed_blocks"] == blocks
    assert "recomputed_blocks" not in without
    assert other.keys() == plain.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in plain.items())


def test_a_policy_is_trained_the_same_with_a_part_that_is_named() -> None:
    module = {"name": "ppo", "network": {"name": "mlp", "hidden": [8]}}
    said = recipe(module, {"name": "gym", "environment": "CartPole-v1"})
    (plain, _), (other, _) = trained(said), trained(said, {"blocks": ["body"]})
    assert all(torch.equal(other[name], tensor) for name, tensor in plain.items())


class Normed(nn.Module):
    """Its weight is divided by its largest singular value as an iteration finds it, a step further at each forward."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.utils.spectral_norm(nn.Linear(64, 64)), nn.Tanh()) for _ in range(2)]
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class Counting(Supervised):
    """Counts what a step keeps for its backward pass, beside parameters and buffers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.parameters(), *self.buffers())}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if (storage := tensor.untyped_storage()).data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().training_step(batch, batch_idx)
        self.kept = sum(storages.values())
        return loss


class Look(Callback):
    """Remembers the names of a training network's weights, and which of its parts have a forward of their own."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.names = set(module.network.state_dict())
        self.own = {name for name, part in module.network.named_modules() if "forward" in vars(part)}


def short(network: nn.Module, *callbacks: Callback) -> Counting:
    seed_everything(0, verbose=False)
    module = Counting(network, Classification(10), partial(SGD, lr=0.05))
    trainer = Trainer(
        callbacks=list(callbacks), logger=False, accelerator="cpu", max_steps=4, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits())
    return module


def test_much_less_is_kept() -> None:
    plain, other = (short(ResNet(10, 1, 20), *callbacks) for callbacks in ((), (ActivationCheckpointing(),)))
    assert other.kept < plain.kept / 3


@pytest.mark.parametrize(
    ("make", "callbacks"),
    [(Normed, ()), (partial(ConvNet, 10, 1, 4), (Compile(backend="aot_eager"),))],
)
def test_what_depends_on_buffers_or_is_compiled_is_the_same(make: Any, callbacks: tuple[Callback, ...]) -> None:
    found = []
    for others in ((), (ActivationCheckpointing(),)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        found.append(short(make(), *callbacks, *others))
    plain, other = found
    assert other.kept < plain.kept
    for name, tensor in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_names_stay_and_afterwards_nothing_is_left() -> None:
    network, look = ResNet(10, 1, 8, 4), Look()
    before = set(network.state_dict())
    short(network, ActivationCheckpointing(), look)
    assert look.names == before
    assert look.own == {"body.0", "body.1", "body.2", "body.3"}
    assert not any("forward" in vars(part) for part in network.modules())


def test_a_copy_is_computed_with_its_own_weights() -> None:
    class Copy(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            self.copied = copy.deepcopy(module.network)

    network, kept = ConvNet(10, 1, 4), Copy()
    short(network, ActivationCheckpointing(), kept)
    for parameter in network.parameters():
        parameter.data.zero_()
    assert kept.copied.train()(torch.ones(2, 1, 8, 8)).any()


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (ConvNet(10, 1), ["body.0", "body.2", "body.4"]),
        (Transformer(10, 9, (5,), depth=3), ["body.0", "body.1", "body.2"]),
        (GoogLeNet(10, 1, 8), [f"body.{i}" for i in (0, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13)]),
        (nn.Sequential(nn.Sequential(*(Transformer(2, 9, (5,)).body))), ["0.0", "0.1"]),
        (MLP(10, (4,)), []),
    ],
)
def test_a_networks_blocks_are_the_parts_that_repeat(network: nn.Module, expected: list[str]) -> None:
    assert blocks_of(network) == expected


def test_a_part_of_a_network_can_be_named(tmp_path: Path) -> None:
    look = Look()
    short(ResNet(10, 1, 8, 4), ActivationCheckpointing(("body.[12]", "body.1.residual")), look)
    assert look.own == {"body.1", "body.2"}


@pytest.mark.parametrize(
    ("network", "callbacks", "message"),
    [
        (MLP(10, (64,), (4,)), (ActivationCheckpointing(),), r"MLP is no sequence of blocks: .* `blocks: \[body\]`"),
        (
            ConvNet(10, 1, 4),
            (ActivationCheckpointing(("layer*",)),),
            r"no part of ConvNet has a name like 'layer\*' \(th",
        ),
        (
            ConvNet(10, 1, 4),
            (ActivationCheckpointing(), Compile(backend="eager")),
            "compile's backend eager would have",
        ),
    ],
)
def test_what_cannot_be_computed_again_is_said_before_training(
    network: nn.Module, callbacks: tuple[Callback, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        short(network, *callbacks)


def test_a_technique_without_blocks_in_its_step_refuses() -> None:
    module = {"name": "protonet", "network": "conv4"}
    said = recipe(module, {"name": "episodes", "source": "digits", "ways": 2})
    with pytest.raises(StageFailed, match="activation_checkpointing: ProtoNet computes a step as a function"):
        trained(said, {})
