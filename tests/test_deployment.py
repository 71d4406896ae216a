"""Exported files: they compute what the network computes, in integers where it is quantized, and change no input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lab import Run, deployment, fit, load_recipe, quantization
from lab.assemble import open_stage
from lab.cli import main
from lab.errors import UserError
from lab.networks.convnet import ConvNet
from lab.networks.lenet import LeNet
from lab.networks.mlp import MLP
from lab.networks.resnet import ResNet
from lab.networks.timm import Timm

onnx = pytest.importorskip("onnx")

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: MLP(10, (1, 8, 8), hidden=(16,)), (1, 8, 8)),
    "convnet": (lambda: ConvNet(10, 1, 8), (1, 8, 8)),
    "lenet": (lambda: LeNet(10, (1, 28, 28)), (1, 28, 28)),
    "resnet": (lambda: ResNet(10, 3), (3, 32, 32)),
    "timm": (lambda: Timm(10, 3, "mobilenetv3_small_050"), (3, 32, 32)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose batch norms have seen data, and 9 inputs."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network, inputs = build(), torch.randn(9, *shape)
    with torch.no_grad():
        network(inputs)
        network(inputs)
    return network.eval(), inputs


def quantized(network: nn.Module, inputs: Tensor, **arguments: Any) -> nn.Module:
    plan = quantization.plan(
        network, inputs[:2], set(), **{"bits": 8, "activation_bits": 8, "ends": 8, **arguments}
    )  # fmt: skip
    quantization.insert(network, plan)
    with torch.no_grad():
        quantization.calibrate(network, lambda: [inputs])
    quantization.settle(network)
    return network


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_computes_what_the_network_does_for_any_number_of_inputs(
    tmp_path: Path, name: str, form: deployment.Format
) -> None:
    network, inputs = made(name)
    path = tmp_path / f"n{deployment.SUFFIXES[form]}"
    assert deployment.export(network, inputs[:1], path, form) == path.stat().st_size
    found = deployment.compare(network, deployment.load(path), [inputs, inputs[:1], inputs[:4]])
    assert found.share <= 1e-5
    assert found.agreement == 1
    assert network.training is False


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bits": 7, "ends": 7},
        {"bits": 4, "activation_bits": 4, "ends": 4},
        {"per_channel": False},
        {"dynamic": True},
    ],
)
def test_a_quantized_network_is_whole_numbers_in_the_file(tmp_path: Path, arguments: dict[str, Any]) -> None:
    network, inputs = made("lenet")
    quantized(network, inputs, **arguments)
    path = tmp_path / "n.onnx"
    size = deployment.export(network, inputs[:1], path, "onnx")
    found = deployment.compare(network, deployment.load(path), [inputs, inputs[:1]])
    assert found.share <= 0.02
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert kinds >= ({"DynamicQuantizeLinear", "MatMulInteger"} if arguments.get("dynamic") else {"QuantizeLinear"})
    weights = sum(layer.weight.numel() for layer in network.modules() if hasattr(layer, "weight"))
    stored = {tensor.name: tensor for tensor in onnx.load(str(path)).graph.initializer}
    whole = [tensor for tensor in stored.values() if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1]
    assert len(whole) == len(network.quantization["weights"])
    assert arguments.get("dynamic") or size < weights + 40_000


@pytest.mark.parametrize("name", ["resnet", "timm", "convnet"])
def test_quantized_networks_of_other_shapes(tmp_path: Path, name: str) -> None:
    network, inputs = made(name)
    quantized(network, inputs)
    path = tmp_path / "n.onnx"
    deployment.export(network, inputs[:1], path, "onnx")
    found = deployment.compare(network, deployment.load(path), [inputs])
    assert found.share <= deployment.ROUNDED
    assert found.agreement == 1


class Residual(nn.Module):
    """Its input is a summand of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, 6]`` to ``[B, 6]``."""
        return inputs + self.linear(inputs)


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
@pytest.mark.parametrize("rounds", [False, True])
def test_a_file_leaves_its_input_alone_and_gives_the_same_again(
    tmp_path: Path, form: deployment.Format, rounds: bool
) -> None:
    torch.manual_seed(0)
    network, inputs = Residual().eval(), torch.randn(8, 6)
    if rounds:
        quantized(network, inputs)
    path = tmp_path / f"n{deployment.SUFFIXES[form]}"
    deployment.export(network, inputs[:1], path, form)
    run, before = deployment.load(path), inputs.clone()
    first = run(inputs).clone()
    for _ in range(3):
        assert torch.equal(run(inputs), first)
    assert torch.equal(inputs, before)


def test_an_input_that_is_changed_is_noticed() -> None:
    network, inputs = Residual().eval(), torch.randn(8, 6)
    with pytest.raises(UserError, match="changes its input"):
        deployment.compare(network, lambda given: given.add_(1), [inputs])


def test_a_file_that_differs_is_not_kept(tmp_path: Path) -> None:
    network, inputs = made("mlp")
    other, _ = made("mlp")
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    path = tmp_path / "n.onnx"
    deployment.export(other, inputs[:1], path, "onnx")
    found = deployment.compare(network, deployment.load(path), [inputs])
    with pytest.raises(UserError, match="differs from the network by"):
        found.refuse(path, deployment.EXACT)
    assert not path.exists()


class Unsayable(nn.Module):
    """What it does depends on numbers that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, 6]`` to ``[B, 6]``."""
        return self.linear(inputs) if float(inputs.sum()) > 0 else inputs


def test_what_cannot_be_exported_is_named_and_an_older_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "n.onnx"
    path.write_bytes(b"older")
    with pytest.raises(UserError, match="Unsayable cannot be exported to onnx: "):
        deployment.export(Unsayable(), torch.randn(1, 6), path, "onnx")
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_the_layer_that_cannot_be_exported_is_named(tmp_path: Path, form: deployment.Format) -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), Unsayable()), nn.Linear(6, 2))
    with pytest.raises(UserError, match=rf"Sequential cannot be exported to {form}, because of 1\.1 \(Unsayable\): "):
        deployment.export(network, torch.randn(1, 6), tmp_path / "n", form)


@pytest.mark.parametrize("name", ["n.onnx", "n.pt2", "n.bin"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"n\.(onnx|pt2|bin)"):
        deployment.load(tmp_path / name)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("chain")
    file = folder / "r.yaml"
    file.write_text(
        "data: {name: digits, batch_size: 128}\n"
        "trainer: {max_epochs: 2}\n"
        "stages:\n"
        "  dense: {module: {name: supervised, network: {name: convnet, width: 8}}}\n"
        "  small: {module: {name: quantize, network: {from: dense}}, callbacks: {export: {format: onnx}}}\n"
    )
    return fit(load_recipe(file), out=folder / "runs", fresh=True)


def test_a_stages_figures_are_those_of_the_exported_file(chain: Run) -> None:
    dense, small = (chain.results["stages"][name] for name in ("dense", "small"))
    assert small["file"] == "network.onnx"
    assert small["bytes"] == (chain.stage("small") / "network.onnx").stat().st_size
    assert small["runtime"] == "onnxruntime"
    assert set(small["latency_ms"]) == {"batch_1", "batch_64"}
    assert small["export_difference"] <= deployment.ROUNDED
    assert dense["file"] == "network.safetensors"
    assert small["macs"] == dense["macs"]


@pytest.mark.parametrize("form", ["onnx", "torch_export", "safetensors"])
@pytest.mark.parametrize("stage", ["dense", "small"])
def test_the_command_exports_a_stage(
    chain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: deployment.Format, stage: str
) -> None:
    path = tmp_path / f"n{deployment.SUFFIXES[form]}"
    assert main(["export", f"{chain.folder}/{stage}", "--format", form, "--to", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(path)
    assert said[-2] == f"{path.stat().st_size:,} bytes"
    network = open_stage(Run(chain.folder), stage)[0].module.network.eval()
    if form == "safetensors":
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, network.state_dict()[name]), name
    else:
        assert "decisions alike" in said[0]
        inputs = torch.rand(5, 1, 8, 8)
        assert deployment.compare(network, deployment.load(path), [inputs]).share <= deployment.tolerance(network)


def test_an_unreachable_tolerance_is_refused(chain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "n.onnx"
    asked = ["export", f"{chain.folder}/small", "--to", str(path), "--tolerance", "1e-12"]
    assert main(asked) == 2
    assert "more than 1e-12" in capsys.readouterr().err
    assert not path.exists()


def test_networks_are_timed_side_by_side(chain: Run, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [f"{chain.folder}/{name}" for name in ("dense", "small")]
    assert main(["bench", *stages, "--batch-sizes", "1,4", "--seconds", "0.01", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["network"].rpartition("/")[2], row["format"]) for row in rows] == [
        ("dense", "torch"), ("dense", "onnx"), ("small", "torch"), ("small", "onnx"),
    ]  # fmt: skip
    for row in rows:
        assert row["samples/s@4"] == pytest.approx(4000 / row["ms@4"], rel=0.01)
    assert all(row["bytes"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("option", "value", "said"), [("--formats", "onx", "no 'onx'"), ("--batch-sizes", "1,x", "'x' is no number")]
)
def test_options_of_the_benchmark(
    chain: Run, capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    assert main(["bench", str(chain.folder), option, value]) == 2
    assert said in capsys.readouterr().err
