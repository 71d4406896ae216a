from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from lab import artifact, fit, load_recipe
from lab.assemble import _prefixes, open_stage
from lab.build import Builder
from lab.check import component
from lab.document import Place, RecipeError
from lab.networks.timm import Timm
from lab.types import check_types

MODEL = "test_resnet"
MEAN, STD = (torch.tensor(getattr(timm.get_pretrained_cfg(MODEL), name)) for name in ("mean", "std"))
COLOURS = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def source(model: str = MODEL, classes: int = 9, **arguments: Any) -> Any:
    """A model of timm, as timm makes it, with weights that no other has."""
    torch.manual_seed(7)
    return timm.create_model(model, num_classes=classes, **arguments).eval()


def written(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def expected(model: Any) -> Tensor:
    return model((COLOURS - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_a_weight_file_gives_timms_own_outputs_on_images_in_0_1(tmp_path: Path, suffix: str) -> None:
    model = source()
    network = Timm(9, 3, MODEL, weights=written(tmp_path / f"w{suffix}", model.state_dict())).eval()
    assert torch.allclose(network(COLOURS), expected(model), atol=1e-5)


@pytest.mark.parametrize("prefix", ["module.", "model.", "network.", "network.model.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", ["", "state_dict", "model", "state_dict_ema"])
def test_what_training_programs_put_around_weights_is_taken_off(tmp_path: Path, prefix: str, nested: str) -> None:
    model = source()
    state: Any = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    if nested:
        state = {nested: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    network = Timm(9, 3, MODEL, weights=written(tmp_path / "w.pth", state)).eval()
    assert torch.allclose(network(COLOURS), expected(model), atol=1e-5)


def test_tensors_with_other_names_are_taken_in_their_order_and_that_is_said(tmp_path: Path) -> None:
    model = source()
    state = {f"t{at}": value for at, value in enumerate(model.state_dict().values())}
    with pytest.warns(UserWarning, match=f"w.pth: its {len(state)} tensors have other names .* in their order"):
        network = Timm(9, 3, MODEL, weights=written(tmp_path / "w.pth", state)).eval()
    assert torch.allclose(network(COLOURS), expected(model), atol=1e-5)


def test_tensors_with_other_names_and_another_order_are_refused(tmp_path: Path) -> None:
    state = {f"t{at}": value for at, value in enumerate(reversed(source().state_dict().values()))}
    with pytest.raises(ValueError, match=r"w.pth: has the weights of another network: .*: missing; .* and \d+ more"):
        Timm(9, 3, MODEL, weights=written(tmp_path / "w.pth", state))


@pytest.mark.parametrize("renamed", [False, True])
def test_a_classifier_of_other_classes_starts_anew_and_that_is_said(tmp_path: Path, renamed: bool) -> None:
    model = source()
    state = model.state_dict()
    if renamed:
        state = {f"t{at}": value for at, value in enumerate(state.values())}
    with pytest.warns(UserWarning, match="its 9 classes are not the data's 4: the classifier starts anew"):
        network = Timm(4, 3, MODEL, weights=written(tmp_path / "w.pth", state))
    assert network.head.weight.shape[0] == 4
    own = network.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items() if not key.startswith("fc"))


def test_a_first_convolution_for_colours_is_adapted_to_grey_images(tmp_path: Path) -> None:
    model = source()
    with pytest.warns(UserWarning, match="adapted from 3 channels to 1"):
        network = Timm(9, 1, MODEL, weights=written(tmp_path / "w.pth", model.state_dict())).eval()
    grey = COLOURS[:, :1]
    normalised = (grey - MEAN.mean()) / STD.mean()
    assert torch.allclose(network(grey), model(normalised.expand(-1, 3, -1, -1)), atol=1e-4)


def test_a_vits_positions_are_resampled_to_the_images_size(tmp_path: Path) -> None:
    file = written(tmp_path / "w.pth", source("test_vit").state_dict())
    network = Timm(9, 3, "test_vit", input_shape=(3, 64, 64), weights=file).eval()
    assert network(COLOURS).shape == (4, 9)
    assert network.model.pos_embed.shape[1] == 4 * 4 + 1


def test_another_networks_weights_are_refused_with_the_first_differences(tmp_path: Path) -> None:
    state = source().state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:, :2]
    del state["layer2.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight: \(.*\) instead of \(.*\); layer2.0.*: missing"):
        Timm(9, 3, MODEL, weights=written(tmp_path / "w.pth", state))


def test_weights_without_counters_of_old_versions_are_taken(tmp_path: Path) -> None:
    model = source()
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    network = Timm(9, 3, MODEL, weights=written(tmp_path / "w.pth", state)).eval()
    assert torch.allclose(network(COLOURS), expected(model), atol=1e-5)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no weight file"), (b"no weights", "cannot be read as weights alone"), ({"a": 1}, "no weights")],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: Any, said: str, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        torch.save(content, file)
        said = said if suffix == ".pth" else "cannot be read"
    with pytest.raises(ValueError, match=said):
        Timm(9, 3, MODEL, weights=file)


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def test_code_in_a_weight_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        Timm(9, 3, MODEL, weights=tmp_path / "w.pth")
    assert not Path("harm").exists()


def test_pretrained_weights_are_timms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source(classes=1000)
    file = written(tmp_path / "w.pth", model.state_dict())
    load = timm.models._builder.load_state_dict_from_hf
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: torch.load(file))
    assert load is not timm.models._builder.load_state_dict_from_hf
    network = Timm(1000, 3, MODEL, pretrained=True).eval()
    assert torch.allclose(network(COLOURS), expected(model), atol=1e-5)
    found = network.rebuild()
    assert found["pretrained"] is False
    assert torch.allclose(torch.tensor(found["mean"]), MEAN)


def test_without_weights_images_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    network = Timm(9, 3, MODEL).eval()
    assert torch.equal(network(COLOURS), network.model(COLOURS))
    assert network.rebuild()["mean"] is None


def test_mean_and_std_can_be_said() -> None:
    network = Timm(9, 3, MODEL, mean=(0.5,), std=(0.25, 0.5, 1.0)).eval()
    by_hand = (COLOURS - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1)
    assert torch.allclose(network(COLOURS), network.model(by_hand), atol=1e-6)
    with pytest.raises(ValueError, match="mean has 2 values, the images have 3 channels"):
        Timm(9, 3, MODEL, mean=(0.5, 0.5))


def test_the_weights_have_timms_names() -> None:
    assert set(Timm(9, 3, MODEL, mean=(0.5,)).state_dict()) == {f"model.{key}" for key in source().state_dict()}


def test_other_arguments_reach_timm() -> None:
    network = Timm(9, 3, "test_vit", drop_rate=0.1, drop_path_rate=0.2, options={"global_pool": "avg"})
    assert network.model.global_pool == "avg"
    assert network.model.head_drop.p == 0.1
    assert network.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"options": {"in_chans": 1}}, "options: in_chans is in_channels here"),
        ({"options": {"no_such": 1}}, "unexpected keyword argument 'no_such'"),
        ({"input_shape": (3, 8)}, r"images \(C, H, W\), the inputs have shape \(3, 8\)"),
        ({"model": "test_vit", "input_shape": (3, 28, 28)}, r"test_vit with inputs .*28 by 28|divisible|patch"),
        ({"model": "test_convnext", "input_shape": (3, 28, 28)}, r"test_convnext with inputs \(3, 28, 28\)"),
        ({"pretrained": True, "weights": "w.pth"}, "either pretrained: true or weights"),
        ({"model": "resnet26t.no_such"}, "no timm model of this name .*did you mean"),
        ({"model": "hf-hub:some/model"}, "no timm model of this name"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Timm(**{"num_classes": 9, "in_channels": 3, "model": MODEL, **arguments})


def test_an_unknown_model_is_an_error_of_the_recipe_with_its_place_and_the_nearest_names(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("data: digits\nmodule:\n  name: supervised\n  network: {name: timm, model: resnt18}\n")
    with pytest.raises(RecipeError) as caught:
        check_types(load_recipe(file))
    (problem,) = caught.value.problems
    assert (problem.place.line, problem.key) == (4, "module.network.model")
    assert "did you mean" in problem.message
    assert "'resnet18'" in problem.message


@pytest.mark.parametrize("model", ["test_resnet", "deit_tiny_distilled_patch16_224"])
def test_its_head_is_reset_whatever_its_name_is(model: str) -> None:
    network = Timm(9, 3, model)
    heads = {"test_resnet": {"model.fc."}, "deit_tiny_distilled_patch16_224": {"model.head.", "model.head_dist."}}
    assert set(_prefixes(network, network.head)) == heads[model]


def test_a_stage_is_used_and_continued_when_its_weight_file_is_gone(tmp_path: Path) -> None:
    images = numpy.random.default_rng(0).random((60, 1, 32, 32), dtype=numpy.float32)
    numpy.savez(tmp_path / "two.npz", inputs=images, targets=numpy.arange(60) % 2)
    numpy.savez(tmp_path / "three.npz", inputs=images, targets=numpy.arange(60) % 3)
    file = written(tmp_path / "w.pth", source(classes=2, in_chans=1).state_dict())
    network = {"name": "timm", "model": MODEL, "weights": str(file)}
    recipe = {
        "data": {"name": "arrays", "path": str(tmp_path / "two.npz")},
        "trainer": {"max_epochs": 1},
        "callbacks": {"progress": None},
        "module": {"name": "supervised", "network": network},
    }
    run = fit(recipe)
    (stage,) = run.results["stages"]
    saved = artifact.describe(run.stage(stage))
    assert saved.component["weights"] is None
    assert torch.allclose(torch.tensor(saved.component["mean"]), MEAN.mean())
    file.unlink()

    again = Builder(0).build(component("networks", saved.component, Place("saved")))
    artifact.load_weights(again, run.stage(stage) / artifact.WEIGHTS)
    opened, trainer = open_stage(run, None)
    (metrics,) = trainer.test(opened.module, datamodule=opened.data, verbose=False)
    assert metrics["test/accuracy"] == run.results["stages"][stage]["metrics"]["test/accuracy"]
    assert all(torch.equal(value, opened.network.state_dict()[key]) for key, value in again.state_dict().items())

    going_on = {
        **recipe,
        "data": {"name": "arrays", "path": str(tmp_path / "three.npz")},
        "module": {"name": "supervised", "network": {"from": f"{run.folder}/{stage}", "head": "reset"}},
    }
    second = fit(going_on)
    described = json.loads((second.stage(stage) / "network.json").read_text())["component"]
    assert described["num_classes"] == 3
    assert described["mean"] == saved.component["mean"]
