"""Quantization: the arithmetic is integer arithmetic, the file holds the integers, and training that sees the rounding
makes better networks of few bits."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD

from lab import Run, artifact, fit, load_recipe, quantization, quantized
from lab.assemble import open_stage
from lab.callbacks.quantization import Quantization
from lab.cli import main
from lab.datamodules.digits import Digits
from lab.errors import UserError
from lab.modules.quantize import Quantize
from lab.modules.supervised import Supervised
from lab.networks.convnet import ConvNet
from lab.networks.lenet import LeNet
from lab.networks.resnet import ResNet
from lab.networks.timm import Timm
from lab.objectives.classification import Classification
from lab.quantizer import Grid, Quantizer, Seen, grid_of, weight_range, whole


def images(count: int = 64) -> Tensor:
    data = Digits(batch_size=count)
    data.prepare_data()
    data.setup("fit")
    inputs: Tensor = next(iter(data.val_dataloader())).inputs
    return inputs


def inserted(network: nn.Module, inputs: Tensor, *, learned: bool = False, **arguments: Any) -> nn.Module:
    """A network that rounds, calibrated on the inputs."""
    given: dict[str, Any] = {"bits": 8, "activation_bits": 8, "ends": 8, **arguments}
    network.eval()
    quantization.insert(
        network, quantization.plan(network, inputs[:2], given.pop("left", set()), **given), learned=learned
    )
    with torch.no_grad():
        quantization.calibrate(network, lambda: [inputs])
    return network


def warm(network: nn.Module, inputs: Tensor) -> nn.Module:
    """A network whose batch norms have seen data."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(inputs)
    return network.eval()


class TestGrids:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("signed", [True, False])
    def test_rounding_twice_is_rounding_once_and_zero_is_exact(self, bits: int, signed: bool) -> None:
        torch.manual_seed(0)
        values = torch.cat([torch.randn(1000) * 3 + 1, torch.zeros(3)])
        part = Quantizer(bits, signed=signed)
        scale, zero = grid_of(values.amin(), values.amax(), part.grid)
        part.scale.copy_(scale)
        part.zero.copy_(zero)
        once = part(values)
        assert torch.equal(part(once), once)
        assert bool((once[-3:] == 0).all())
        assert len(once.unique()) <= 2**bits
        inside = (values >= -scale * (zero - part.grid.low)) & (values <= scale * (part.grid.high - zero))
        assert float((once - values)[inside].abs().max()) <= float(scale) / 2 * (1 + 1e-5)

    @pytest.mark.parametrize("low", [-2.0, -1.2345, 0.0, 0.5])
    def test_a_range_reaches_zero(self, low: float) -> None:
        scale, zero = grid_of(torch.tensor(low), torch.tensor(3.0), Grid(8, signed=False))
        assert float((0 - zero) * scale) <= min(low, 0) + float(scale)
        assert float((255 - zero) * scale) >= 3.0 - float(scale)
        assert float(zero) == round(float(zero))

    def test_a_tensor_of_zeros_has_a_grid(self) -> None:
        for signed in (True, False):
            scale, _ = grid_of(torch.zeros(()), torch.zeros(()), Grid(4, signed=signed))
            assert float(scale) > 0

    def test_the_gradient_passes_within_the_range_alone(self) -> None:
        part = Quantizer(3)
        part.scale.fill_(0.5)
        part.zero.fill_(2)
        values = torch.tensor([-3.0, -0.9, 0.2, 1.4, 2.4, 9.0], requires_grad=True)
        part(values).sum().backward()
        assert values.grad is not None
        assert values.grad.tolist() == [0, 1, 1, 1, 1, 0]

    def test_the_gradient_of_a_scale_is_the_papers(self) -> None:
        """LSQ, equation 3: round(v/s) − v/s within, the bound itself outside; here by t, ds/dt = s·ln 2."""
        torch.manual_seed(0)
        part = Quantizer(3, signed=True, learned=True).double()
        part.scale.fill_(0.4)
        values, outer = torch.randn(500).double() * 2, torch.randn(500).double()
        (part(values) * outer).sum().backward()
        steps = values / 0.4
        slope = torch.where(steps.abs() <= 3, steps.round() - steps, 3 * steps.sign())
        weight = 1 / (500 * 3) ** 0.5
        expected = float((slope * outer).sum()) * 0.4 * torch.log(torch.tensor(2.0)).item() * weight
        assert part.shift is not None
        assert part.shift.grad is not None
        assert float(part.shift.grad) == pytest.approx(expected, rel=1e-5)


class TestRanges:
    def test_the_least_squared_error_is_no_worse_than_the_whole_range(self) -> None:
        torch.manual_seed(0)
        weight = torch.randn(6, 50).pow(3)
        part = Quantizer(3, signed=True, channels=6)
        errors = {}
        for observer in ("minmax", "percentile", "mse"):
            scale = weight_range(weight, part, observer, 90)[:, None]
            errors[observer] = (whole(weight, scale, 0, part.grid) * scale - weight).square().sum(1)
        assert bool((errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all())
        assert float(errors["mse"].sum()) < 0.96 * float(errors["minmax"].sum())

    def test_a_percentile_leaves_outliers_out(self) -> None:
        values = torch.cat([torch.linspace(0, 1, 9999), torch.tensor([100.0])])
        found = {}
        for percentile in (99.9, 100.0):
            seen = Seen(counting=True)
            seen.look(values)
            assert seen.agree()
            seen.look(values)
            found[percentile] = float(seen.chosen("percentile", percentile, Grid(8, signed=False))[1])
        assert found[100.0] == pytest.approx(100, rel=1e-3)
        assert found[99.9] <= 1.1

    def test_activations_ranges_do_not_depend_on_how_samples_are_batched(self) -> None:
        inputs = images(60)
        made = []
        for batches in ([inputs], list(inputs.split(7))):
            torch.manual_seed(0)
            network = ConvNet(10, 1, 4).eval()
            quantization.insert(
                network, quantization.plan(network, inputs[:2], set(), bits=8, activation_bits=8, ends=8)
            )
            with torch.no_grad():
                quantization.calibrate(network, partial(iter, batches))
            made.append([part.scale for _, part in quantization.quantizers(network)])
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


NETWORKS = {
    "lenet": lambda: (LeNet(10, (1, 28, 28)), (1, 28, 28)),
    "convnet": lambda: (ConvNet(10, 1, 8), (1, 8, 8)),
    "resnet": lambda: (ResNet(10, 3), (3, 32, 32)),
    "timm": lambda: (Timm(10, 3, "resnet18"), (3, 64, 64)),
    "depthwise": lambda: (Timm(10, 3, "mobilenetv3_small_050"), (3, 64, 64)),
    "attention": lambda: (Timm(10, 3, "vit_tiny_patch16_224", input_shape=(3, 32, 32)), (3, 32, 32)),
}


class TestNetworks:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_folding_changes_nothing_and_8_bits_little(self, name: str) -> None:
        torch.manual_seed(0)
        network, shape = NETWORKS[name]()
        inputs = torch.randn(8, *shape)
        warm(network, inputs)
        with torch.no_grad():
            exact = network(inputs)
            inserted(network, inputs)
            with quantization.exactly(network):
                torch.testing.assert_close(network(inputs), exact, rtol=1e-4, atol=1e-4)
            made = network(inputs)
        spread = float(exact.std())
        assert 0 < float((made - exact).square().mean().sqrt()) <= 0.15 * spread
        norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
        assert not norms

    def test_what_is_left_alone_stays(self) -> None:
        torch.manual_seed(0)
        network = inserted(LeNet(10, (1, 28, 28)), torch.randn(4, 1, 28, 28), left={"body.0"})
        assert "body.0" not in network.quantization["weights"]
        assert len(network.quantization["weights"]) == 4

    def test_the_ends_have_more_bits(self) -> None:
        network = inserted(LeNet(10, (1, 28, 28)), torch.randn(4, 1, 28, 28), bits=3, activation_bits=4, ends=8)
        assert list(network.quantization["weights"].values()) == [8, 3, 3, 3, 8]

    def test_a_layer_computes_what_integers_compute(self) -> None:
        """Whole numbers times whole numbers, summed as 32-bit integers, and one multiplication at the end."""
        torch.manual_seed(0)
        inputs = torch.rand(16, 3, 12, 12) * 2 - 0.5
        network = inserted(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), inputs, bits=8, activation_bits=8)
        with torch.no_grad():
            made = network(inputs)
        quantization.settle(network)
        layer = network[0]
        at: Quantizer = layer.input_quantizer
        steps = whole(inputs, at.scale, at.zero, at.grid).to(torch.int32) - at.zero.to(torch.int32)
        weights = (layer.weight / layer.weight_scale.view(-1, 1, 1, 1)).round().to(torch.int32)
        patches = nn.functional.unfold(steps.double(), 3, padding=1).to(torch.int32)
        sums = torch.einsum("of,bfp->bop", weights.flatten(1).long(), patches.long())
        scale = (at.scale * layer.weight_scale).view(1, -1, 1)
        expected = (sums * scale + layer.bias.view(1, -1, 1)).view(16, 8, 12, 12)
        step = float((at.scale * layer.weight_scale).max().detach())
        assert float((made - expected).detach().abs().max()) <= step
        assert weights.abs().max() <= 127

    @pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 8, 3), lambda: nn.ConvTranspose2d(3, 8, 3)])
    def test_biases_make_up_for_what_rounded_weights_shift(self, make: Any) -> None:
        torch.manual_seed(0)
        inputs = torch.rand(16, 3, 12, 12)
        network = inserted(nn.Sequential(make()), inputs, bits=2, ends=2)
        layer = network[0]
        with torch.no_grad():
            rounded_inputs = layer.input_quantizer(inputs)
            part = layer.parametrizations.weight[0]
            part.enabled = False
            expected = type(layer).forward(layer, rounded_inputs).mean((0, 2, 3))
            part.enabled = True
            before = network(inputs).mean((0, 2, 3))
            quantization.correct(network, inputs.split(5))
            after = network(inputs).mean((0, 2, 3))
        assert float((before - expected).abs().max()) > 1e-2
        assert float((after - expected).abs().max()) < 1e-5
        assert all(part.enabled for _, part in quantization.quantizers(network))

    def test_settling_changes_no_output(self) -> None:
        torch.manual_seed(0)
        inputs = torch.randn(8, 3, 32, 32)
        network = inserted(warm(ResNet(10, 3), inputs), inputs, bits=4, activation_bits=5)
        with torch.no_grad():
            before = network(inputs)
            quantization.settle(network)
            assert torch.equal(network(inputs), before)
        for name, bits in network.quantization["weights"].items():
            for channel in network.get_submodule(name).weight:
                assert len(channel.unique()) <= 2**bits - 1

    def test_a_copy_rounds_by_itself(self) -> None:
        inputs = torch.rand(4, 1, 28, 28)
        network = inserted(LeNet(10, (1, 28, 28)), inputs, bits=3, activation_bits=3)
        twin = copy.deepcopy(network)
        with torch.no_grad():
            for _, part in quantization.quantizers(network):
                part.scale.mul_(3)
            assert not torch.equal(network(inputs), twin(inputs))

    def test_dynamic_scales_are_of_the_batch(self) -> None:
        torch.manual_seed(0)
        network = inserted(nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6), dynamic=True)
        inputs = torch.randn(10, 6)
        with torch.no_grad():
            for factor in (1.0, 1000.0):
                exact = nn.functional.linear(
                    inputs * factor, network[0].parametrizations.weight.original, network[0].bias
                )
                assert float((network(inputs * factor) - exact).abs().max()) <= 0.05 * factor

    def test_sensitivity_ranks_fewer_bits_worse(self) -> None:
        torch.manual_seed(0)
        inputs = torch.randn(16, 1, 28, 28)
        network = inserted(LeNet(10, (1, 28, 28)), inputs, bits=4, activation_bits=8, ends=8)
        with torch.no_grad():
            found = quantization.sensitivity(network, inputs)
        assert len(found) == len(list(quantization.quantizers(network)))
        assert found["body.3 weight"] < found["body.0 weight"]
        assert all(part.enabled for _, part in quantization.quantizers(network))


def files(folder: Path, network: nn.Module) -> tuple[Path, int]:
    description = artifact.Description("networks", {"name": "lenet"}, quantization=network.quantization)
    return folder / artifact.WEIGHTS, artifact.save(folder, network, description)


class TestFiles:
    @pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
    def test_hold_the_integers(self, tmp_path: Path, bits: int) -> None:
        torch.manual_seed(0)
        inputs = torch.rand(8, 1, 28, 28)
        network = inserted(LeNet(10, (1, 28, 28)), inputs, bits=bits, activation_bits=bits, ends=2)
        quantization.settle(network)
        weights, size = files(tmp_path, network)
        again = LeNet(10, (1, 28, 28)).eval()
        quantized.restore(again, network.quantization)
        artifact.load_weights(again, weights)
        for name, tensor in network.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        with torch.no_grad():
            assert torch.equal(again(inputs), network(inputs))
        count = sum(layer.weight.numel() for layer in network.modules() if hasattr(layer, "weight"))
        assert size < count * bits / 8 + 10_000

    def test_weights_that_left_the_grid_are_kept_as_they_are(self, tmp_path: Path) -> None:
        network = inserted(LeNet(10, (1, 28, 28)), torch.rand(8, 1, 28, 28))
        quantization.settle(network)
        with torch.no_grad():
            network.body[0].weight[0, 0, 0, 0] += 1e-3
        weights, _ = files(tmp_path, network)
        assert "body.0.weight" in load_file(weights)
        assert f"body.3.weight{quantized.STEPS}" in load_file(weights)

    @pytest.mark.parametrize("damage", ["short", "without a scale", "of no layer"])
    def test_that_are_damaged_are_refused(self, tmp_path: Path, damage: str) -> None:
        network = inserted(LeNet(10, (1, 28, 28)), torch.rand(8, 1, 28, 28))
        quantization.settle(network)
        weights, _ = files(tmp_path, network)
        tensors, key = load_file(weights), f"body.3.weight{quantized.STEPS}"
        if damage == "short":
            tensors[key] = tensors[key][:-1].clone()
        elif damage == "without a scale":
            del tensors["body.3.weight_scale"]
        else:
            tensors[f"body.1.weight{quantized.STEPS}"] = tensors.pop(key)
        save_file(tensors, weights)
        again = LeNet(10, (1, 28, 28))
        quantized.restore(again, network.quantization)
        with pytest.raises(artifact.ArtifactError, match=r"body\.[13]"):
            artifact.load_weights(again, weights)

    @pytest.mark.parametrize(
        "change", [{"weights": {"nothing": 8}}, {"weights": {"body.0": 99}}, {"outputs": {"none": 8}}, {"x": 1}]
    )
    def test_a_plan_of_another_network_is_refused(self, change: dict[str, Any]) -> None:
        network = inserted(LeNet(10, (1, 28, 28)), torch.rand(2, 1, 28, 28))
        with pytest.raises(ValueError, match=r"nothing|body\.0|none|no plan"):
            quantized.restore(LeNet(10, (1, 28, 28)), {**network.quantization, **change})


def recipe(folder: Path, quantize: str, *, epochs: int = 2, more: str = "", network: str = "convnet, width: 8") -> Any:
    file = folder / "r.yaml"
    file.write_text(
        "data: {name: digits, batch_size: 128}\n"
        f"trainer: {{max_epochs: {epochs}}}\n"
        "stages:\n"
        f"  dense: {{module: {{name: supervised, network: {{name: {network}}}}}}}\n"
        f"  small: {{module: {{name: quantize, network: {{from: dense}}, {quantize}}}}}\n" + more
    )
    return load_recipe(file)


def reopened(run: Run, stage: str) -> nn.Module:
    """The network that a stage saved."""
    network: nn.Module = open_stage(Run(run.folder), stage)[0].module.network
    return network


class TestStages:
    @pytest.mark.parametrize("method", ["static", "dynamic", "qat"])
    def test_what_is_tested_is_what_is_saved(self, tmp_path: Path, method: str) -> None:
        network = "mlp, hidden: [32]" if method == "dynamic" else "convnet, width: 8"
        run = fit(recipe(tmp_path, f"method: {method}, bits: 5", network=network), fresh=True)
        dense, result = (run.results["stages"][name] for name in ("dense", "small"))
        network_ = reopened(run, "small").eval()
        assert network_.quantization["dynamic"] == (method == "dynamic")
        data = Digits()
        data.prepare_data()
        data.setup("test")
        right = total = 0
        with torch.no_grad():
            for batch in data.test_dataloader():
                right += int((network_(batch.inputs).argmax(1) == batch.targets).sum())
                total += len(batch)
        assert result["metrics"]["test/accuracy"] == pytest.approx(right / total, abs=1e-6)
        assert result["bytes"] < 0.5 * dense["bytes"]
        table = (run.stage("small") / "tables" / "sensitivity.csv").read_text().splitlines()
        assert table[0] == "rounded,bits,signal_to_noise_db"
        assert len(table) == 1 + len(result["sensitivity_db"])
        assert float(table[1].split(",")[2]) == min(result["sensitivity_db"].values())
        assert set(result["sensitivity_db"]) == {name for name, _ in quantization.quantizers(network_)} | {
            f"{name} weight" for name in network_.quantization["weights"]
        }

    def test_static_trains_nothing(self, tmp_path: Path) -> None:
        run = fit(recipe(tmp_path, "bits: 8, bias_correction: false", network="mlp, hidden: [32]"), fresh=True)
        dense, small = (reopened(run, name) for name in ("dense", "small"))
        for name, layer in small.named_modules():
            if isinstance(layer, nn.Linear):
                exact = dense.get_submodule(name)
                assert torch.equal(layer.bias, exact.bias)
                away = (layer.weight - exact.weight).detach().abs()
                assert float(away.max()) <= 40 * float(layer.weight_scale.max())
                assert float(away.median()) <= float(layer.weight_scale.max()) / 2

    def test_a_training_that_is_left_goes_on_the_same(self, tmp_path: Path) -> None:
        recipe(tmp_path, "method: qat, bits: 3, activation_bits: 3, ends: 3", network="convnet, width: 4")
        assert main(["verify-resume", str(tmp_path / "r.yaml")]) == 0

    def test_another_technique_goes_on_from_integers(self, tmp_path: Path) -> None:
        more = "  on: {module: {name: finetune, network: {from: small}}}\n"
        run = fit(recipe(tmp_path, "bits: 4", more=more), fresh=True)
        assert (run.stage("on") / artifact.WEIGHTS).exists()

    def test_distillation_that_sees_the_rounding(self, tmp_path: Path) -> None:
        file = tmp_path / "r.yaml"
        file.write_text(
            "data: {name: digits, batch_size: 128}\n"
            "trainer: {max_epochs: 2}\n"
            "stages:\n"
            "  teacher: {module: {name: supervised, network: {name: mlp, hidden: [64]}}}\n"
            "  student:\n"
            "    module: {name: distill, teacher: {from: teacher}, network: {name: mlp, hidden: [16]}}\n"
            "    callbacks: {quantization: {bits: 4, activation_bits: 4}}\n"
        )
        run = fit(load_recipe(file), fresh=True)
        network = reopened(run, "student")
        assert sorted(network.quantization["weights"].values()) == [8, 8]
        assert run.results["stages"]["student"]["quantized_layers"] == 2


def trained(module: LightningModule, *callbacks: Any, **arguments: Any) -> Trainer:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        **{**settings, "enable_progress_bar": False, "accelerator": "cpu", **arguments}, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=Digits(batch_size=128))
    return trainer


def built(network: nn.Module, **arguments: Any) -> Quantize:
    seed_everything(0, verbose=False)
    return Quantize(
        network=network, objective=Classification(10), optimizer=partial(SGD, lr=0.05, momentum=0.9), **arguments
    )


class Nothing(nn.Module):
    """A network without a layer that could be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(10))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1)[:, :10] * self.gain


class TestRefused:
    @pytest.mark.parametrize(
        ("network", "arguments", "said"),
        [
            (ConvNet(10, 1, 4), {"ignore": ("bdoy.*",)}, "no layer's name fits 'bdoy"),
            (ConvNet(10, 1, 4), {"ignore": ("*",)}, "no layer"),
            (Nothing(), {}, "no linear or convolutional layer"),
        ],
    )  # fmt: skip
    def test_what_the_network_cannot_have(self, network: nn.Module, arguments: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            trained(built(network, method="qat", **arguments))

    def test_weights_of_other_layers_are_named(self) -> None:
        class Rows(nn.Module):
            """Reads an image row by row."""

            def __init__(self) -> None:
                super().__init__()
                self.rows = nn.GRU(8, 16, batch_first=True)
                self.head = nn.Linear(16, 10)

            def forward(self, inputs: Tensor) -> Tensor:
                """``[B, 1, 8, 8]`` to ``[B, 10]``."""
                last: Tensor = self.head(self.rows(inputs.squeeze(1))[0][:, -1])
                return last

        module = built(Rows(), method="static")
        with pytest.warns(UserWarning, match=r"stay exact: rows\.weight_ih_l0, rows\.weight_hh_l0$"):
            module.quantization.finish(trained(module), module)
        with pytest.raises(ValueError, match=r"Rows calls no linear or .*other weights: rows\.weight_ih_l0"):
            quantization.plan(Rows(), images(2), {"head"}, bits=8, activation_bits=8, ends=8)

    def test_without_data_to_calibrate_with(self) -> None:
        data = Digits(batch_size=128)
        data.prepare_data()
        data.setup("fit")
        seed_everything(0, verbose=False)
        module = Supervised(network=ConvNet(10, 1, 4), objective=Classification(10), optimizer=partial(SGD, lr=0.1))
        settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[Quantization()], **settings)
        with pytest.raises(UserError, match="calibration looks at training samples"):
            trainer.fit(module, data.train_dataloader(), data.val_dataloader())

    def test_calibration_without_samples(self) -> None:
        network = LeNet(10, (1, 28, 28)).eval()
        quantization.insert(
            network, quantization.plan(network, torch.rand(2, 1, 28, 28), set(), bits=8, activation_bits=8, ends=8)
        )
        with pytest.raises(ValueError, match="the data gave none"):
            quantization.calibrate(network, lambda: [])

    def test_a_weight_that_is_made_of_others(self) -> None:
        network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match="0's weight is made of others"):
            quantization.plan(network, torch.rand(2, 4), set(), bits=8, activation_bits=8, ends=8)

    @pytest.mark.parametrize("bits", [1, 9, 0, 2.5])
    def test_bits_that_there_are_not(self, bits: Any) -> None:
        with pytest.raises(ValueError, match="bits"):
            Quantization(bits=bits)

    def test_twice(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        more = "  again: {module: {name: quantize, network: {from: small}}}\n"
        recipe(tmp_path, "bits: 8", epochs=1, more=more, network="mlp, hidden: [8]")
        assert main(["fit", str(tmp_path / "r.yaml"), "--fresh"]) == 1
        assert "quantized already" in capsys.readouterr().err
