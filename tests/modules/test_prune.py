"""Pruning: what goes, when, that it stays away; a shrunk network is the masked one, in memory and in a file."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lab import Run, artifact, fit, load_recipe, sparsity, surgery
from lab.assemble import open_stage
from lab.batch import Labelled
from lab.callbacks.pruning import Pruning, share_at
from lab.cli import main
from lab.datamodules.digits import Digits
from lab.errors import UserError
from lab.importance import fisher
from lab.modules.prune import Prune
from lab.modules.supervised import Supervised
from lab.networks.convnet import ConvNet
from lab.networks.lenet import LeNet
from lab.networks.mlp import MLP
from lab.networks.resnet import ResNet
from lab.networks.timm import Timm
from lab.objectives.classification import Classification
from lab.schedules import Cosine


def built(network: nn.Module | None = None, **arguments: Any) -> Prune:
    seed_everything(0, verbose=False)
    given: dict[str, Any] = {"optimizer": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01), **arguments}
    return Prune(network=network or ConvNet(10, 1, 8), objective=Classification(10), **given)


def beside(*watching: Callback, max_epochs: int = 4, **arguments: Any) -> tuple[Trainer, Supervised]:
    """Supervised training with pruning, and callbacks that see what it leaves at every step."""
    seed_everything(0, verbose=False)
    own = {"optimizer": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)}
    own |= {name: arguments.pop(name) for name in ("optimizer", "scheduler") if name in arguments}
    module = Supervised(network=ConvNet(10, 1, 8), objective=Classification(10), **own)
    return trained(module, Pruning(**arguments), *watching, max_epochs=max_epochs), module


def trained(module: LightningModule, *callbacks: Callback, **arguments: Any) -> Trainer:
    settings = {"max_epochs": 4, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        **{**settings, "enable_progress_bar": False, "accelerator": "cpu", **arguments}, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=Digits(batch_size=128))
    return trainer


class Watch(Callback):
    """After every step: which weights are zero; before the first step of every epoch: all weights."""

    def __init__(self) -> None:
        self.zeros: list[Tensor] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.epochs.append(copy.deepcopy(pl_module.network.state_dict()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        found = sparsity.weights_of(pl_module.network, set()).values()
        self.zeros.append(torch.cat([weight.detach().flatten() == 0 for weight in found]))


class TestWhichGo:
    def test_the_share_is_exact_whatever_is_equal(self) -> None:
        scores = {"a": torch.zeros(7, 3), "b": torch.ones(10)}
        masks = sparsity.smallest(scores, 0.6, "global", {})
        assert sum(int(mask.sum()) for mask in masks.values()) == round(0.4 * 31)
        assert bool(masks["b"].all())

    def test_by_layer_each_loses_the_same_share(self) -> None:
        scores = {"a": torch.rand(10, 10), "b": 100 + torch.rand(50)}
        masks = sparsity.smallest(scores, 0.5, "layer", {})
        assert [int(mask.sum()) for mask in masks.values()] == [50, 25]
        kept = scores["a"][masks["a"]]
        assert kept.min() > scores["a"][~masks["a"]].max()

    def test_what_was_gone_stays_gone(self) -> None:
        before = {"a": torch.tensor([False, True, True, True])}
        masks = sparsity.smallest({"a": torch.tensor([9.0, 1.0, 2.0, 3.0])}, 0.5, "global", before)
        assert masks["a"].tolist() == [False, False, True, True]

    def test_a_weight_that_two_layers_share_counts_once(self) -> None:
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        network[1].weight = network[0].weight
        assert list(sparsity.weights_of(network, set())) == ["0.weight"]

    def test_schedules(self) -> None:
        assert [share_at("linear", t / 4) for t in range(5)] == [0, 0.25, 0.5, 0.75, 1]
        assert [share_at("cubic", t / 4) for t in range(5)] == [0, 37 / 64, 7 / 8, 63 / 64, 1]
        assert share_at("one_shot", 0.1) == 1

    def test_fisher_predicts_what_a_removal_costs(self) -> None:
        """Optimal Brain Damage: of a network at its optimum, ½ Σ F w² of small weights is about the loss they cost."""
        torch.manual_seed(0)
        data = Digits(batch_size=2000)
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
        inputs, targets = batch.inputs.double(), batch.targets
        optimizer = torch.optim.LBFGS(network.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            return nn.functional.cross_entropy(network(inputs), targets) + 1e-3 * network[1].weight.square().sum()

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        sums, count = fisher(network, [Labelled(inputs, targets)], "exact")
        weight = network[1].weight
        score = (weight.detach() ** 2 * (sums["1.weight"] / count + 2e-3) / 2).flatten()
        before = loss().detach()
        real = []
        for index in (chosen := score.argsort()[200:600:10]):
            with torch.no_grad():
                old = weight.view(-1)[index].clone()
                weight.view(-1)[index] = 0
                real.append(loss().detach() - before)
                weight.view(-1)[index] = old
        predicted, actual = score[chosen], torch.stack(real)
        correlation = torch.corrcoef(torch.stack([predicted, actual]))[0, 1]
        assert float(correlation) > 0.9
        assert 0.5 < float(predicted.sum() / actual.sum()) < 2


class TestWeights:
    @pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01), partial(Adam)])
    def test_masks_hold_at_every_step_and_only_grow(self, optimizer: Any) -> None:
        watch = Watch()
        beside(watch, sparsity=0.8, schedule="linear", end=3, optimizer=optimizer)
        shares = [float(zeros.float().mean()) for zeros in watch.zeros]
        steps = len(shares) // 4
        assert shares[steps - 1] == pytest.approx(0.8 / 3, abs=1e-3)
        assert shares[-1] == pytest.approx(0.8, abs=1e-3)
        for epoch in range(4):
            of_epoch = watch.zeros[epoch * steps : (epoch + 1) * steps]
            assert all(torch.equal(zeros, of_epoch[0]) for zeros in of_epoch)
        for earlier, later in zip(watch.zeros, watch.zeros[1:], strict=False):
            assert bool(later[earlier].all())

    def test_rounds_rewind_to_what_the_weights_were(self) -> None:
        watch = Watch()
        trainer, module = beside(watch, sparsity=0.75, schedule="iterative", rounds=2, rewind=1, max_epochs=2)
        assert trainer.current_epoch == 6
        early = watch.epochs[1]
        for epoch, share in ((2, 0.5), (4, 0.75)):
            masks = {name: tensor != 0 for name, tensor in watch.epochs[epoch].items() if name.endswith(".weight")}
            for name in sparsity.weights_of(module.network, set()):
                assert torch.equal(watch.epochs[epoch][name], early[name] * masks[name])
            gone = torch.cat([~masks[name].flatten() for name in sparsity.weights_of(module.network, set())])
            assert float(gone.float().mean()) == pytest.approx(share, abs=1e-2)

    def test_the_rate_goes_through_its_schedule_once_a_round(self) -> None:
        rates: list[float] = []

        class Rates(Callback):
            def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, i: int) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        beside(Rates(), sparsity=0.5, schedule="iterative", rounds=1, scheduler=partial(Cosine), max_epochs=2)
        half = len(rates) // 2
        assert rates[:half] == pytest.approx(rates[half:])
        assert rates[half - 1] < rates[0] / 10

    def test_fisher_and_magnitude_choose_differently_and_ignored_layers_are_left(self) -> None:
        zeros = {}
        for importance in ("magnitude", "fisher"):
            module = built(sparsity=0.5, schedule="one_shot", importance=importance, ignore=("head",), samples=64)
            trained(module, max_epochs=1)
            weights = sparsity.weights_of(module.network, set()).values()
            zeros[importance] = torch.cat([(weight == 0).flatten() for weight in weights])
            assert bool((module.network.head.weight != 0).all())
        assert not torch.equal(zeros["magnitude"], zeros["fisher"])
        assert int(zeros["magnitude"].sum()) == int(zeros["fisher"].sum()) > 0

    def test_beside_another_technique_it_is_a_callback(self, tmp_path: Path) -> None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            "data: {name: digits, batch_size: 256}\n"
            "module: {network: {name: mlp, hidden: [16]}}\n"
            "trainer: {max_epochs: 2}\n"
            "stages:\n  teacher: {module: {name: supervised}}\n"
            "  student:\n    module: {name: distill, teacher: {from: teacher}}\n"
            "    callbacks: {pruning: {sparsity: 0.9, schedule: one_shot}}\n"
        )
        run = fit(load_recipe(recipe), fresh=True)
        built_stage, _ = open_stage(run, "student")
        weights = sparsity.weights_of(built_stage.network, set()).values()
        share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert share == pytest.approx(0.9, abs=1e-3)


NETWORKS = {
    "convnet": (lambda: ConvNet(10, 1, 8), (1, 12, 12)),
    "lenet": (lambda: LeNet(10, (1, 28, 28)), (1, 28, 28)),
    "mlp": (lambda: MLP(10, (1, 8, 8), hidden=(20, 20)), (1, 8, 8)),
    "resnet": (lambda: ResNet(10, 1, 8), (1, 16, 16)),
    "timm resnet18": (lambda: Timm(10, 1, "resnet18"), (1, 32, 32)),
    "timm mobilenet": (lambda: Timm(10, 1, "mobilenetv2_050"), (1, 32, 32)),
}


class TestChannels:
    @pytest.mark.parametrize("name", NETWORKS)
    @torch.no_grad()
    def test_a_shrunk_network_answers_as_the_masked_one_and_can_be_built_again(self, name: str) -> None:
        torch.manual_seed(0)
        make, shape = NETWORKS[name]
        network = make().eval()
        for part in network.modules():  # not what they are at the beginning, where much is zero or one
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight, 1, 0.2)
                nn.init.normal_(part.bias)
                nn.init.normal_(part.running_mean)
        fresh = copy.deepcopy(network)
        example = torch.randn(4, *shape)
        groups = sparsity.groups_of(network, example, set())
        scores = {key: parameter.detach() ** 2 for key, parameter in network.named_parameters()}
        masks = sparsity.channel_masks(network, groups, sparsity.channel_scores(groups, scores), 0.5, "global")
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                if key in masks:
                    parameter.mul_(masks[key])
            masked = network(example)
        size = sum(parameter.numel() for parameter in network.parameters())
        sparsity.without(network, example, groups, masks)
        assert sum(parameter.numel() for parameter in network.parameters()) < 0.7 * size
        shrunk = network(example)
        assert float((shrunk - masked).abs().max()) <= 1e-5 * float(masked.abs().max())
        surgery.shrink(fresh, network.surgery)
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(example), shrunk)

    @pytest.mark.parametrize("target", ["macs", "parameters"])
    def test_a_target_is_met_and_not_by_far(self, tmp_path: Path, target: str) -> None:
        run = fit(chain(tmp_path, f"{target}: 0.6", schedule="linear"), fresh=True)
        dense, narrow = (run.results["stages"][name] for name in ("dense", "narrow"))
        assert 0.3 <= narrow[target] / dense[target] <= 0.4
        assert narrow["bytes"] < 0.6 * dense["bytes"]
        assert narrow["shrinking_changed_outputs_by"] < 1e-5
        assert narrow["nonzero_parameters"] == narrow["parameters"]  # nothing that was gone has come back

    def test_it_is_opened_tested_and_built_upon_as_small_as_it_is(self, tmp_path: Path) -> None:
        run = fit(chain(tmp_path, "sparsity: 0.5", after=True), fresh=True)
        again, trainer = open_stage(Run(run.folder), "narrow")
        assert again.network.surgery
        (metrics,) = trainer.test(again.module, datamodule=again.data, verbose=False)
        assert metrics["test/accuracy"] == run.results["stages"]["narrow"]["metrics"]["test/accuracy"]
        small, finer = (run.results["stages"][name]["parameters"] for name in ("narrow", "finer"))
        assert small == finer

    def test_a_description_that_grows_or_names_what_is_not_there_is_refused(self, tmp_path: Path) -> None:
        run = fit(chain(tmp_path, "sparsity: 0.5"), fresh=True)
        file = run.stage("narrow") / artifact.DESCRIPTION
        text = file.read_text()
        for old, new in (('"out_channels": ', '"out_channels": 9999'), ('"body', '"nobody')):
            file.write_text(text.replace(old, new))
            with pytest.raises(artifact.ArtifactError, match="is damaged"):
                open_stage(Run(run.folder), "narrow")

    def test_a_training_that_is_left_goes_on_the_same(self, tmp_path: Path) -> None:
        chain(tmp_path, "sparsity: 0.5")
        assert main(["verify-resume", str(tmp_path / "r.yaml")]) == 0


def chain(folder: Path, target: str, *, after: bool = False, schedule: str = "one_shot") -> Any:
    file = folder / "r.yaml"
    file.write_text(
        "data: {name: digits, batch_size: 128}\n"
        "trainer: {max_epochs: 2}\n"
        "stages:\n"
        "  dense: {module: {name: supervised, network: {name: convnet, width: 8}}}\n"
        "  narrow:\n"
        f"    module: {{name: prune, network: {{from: dense}}, structure: channels, {target}, schedule: {schedule}, "
        "end: 2}\n" + ("  finer: {module: {name: finetune, network: {from: narrow}}}\n" if after else "")
    )
    return load_recipe(file)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({}, "one target"),
            ({"sparsity": 0.5, "macs": 0.5}, "one target"),
            ({"macs": 0.5}, "structure: channels"),
            ({"sparsity": 0.5, "begin": 2, "end": 2}, "not after begin"),
            ({"sparsity": 0.5, "rewind": 0}, "rewind goes with"),
        ],
    )
    def test_options_that_do_not_go_together(self, arguments: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            Pruning(**arguments)

    @pytest.mark.parametrize("sparsity", [0, 1, 1.5, -0.1])
    def test_shares_outside_0_and_1(self, sparsity: float) -> None:
        with pytest.raises(ValueError, match="sparsity"):
            Pruning(sparsity=sparsity)

    @pytest.mark.parametrize(
        ("network", "arguments", "said"),
        [
            (ConvNet(10, 1, 4), {"sparsity": 0.5, "ignore": ("bdoy.*",)}, "no layer's name fits 'bdoy"),
            (ConvNet(10, 1, 4), {"sparsity": 0.5, "ignore": ("*",)}, "leaves no layer"),
            (ConvNet(10, 1, 4), {"sparsity": 0.5, "begin": 4}, "there are 4 epochs"),
            (
                ConvNet(10, 1, 4),
                {"parameters": 0.999, "structure": "channels", "schedule": "one_shot"},
                "parameters cannot fall by 0.999",
            ),
        ],
    )  # fmt: skip
    def test_what_the_network_or_the_training_cannot_have(
        self, network: nn.Module, arguments: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UserError, match=said):
            trained(built(network, **arguments))


def test_attention_has_no_channels() -> None:
    with pytest.raises(ValueError, match="self_attn is attention"):
        sparsity.groups_of(nn.TransformerEncoderLayer(8, 2, 8), torch.randn(1, 3, 8), set())
