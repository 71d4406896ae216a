"""What every network keeps, whatever its architecture: its head, its seed, its gradients, its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab import artifact
from lab.build import Builder
from lab.check import component
from lab.document import Place

IMAGES = {"num_classes": 7, "in_channels": 2}
TEXTS = {"num_classes": 3, "vocab_size": 50, "input_shape": [12]}
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 20}  # fmt: skip

NETWORKS: list[dict[str, Any]] = [
    {"name": "convnet", "width": 4, **IMAGES},
    {"name": "convnet", "width": 4, "separable": True, **IMAGES},
    {"name": "mlp", "num_classes": 7, "input_shape": [2, 28, 28], "hidden": [8]},
    {"name": "lenet", "num_classes": 7, "input_shape": [2, 28, 28]},
    {"name": "ganin", "num_classes": 7, "input_shape": [2, 28, 28], "width": 4, "batch_norm": True},
    {"name": "conv4", "width": 4, "num_classes": 7, "input_shape": [2, 28, 28]},
    {"name": "resnet", "depth": 8, "width": 4, **IMAGES},
    {"name": "vgg", "width": 2, **IMAGES},
    {"name": "nin", "width": 12, **IMAGES},
    {"name": "googlenet", "width": 4, **IMAGES},
    {"name": "alexnet", "width": 3, **IMAGES},
    {"name": "timm", "model": "test_resnet", "input_shape": [2, 28, 28], **IMAGES},
    {"name": "timm", "model": "test_vit3", "input_shape": [2, 28, 28], "mean": [0.5], "std": [0.25], **IMAGES},
    {"name": "transformer", "width": 8, "depth": 2, **TEXTS},
    {"name": "transformer", "width": 8, "depth": 2, "pool": "cls", **TEXTS},
    {"name": "transformers", "config": BERT, **TEXTS},
]

CLASSICS = [spec for spec in NETWORKS if "in_channels" in spec and "model" not in spec]

networks = pytest.mark.parametrize("spec", NETWORKS, ids=lambda spec: f"{spec['name']}-{list(spec.values())[2]}")


def built(spec: dict[str, Any], seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A network, and what its ``network.json`` says of it."""
    found = component("networks", spec, Place("a test"))
    builder = Builder(seed)
    network: nn.Module = builder.build(found)
    return network, builder.spec(found)


def inputs(spec: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if "vocab_size" in spec:
        return torch.randint(3, 50, (5, 12), generator=generator)
    return torch.rand(5, 2, 28, 28, generator=generator)


@networks
def test_the_outputs_are_the_head_of_the_features(spec: dict[str, Any]) -> None:
    network = built(spec)[0].eval()
    x = inputs(spec)
    features = network.features(x)
    assert features.ndim == 2
    assert network(x).shape == (5, spec["num_classes"])
    assert torch.allclose(network(x), network.head(features), rtol=1e-5, atol=1e-6)
    assert any(module is network.head for module in network.modules())


@networks
def test_the_weights_are_the_seeds(spec: dict[str, Any]) -> None:
    one, same, other = (built(spec, seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@networks
def test_every_parameter_gets_a_gradient(spec: dict[str, Any]) -> None:
    network = built(spec)[0]
    torch.nn.functional.cross_entropy(network(inputs(spec)), torch.arange(5) % 3).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@networks
def test_a_saved_network_is_built_again_from_its_files(spec: dict[str, Any], tmp_path: Path) -> None:
    network, description = built(spec)
    network(inputs(spec))  # moves what normalisation remembers
    artifact.save(tmp_path, network, artifact.Description("networks", description))
    again = built(artifact.describe(tmp_path).component, seed=1)[0]
    artifact.load_weights(again, tmp_path / artifact.WEIGHTS)
    assert torch.equal(again.eval()(inputs(spec)), network.eval()(inputs(spec)))


@networks
def test_what_it_is_given_is_left_as_it_was(spec: dict[str, Any]) -> None:
    x = inputs(spec)
    built(spec)[0](x)
    assert torch.equal(x, inputs(spec))


@pytest.mark.parametrize("size", [(24, 24), (28, 28), (32, 32), (24, 40), (9, 8)])
@pytest.mark.parametrize(
    "spec",
    [spec for spec in NETWORKS if set(IMAGES) < set(spec) and "model" not in spec],
    ids=lambda spec: spec["name"],
)
def test_the_classics_take_images_of_any_size(spec: dict[str, Any], size: tuple[int, int]) -> None:
    network = built({**spec, "in_channels": 3})[0].eval()
    assert network(torch.rand(2, 3, *size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet", "vgg", "nin", "googlenet", "alexnet"])
@pytest.mark.parametrize("wrong", ["width", "num_classes", "in_channels"])
def test_sizes_below_one_are_refused_by_name(name: str, wrong: str) -> None:
    with pytest.raises(Exception, match=wrong):
        built({"name": name, **IMAGES, wrong: 0})
