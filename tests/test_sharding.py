"""FSDP: every process has its part of the weights, and whoever looks finds them whole.

What they become is in parity.yaml.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor

from lab import UserError, fit, load_recipe, parity, stages
from lab.callbacks import Lean
from lab.check import check
from lab.datamodules.docstrings import Docstrings
from lab.document import RecipeError
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.parity import WIDTHS, compare
from lab.recipe import load
from lab.sharding import blocks, gather, shard
from lab.types import check_types

FSDP = WIDTHS[-1]
RECIPE: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "docstrings", "max_length": 16},
    "global_batch_size": 32,
    "trainer": {"max_epochs": 1, "limit_train_batches": 4, "accelerator": "cpu", "strategy": "fsdp", "devices": 2},
    "callbacks": {"progress": None, "profile": None},
    "logger": "csv",
    "module": {
        "name": "supervised", "optimizer": {"name": "adamw", "lr": 0.01},
        "network": {"name": "transformer", "width": 16, "depth": 2, "heads": 2},
    },
}  # fmt: skip


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Looks(Lean):
    """Notes what a process has of the weights between two steps, and how many blocks there are."""

    watches_only = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        own = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in pl_module.parameters()]
        noted = {
            "own": sum(own),
            "whole": sum(parameter.numel() for parameter in pl_module.parameters()),
            "blocks": sum(isinstance(part, FSDPModule) for part in pl_module.modules()),
            "optimizer": sum(
                value.to_local().numel() if isinstance(value, DTensor) else value.numel()
                for state in trainer.optimizers[0].state.values()
                for value in state.values()
            ),
        }
        note = Path(trainer.default_root_dir, f"noted-{trainer.global_rank}.json")
        note.write_text(json.dumps(noted), encoding="utf-8")


class Uneven(Docstrings):
    """Has more batches to validate on in the second process than in the first."""

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        return Few(list(super().val_dataloader())[: 2 + self.trainer.global_rank])


class Few:
    """A loader of these batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_a_process_has_its_part_and_what_is_kept_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", str(here), prepend=os.pathsep)
    recipe = {
        **RECIPE, "callbacks": {**RECIPE["callbacks"], "looks": {"name": "test_sharding.Looks"}},
        "data": {"name": "test_sharding.Uneven", "max_length": 16, "eval_batch_size": 32},
    }  # fmt: skip
    run = fit(recipe, imports=["test_sharding"], fresh=True)
    weights = load_file(run.stage("main") / "network.safetensors")
    size = sum(tensor.numel() for tensor in weights.values())
    for rank in (0, 1):
        noted = json.loads((run.stage("main") / f"noted-{rank}.json").read_text())
        assert noted["whole"] == size
        assert noted["own"] == pytest.approx(size / 2, rel=0.02)
        assert noted["optimizer"] == pytest.approx(size, rel=0.02)  # two states of each weight of its part
        assert noted["blocks"] == 4  # two layers, the head, and the rest
    saved = torch.load(run.stage("main") / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.equal(saved["state_dict"][f"network.{name}"], tensor) for name, tensor in weights.items())
    assert sum(v.numel() for s in saved["optimizer_states"][0]["state"].values() for v in s.values()) > 2 * size
    assert run.results["stages"]["main"]["metrics"]["test/accuracy"] > 0.1


def test_what_is_shared_out_becomes_what_it_was(alone: Any) -> None:
    network = ConvNet(10, 1, 4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    classes = [type(part) for part in network.modules()]
    called: list[int] = []
    network.head.register_forward_hook(lambda *_: called.append(1))
    module = Holding(network)
    parts = shard(module, alone, OffloadPolicy())
    assert parts == [network]
    assert isinstance(network, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    network.eval()(torch.rand(2, 1, 8, 8))
    gather(network)
    assert [type(part) for part in network.modules()] == classes
    assert {name: type(tensor) for name, tensor in network.named_parameters()} == dict.fromkeys(
        (name for name, _ in network.named_parameters()), nn.Parameter
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    network.load_state_dict(before)
    network.train()(torch.rand(2, 1, 8, 8)).sum().backward()
    assert len(called) == 2
    assert "features" not in vars(network)


class Holding(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Tied(nn.Module):
    """Its first block and its end share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.Tanh())]
        )
        self.end = nn.Linear(4, 4)
        self.end.weight = self.body[0][0].weight  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x)
        result: Tensor = self.end(x)
        return result


def test_a_weight_that_two_share_stays_one(alone: Any) -> None:
    network = Tied()
    assert list(blocks(network)) == [network.body[1]]
    shard(Holding(network), alone, OffloadPolicy())
    network(torch.rand(3, 4))
    gather(network)
    assert network.end.weight is network.body[0][0].weight  # type: ignore[index]
    assert len(list(network.parameters())) == 5


def test_a_head_in_no_block_is_one_and_a_head_in_a_block_is_none() -> None:
    assert [type(block) for block in blocks(MLP(2, (3,), (4,)))] == [nn.Linear]
    network = ConvNet(10, 1, 4)
    whole = list(blocks(network))
    assert whole[-1] is network.head
    network.head = network.body[0][0]  # type: ignore[assignment,index]  # a part of the first block
    assert list(blocks(network)) == whole[:-1]


def test_parameters_in_no_part_are_refused(alone: Any) -> None:
    module = Holding(nn.Linear(2, 2))
    module.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match=r"^Holding\.scale is in no part of the module: fsdp cannot share it out"):
        shard(module, alone, OffloadPolicy())


def test_blocks_whose_activations_are_computed_again_end_as_alone(tmp_path: Path) -> None:
    module = {**RECIPE["module"], "network": {**RECIPE["module"]["network"], "dropout": 0.0}}
    recipe = {**RECIPE, "module": module, "trainer": {}, "callbacks": {"activation_checkpointing": {}}}
    (verdict,) = compare(recipe, folder=tmp_path, widths=[FSDP], epochs=1, steps=4)
    assert not verdict.differs(1e-9)
    assert verdict.tensor


class Leaves(Lean):
    """Has the program that started a training asked to stop after five batches, once."""

    watches_only = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        mark = Path(trainer.default_root_dir, "left")
        if trainer.global_step == 5 and trainer.is_global_zero and not mark.exists():
            mark.touch()
            os.kill(os.getppid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:the training was left with 2 processes and goes on with 1")
@pytest.mark.parametrize("width", ["fsdp", "alone"])
def test_a_training_that_was_left_goes_on_as_it_would_have(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", str(here), prepend=os.pathsep)
    recipe: dict[str, Any] = {
        **RECIPE, "data": "digits",
        "trainer": {**RECIPE["trainer"], "precision": "64-true", "max_epochs": 60, "limit_train_batches": 8},
        "module": {**RECIPE["module"], "network": {"name": "mlp", "hidden": [8], "activation": "tanh"}},
    }  # fmt: skip
    alone = {**recipe["trainer"], "strategy": "auto", "devices": 1}
    whole = fit({**recipe, "trainer": alone}, fresh=True)
    leaving = {**recipe, "callbacks": {**recipe["callbacks"], "leaves": {"name": "test_sharding.Leaves"}}}
    with pytest.raises(stages.Terminated) as left:
        fit(leaving, imports=["test_sharding"], fresh=True)
    run = left.value.run
    assert run is not None
    assert torch.load(run.stage("main") / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < 480
    if width == "alone":
        text = run.recipe.read_text(encoding="utf-8")
        run.recipe.write_text(text.replace("strategy: fsdp", "strategy: auto").replace("devices: 2", "devices: 1"))
    stages.resume(run)
    expected, found = (load_file(one.stage("main") / "network.safetensors") for one in (whole, run))
    assert parity.difference(expected, found)[0] <= 1e-9


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"callbacks": {"ema": {}}}, "ema cannot be trained with fsdp: averages are of whole weights; use ddp"),
        ({"module": {"name": "prune", "network": "mlp"}}, "prune cannot be trained with fsdp: masks are of whole"),
    ],
)
def test_what_needs_whole_weights_is_refused(changed: dict[str, Any], said: str) -> None:
    recipe = {**RECIPE, "data": "digits", "module": {"name": "supervised", "network": "mlp"}, **changed}
    with pytest.raises(RecipeError, match=said):
        check_types(load_recipe(recipe))


def test_the_place_of_the_strategy_is_told(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "data: {name: permuted, source: digits}\nmodule: {name: ewc, network: mlp}\n"
        "trainer: {accelerator: cpu, devices: 2, strategy: fsdp}\n"
    )
    with pytest.raises(RecipeError, match=r"r\.yaml:3:51: trainer\.strategy: ewc cannot be trained with fsdp"):
        check_types(check(load(file, [])))
