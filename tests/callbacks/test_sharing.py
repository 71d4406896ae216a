"""Weights that share few values: how these are found, how they learn, and how a file keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lab import Run, artifact, fit, load_recipe, sharing, sparsity
from lab.assemble import open_stage
from lab.cli import main
from lab.networks.lenet import LeNet


def chain(folder: Path, *, pruned: bool = False, clusters: int = 16) -> Any:
    file = folder / "r.yaml"
    first = "{name: prune, sparsity: 0.8, schedule: one_shot, " if pruned else "{name: supervised, "
    file.write_text(
        "data: {name: digits, batch_size: 128}\n"
        "trainer: {max_epochs: 4}\n"
        "stages:\n"
        f"  dense: {{module: {first}network: {{name: mlp, hidden: [32]}}}}}}\n"
        "  small:\n"
        "    module: {name: supervised, network: {from: dense}}\n"
        f"    callbacks: {{sharing: {{clusters: {clusters}}}}}\n"
        "  on: {module: {name: finetune, network: {from: small}}}\n"
    )
    return load_recipe(file)


def test_means_are_those_of_their_members_and_no_value_is_nearer_to_another() -> None:
    torch.manual_seed(0)
    values = torch.randn(5000).double()
    means, codes = sharing.clusters(values, 16)
    assert torch.equal(means, means.sort().values)
    for code in range(16):
        members = values[codes == code]
        if len(members):
            assert float(members.mean() - means[code]) == pytest.approx(0, abs=1e-12)
    assert torch.equal((values[:, None] - means).abs().argmin(1), codes)


def test_as_many_means_as_values_are_those_values() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(5)
    means, codes = sharing.clusters(values, 4)
    assert torch.equal(means[codes], values)


def test_the_gradient_of_a_value_is_the_sum_of_its_members() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 5).double(), torch.randn(7, 6).double()
    sharing.share(nn.ModuleDict({"layer": layer}), ["layer"], 4)
    part = layer.parametrizations["weight"][0]
    weight = part(layer.weight).detach().requires_grad_()
    nn.functional.linear(inputs, weight, layer.bias).square().sum().backward()
    layer(inputs).square().sum().backward()
    for code in range(4):
        expected = weight.grad[part.codes == code].sum()
        assert float(part.book.grad[code] - expected) == pytest.approx(0, abs=1e-9 * float(expected.detach().abs() + 1))


@pytest.mark.parametrize("k", [2, 3, 16, 100, 256])
def test_a_file_holds_the_same_weights_in_fewer_bits(tmp_path: Path, k: int) -> None:
    torch.manual_seed(0)
    network = LeNet(10, (1, 28, 28))
    sharing.share(network, sparsity.layers_of(network), k)
    sharing.settle(network)
    size = artifact.save(tmp_path, network, artifact.Description("networks", {"name": "lenet"}))
    again = LeNet(10, (1, 28, 28))
    artifact.load_weights(again, tmp_path / artifact.WEIGHTS)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert size < 4 * sum(tensor.numel() for tensor in network.state_dict().values()) + 4096


def test_a_network_has_few_values_after_training_and_is_tested_as_it_is_saved(tmp_path: Path) -> None:
    run = fit(chain(tmp_path), fresh=True)
    dense, small = (run.results["stages"][name] for name in ("dense", "small"))
    assert small["shared_values"] <= 16
    assert small["bytes"] < 0.3 * dense["bytes"]
    assert small["metrics"]["test/accuracy"] > dense["metrics"]["test/accuracy"] - 0.03
    again, trainer = open_stage(Run(run.folder), "small")
    (metrics,) = trainer.test(again.module, datamodule=again.data, verbose=False)
    assert metrics["test/accuracy"] == small["metrics"]["test/accuracy"]
    before = run.stage("dense") / artifact.WEIGHTS
    moved = load_file(before)["head.weight"]
    assert len(moved.unique()) > 256


def test_weights_that_are_gone_stay_gone(tmp_path: Path) -> None:
    run = fit(chain(tmp_path, pruned=True), fresh=True)
    dense, small = (run.results["stages"][name] for name in ("dense", "small"))
    assert small["nonzero_parameters"] <= dense["nonzero_parameters"]
    assert small["shared_values"] <= 16


def test_a_training_that_is_left_goes_on_the_same(tmp_path: Path) -> None:
    chain(tmp_path)
    assert main(["verify-resume", str(tmp_path / "r.yaml")]) == 0


@pytest.mark.parametrize("fault", ["book", "codes", "short"])
def test_a_damaged_file_is_refused(tmp_path: Path, fault: str) -> None:
    network = LeNet(10, (1, 28, 28))
    sharing.share(network, ["head"], 5)
    sharing.settle(network)
    artifact.save(tmp_path, network, artifact.Description("networks", {"name": "lenet"}))
    file = tmp_path / artifact.WEIGHTS
    saved = load_file(file)
    if fault == "book":
        del saved["head.weight#book"]
    elif fault == "codes":
        saved["head.weight#codes"].fill_(255)
    else:
        saved["head.weight#codes"] = saved["head.weight#codes"][:-1].clone()
    save_file(saved, file)
    with pytest.raises(artifact.ArtifactError, match=r"head\.weight"):
        artifact.load_weights(LeNet(10, (1, 28, 28)), file)
