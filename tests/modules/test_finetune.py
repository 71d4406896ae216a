"""Fine-tuning: what learns and what does not, how fast, and from when on."""

from __future__ import annotations

import copy
import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lab import fit, stages
from lab.datamodules.digits import Digits
from lab.lora import LowRank, adapt, merge
from lab.modules.finetune import Finetune, layers_of
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.networks.resnet import ResNet
from lab.networks.timm import Timm
from lab.objectives.classification import Classification
from lab.registry import callbacks


def built(network: nn.Module | None = None, kind: type[Finetune] = Finetune, **arguments: Any) -> Finetune:
    seed_everything(0, verbose=False)
    network = network or ConvNet(10, 1, 4)
    given = {"optimizer": partial(AdamW, lr=0.01, weight_decay=0.1), **arguments}
    return kind(network=network, objective=Classification(10), **given)


def trained(module: Finetune, *callbacks: Callback, data: Any = None, **arguments: Any) -> Trainer:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        **{**settings, "enable_progress_bar": False, "accelerator": "cpu", **arguments}, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=data or Digits(batch_size=128))
    return trainer


class History(Callback):
    """The network's tensors before training and after every epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append(copy.deepcopy(pl_module.network.state_dict()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append(copy.deepcopy(pl_module.network.state_dict()))

    def moved(self, epoch: int) -> set[str]:
        before, after = self.states[epoch : epoch + 2]
        return {name for name in after if not torch.equal(before[name], after[name])}


STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def weights_of(names: set[str]) -> set[str]:
    return {name for name in names if name.rpartition(".")[2] not in STATISTICS}


# Layers


@pytest.mark.parametrize(
    ("make", "first", "count"),
    [
        (lambda: ConvNet(10, 1, 4), "body.0.0.weight", 4),
        (lambda: MLP(10, (1, 8, 8), (8, 8)), "body.1.weight", 3),
        (lambda: Timm(10, 1, "resnet10t", input_shape=(1, 32, 32)), "model.conv1.0.weight", 6),
        (lambda: Timm(10, 1, "vit_tiny_patch16_224", options={"img_size": 32}), "model.cls_token", 14),
    ],
    ids=["convnet", "mlp", "timm resnet", "timm vit"],
)
def test_layers_are_blocks_from_the_input_to_the_head(make: Any, first: str, count: int) -> None:
    network = make()
    layers = layers_of(network)
    assert sorted(name for layer in layers for name in layer) == sorted(n for n, _ in network.named_parameters())
    assert first in layers[0]
    head = {id(p) for p in network.head.parameters()}
    assert {name for name, p in network.named_parameters() if id(p) in head} == set(layers[-1])
    assert len(layers) == count


# Rates


def rates(module: Finetune, trainer: Trainer) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in module.network.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("scheduler", [None, partial(StepLR, step_size=1, gamma=0.5), partial(OneCycleLR, max_lr=0.01)])
def test_every_parameter_learns_at_the_rate_of_its_layer(scheduler: Any) -> None:
    module = built(layer_decay=0.5, head_lr=3.0, scheduler=scheduler)
    plain = built(scheduler=scheduler)
    seen = rates(module, trained(module, max_epochs=1))
    base = next(iter(rates(plain, trained(plain, max_epochs=1)).values()))[0]
    assert base > 0
    below = {"body.0": 3, "body.2": 2, "body.4": 1}
    for name, (rate, decay) in seen.items():
        scale = 3.0 if name.startswith("head") else 0.5 ** below[name[:6]]
        assert rate == pytest.approx(base * scale, rel=1e-9), name
        assert decay == (0.1 if module.network.get_parameter(name).ndim > 1 else 0.0), name


def test_norms_decay_where_that_is_asked() -> None:
    module = built(decay_norms=True)
    assert {decay for _, decay in rates(module, trained(module, max_epochs=1)).values()} == {0.1}


# What learns


def test_a_probe_moves_the_head_and_neither_tensors_nor_statistics_below() -> None:
    history = History()
    trained(built(train="head", cache=False), history)
    assert history.moved(0) | history.moved(1) == {"head.weight", "head.bias"}


def test_a_probe_of_kept_features_learns_what_one_learns_that_asks_at_every_step() -> None:
    networks = []
    for cache in (True, False):
        module = built(train="head", cache=cache)
        calls: list[int] = []
        module.network.body.register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[union-attr]
        trained(module, limit_val_batches=0)
        networks.append((module.network.state_dict(), len(calls)))
    (kept, few), (asked, many) = networks
    assert few < many / 4
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, asked[name], rtol=1e-5, atol=1e-6)


def test_at_first_the_head_alone_and_then_everything() -> None:
    history = History()
    trained(built(probe_epochs=2), history, max_epochs=3)
    assert history.moved(0) == history.moved(1) == {"head.weight", "head.bias"}
    assert history.moved(2) == set(history.states[0])


def test_layers_unfreeze_one_by_one_from_the_head_down() -> None:
    history = History()
    trained(built(unfreeze_every=1), history, max_epochs=4)
    names = ["head", "body.4", "body.2", "body.0"]
    for epoch in range(4):
        moved = {
            name if name in names else name[:6]
            for name in (n.rpartition(".")[0] for n in weights_of(history.moved(epoch)))
        }
        assert moved == set(names[: epoch + 1])


def test_a_layer_more_learns_whenever_nothing_gets_better() -> None:
    module = built(unfreeze_patience=2, optimizer=partial(SGD, lr=0.0), batch_norm="all")  # nothing ever gets better
    trained(module, max_epochs=8)
    first = {layer[0].rpartition(".")[0].removesuffix(".0"): module.begins[layer[0]] for layer in module.layers}
    assert first == {"head": 0, "body.4": 3, "body.2": 5, "body.0": 7}


class Scored(Finetune):
    """Has the validation metric that it is told to have."""

    monitor = ("val/score", "max")
    scores = (0.1, 0.2, 0.3, 0.3, 0.4)

    def on_validation_epoch_end(self) -> None:
        self.log("val/score", self.scores[self.current_epoch])


def test_while_it_gets_better_the_head_learns_alone() -> None:
    history, module = History(), built(kind=Scored, unfreeze_patience=1)
    trained(module, history, max_epochs=5)
    for epoch in range(4):
        assert weights_of(history.moved(epoch)) == {"head.weight", "head.bias"}
    assert {name.partition(".0.")[0].partition(".1.")[0] for name in weights_of(history.moved(4))} == {
        "head.weight", "head.bias", "body.4",
    }  # fmt: skip


def test_patterns_say_from_which_epoch_what_learns() -> None:
    history = History()
    module = built(unfreeze={"body.0": 2, "body.2.0.weight": 1})
    trained(module, history, max_epochs=3)
    assert not {name for name in history.moved(0) | history.moved(1) if name.startswith("body.0")}
    assert "body.2.0.weight" not in history.moved(0)
    assert "body.2.1.weight" in history.moved(0)
    assert "body.2.0.weight" in history.moved(1)
    assert "body.0.0.weight" in history.moved(2)


@pytest.mark.parametrize(
    ("policy", "learning", "frozen"), [("frozen", True, False), ("all", False, False), ("none", True, True)]
)
def test_statistics_follow_where_the_policy_lets_them(policy: Any, learning: bool, frozen: bool) -> None:
    history = History()
    trained(built(unfreeze={"body.0": 9}, batch_norm=policy), history, max_epochs=1)
    moved = history.moved(0)
    assert ("body.4.1.running_mean" in moved) == learning
    assert ("body.0.1.running_mean" in moved) == frozen


# Low rank


def test_a_difference_of_low_rank_is_nothing_at_first_and_stays_when_it_is_merged() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(216, 10)).double()
    keys, inputs = list(network.state_dict()), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    before = network(inputs)
    adapt([network[0], network[2]], rank=2, alpha=4.0)
    assert torch.equal(network(inputs), before)
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(learning) == 4
    for name, parameter in network.named_parameters():
        if name in learning:
            parameter.data.normal_()
    difference = network[2].weight - network[2].parametrizations.weight.original  # type: ignore[union-attr,operator]
    assert torch.linalg.matrix_rank(difference) == 2
    part = network[2].parametrizations.weight[0]  # type: ignore[union-attr,index]
    assert isinstance(part, LowRank)
    torch.testing.assert_close(difference, 2 * part.up @ part.down)
    after = network(inputs)
    merge(network)
    assert sorted(network.state_dict()) == sorted(keys)
    torch.testing.assert_close(network(inputs), after, rtol=0, atol=1e-12)


def test_lora_learns_the_head_and_the_differences_alone_and_keeps_a_plain_network() -> None:
    tuned_by = {"train": "lora", "rank": 2, "optimizer": {"name": "adamw", "lr": 0.01}}
    recipe = {
        "data": {"name": "digits", "batch_size": 128}, "logger": "csv", "trainer": {"max_epochs": 2},
        "stages": {
            "base": {"module": {"name": "supervised", "network": {"name": "mlp", "hidden": [32]}}},
            "tuned": {"module": {"name": "finetune", "network": {"from": "base"}, **tuned_by}},
        },
    }  # fmt: skip
    run = fit(recipe)
    base, tuned = (load_file(run.stage(name) / "network.safetensors") for name in ("base", "tuned"))
    assert base.keys() == tuned.keys()
    assert torch.equal(base["body.1.bias"], tuned["body.1.bias"])
    assert int(torch.linalg.matrix_rank(tuned["body.1.weight"] - base["body.1.weight"], rtol=1e-4)) == 2
    result = run.results["stages"]["tuned"]
    assert result["trained_parameters"] == 2 * (32 + 64) + 330
    assert result["metrics"]["test/accuracy"] > run.results["stages"]["base"]["metrics"]["test/accuracy"]
    from lab.assemble import open_stage

    opened, trainer = open_stage(run, "tuned")
    again = trainer.test(opened.module, datamodule=opened.data, verbose=False)[0]
    assert again["test/accuracy"] == pytest.approx(result["metrics"]["test/accuracy"], abs=1e-6)


# Resuming, and several processes


class Stopping(Callback):
    """Asks the process to stop after a step."""

    watches_only = True
    after = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == Stopping.after:
            os.kill(os.getpid(), signal.SIGTERM)


WAYS: dict[str, dict[str, Any]] = {
    "probe": {"train": "head"},
    "lp_ft": {"probe_epochs": 1, "layer_decay": 0.5},
    "gradual": {"unfreeze_every": 1},
    "plateau": {"unfreeze_patience": 1},
    "lora": {"train": "lora", "rank": 2},
}


@pytest.mark.parametrize("after", [7, 10, 14])
@pytest.mark.parametrize("way", WAYS)
def test_a_training_that_was_left_before_or_after_an_unfreezing_goes_on_the_same(way: str, after: int) -> None:
    callbacks.register("stopping")(Stopping)
    slowly = {"optimizer": {"name": "sgd", "lr": 1e-5}} if way == "plateau" else {}  # it never gets better
    recipe = {
        "data": {"name": "digits", "batch_size": 128},
        "module": {"name": "finetune", "network": {"name": "convnet", "width": 4}, **WAYS[way], **slowly},
        "trainer": {"max_epochs": 3}, "logger": "csv", "callbacks": {"profile": None, "stopping": {}},
    }  # fmt: skip
    Stopping.after = 0
    whole = fit(recipe)
    Stopping.after = after
    with pytest.raises(stages.Terminated) as stopped:
        fit(recipe, fresh=True)
    Stopping.after = 0
    left = stopped.value.run
    assert left is not None
    stages.resume(left)
    one, other = (load_file(run.stage("main") / "network.safetensors") for run in (whole, left))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.results["stages"]["main"]["metrics"] == left.results["stages"]["main"]["metrics"]


# What is wrong


class Headless(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    ("network", "arguments", "said"),
    [
        (Headless, {}, "Headless has no `head` that could learn apart from the rest"),
        (None, {"unfreeze": {"bodi": 3}}, r"no parameter's name fits 'bodi'; there are: body.0, body.2, body.4, head"),
        (None, {"train": "lora", "targets": ("bodi",)}, r"name fits 'bodi'; there are: body.0.0, body.2.0, body.4.0"),
        (None, {"train": "lora", "rank": 0}, "greater than or equal to 1"),
        (None, {"unfreeze": {"body": 1}, "unfreeze_every": 2}, "either unfreeze, by patterns, or unfreeze_every"),
        (None, {"unfreeze_every": 1, "unfreeze_patience": 2}, "or unfreeze_patience, layer by layer"),
        (None, {"train": "head", "unfreeze_patience": 2}, "with train: head nothing else ever learns"),
        (None, {"train": "head", "probe_epochs": 2}, "with train: head nothing else ever learns"),
        (None, {"layer_decay": 0.0}, "greater than 0"),
        (lambda: MLP(10, (1, 8, 8), ()), {"train": "lora"}, "MLP has no layer below its head that lora could adapt"),
    ],
    ids=["headless", "pattern", "target", "rank", "both", "two ways", "plateau", "nothing", "decay", "no layer"],
)
def test_what_does_not_go_together_is_an_error(network: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        built(network() if network else None, **arguments)


def test_a_larger_network_trains_in_every_way() -> None:
    for way in WAYS.values():
        history = History()
        trained(
            built(ResNet(10, 1, depth=8), optimizer=partial(SGD, lr=0.01), **way),
            history,
            max_epochs=1,
            limit_train_batches=2,
        )
        assert history.moved(0)
