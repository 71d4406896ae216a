"""Networks as files: whole, inert, and refused when they are another network's."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lab.artifact import ArtifactError, Description, Teacher, describe, load_weights, save
from lab.networks.mlp import MLP

SPEC = Description("networks", {"name": "mlp", "num_classes": 3, "input_shape": [4], "hidden": [5]}, {"num_classes": 3})


def network() -> MLP:
    return MLP(num_classes=3, input_shape=(4,), hidden=(5,))


def test_a_saved_network_is_read_back_equal(own_folder: Path) -> None:
    saved, other = network(), network()
    size = save(own_folder, saved, SPEC)
    load_weights(other, own_folder / "network.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))
    assert describe(own_folder) == SPEC
    assert size == (own_folder / "network.safetensors").stat().st_size


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_saved_once_and_stay_tied(own_folder: Path) -> None:
    saved, other = _Tied(), _Tied()
    save(own_folder, saved, SPEC)
    load_weights(other, own_folder / "network.safetensors")
    assert torch.equal(saved.head.weight, other.head.weight)
    assert other.head.weight is other.embedding.weight


def test_weights_of_another_shape_are_refused_with_both_shapes(own_folder: Path) -> None:
    save(own_folder, MLP(num_classes=3, input_shape=(4,), hidden=(9,)), SPEC)
    with pytest.raises(ArtifactError, match=r"another network: .*\(9, 4\) instead of \(5, 4\)"):
        load_weights(network(), own_folder / "network.safetensors")


def test_nothing_is_loaded_when_anything_differs(own_folder: Path) -> None:
    save(own_folder, MLP(num_classes=7, input_shape=(4,), hidden=(5,)), SPEC)
    target = network()
    before = [parameter.clone() for parameter in target.parameters()]
    with pytest.raises(ArtifactError):
        load_weights(target, own_folder / "network.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))


def test_a_truncated_file_is_refused_by_name(own_folder: Path) -> None:
    save(own_folder, network(), SPEC)
    path = own_folder / "network.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"network\.safetensors cannot be read"):
        load_weights(network(), path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "callbacks", "component": {}, "facts": {}}'])
def test_a_damaged_description_is_refused_by_name(own_folder: Path, text: str) -> None:
    (own_folder / "network.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"network\.json is damaged"):
        describe(own_folder)


def test_a_failed_write_leaves_the_earlier_file(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(own_folder, network(), SPEC)
    before = (own_folder / "network.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(own_folder, network(), SPEC)
    assert (own_folder / "network.safetensors").read_bytes() == before
    assert sorted(path.name for path in own_folder.iterdir()) == ["network.json", "network.safetensors"]


def test_a_teacher_stays_in_eval_mode_and_gives_no_gradient() -> None:
    asked = network().train()
    teacher = Teacher(asked)
    holder = nn.Module()
    holder.teacher = teacher
    holder.train()
    assert not asked.training
    assert not teacher(torch.rand(2, 4, requires_grad=True)).requires_grad
    assert list(holder.parameters()) == []


def test_the_description_is_plain_json(own_folder: Path) -> None:
    save(own_folder, network(), SPEC)
    assert json.loads((own_folder / "network.json").read_text())["component"]["name"] == "mlp"
