"""Two domains: which samples are beside each other, what is known of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_sample_images

from lab.batch import UNLABELLED, Labelled, SourceTarget
from lab.datamodules.arrays import Arrays
from lab.datamodules.digits import Digits
from lab.datamodules.domains import Domains, Pairs
from lab.datamodules.loader import Batches, seeded
from lab.datamodules.mnist5k import MNIST5k
from lab.datamodules.mnist_blend import MNISTBlend, blended, patches_of
from lab.datamodules.mnist_digits import MNISTDigits
from lab.errors import UserError
from lab.modules.supervised import Supervised
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.transforms.color import Invert


def ready(data: Domains) -> Domains:
    data.prepare_data()
    data.setup("fit")
    return data


def epoch(data: Domains, number: int = 0) -> list[SourceTarget]:
    loader = data.train_dataloader()
    loader.set_epoch(number)
    return list(loader)


def small(**arguments: Any) -> MNISTDigits:
    return ready(MNISTDigits(**{"batch_size": 100, "size": 8, **arguments}))


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    np.savez(tmp_path / "target.npz", inputs=np.random.default_rng(0).random((100, 1, 8, 8), dtype=np.float32))
    return tmp_path / "target.npz"


# Batches


def test_both_halves_of_every_batch_are_of_one_size_and_the_epoch_is_the_longer_domains() -> None:
    data = small()
    assert (len(data.source.train), len(data.target.train)) == (3500, 1258)
    batches = epoch(data)
    assert [len(batch.source) for batch in batches] == [100] * 35
    assert [len(batch.target) for batch in batches] == [100] * 35
    seen = torch.cat([batch.source.index for batch in batches])
    assert sorted(seen.tolist()) == list(range(3500))


def test_the_shorter_domain_goes_round_in_a_new_order_each_time() -> None:
    data = small()
    places = torch.cat([batch.target.index for batch in epoch(data)])
    first, second = places[:1258], places[1258:2516]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1258))
    assert not torch.equal(first, second)
    again = torch.cat([batch.target.index for batch in epoch(data)])
    other = torch.cat([batch.target.index for batch in epoch(data, 1)])
    assert torch.equal(places, again)
    assert not torch.equal(places, other)


def test_the_source_gives_labelled_samples_alone_and_the_target_all() -> None:
    data = ready(Domains(Digits(labels=200), Digits()))
    batches = epoch(data)
    assert all(bool(batch.source.labelled.all()) for batch in batches)
    assert len(torch.cat([batch.source.index for batch in batches]).unique()) == 200
    assert len(torch.cat([batch.target.index for batch in batches]).unique()) == len(data.target.train)


@pytest.mark.filterwarnings("ignore:.*no labelled samples to test on")
def test_an_unfilled_last_batch_is_left_out_where_either_domain_says_so(unlabelled: Path) -> None:
    for source, target in ((True, False), (False, True)):
        data = Domains(Digits(drop_last=source, batch_size=100), Arrays(unlabelled, drop_last=target, batch_size=100))
        assert {len(batch.target) for batch in epoch(ready(data))} == {100}
    data = Domains(Digits(batch_size=100), Arrays(unlabelled, batch_size=100))
    assert {len(batch.target) for batch in epoch(ready(data))} == {100, 58}


def test_overfitting_is_on_the_same_batches_every_epoch() -> None:
    data = small()
    data.trainer = type("Over", (), {"global_rank": 0, "world_size": 1, "overfit_batches": 2})()
    one, other = (epoch(data, number)[:2] for number in (0, 1))
    for half in ("source", "target"):
        for first, second in zip(one, other, strict=True):
            assert torch.equal(getattr(first, half).index, getattr(second, half).index)


@pytest.mark.filterwarnings("ignore:.*no labelled samples to test on")
def test_the_fingerprint_is_of_both_domains(unlabelled: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", inputs=np.random.default_rng(1).random((100, 1, 8, 8), dtype=np.float32))
    targets = [Arrays(path) for path in (unlabelled, tmp_path / "other.npz", unlabelled)]
    one, other, again = (ready(Domains(Digits(), target)).fingerprint() for target in targets)
    assert one == again != other
    assert ready(Domains(Digits(val_fraction=0.3), targets[0])).fingerprint() != one


def test_the_orders_of_two_domains_of_one_seed_have_nothing_in_common() -> None:
    data = ready(MNISTBlend())
    together = [(batch.source.index == batch.target.index).float().mean() for batch in epoch(data)]
    assert float(torch.stack(together).mean()) < 0.01


def test_an_epoch_goes_on_after_any_batch_where_it_was_left() -> None:
    data = small()
    whole = epoch(data, 3)
    loader = data.train_dataloader()
    loader.set_epoch(3)
    begun = iter(loader)
    for _ in range(17):
        next(begun)
    left = loader.state_dict()
    assert left == {"epoch": 3, "batch": 17}
    later = small().train_dataloader()
    later.load_state_dict(left)
    for one, other in zip(later, whole[17:], strict=True):
        assert torch.equal(one.source.inputs, other.source.inputs)
        assert torch.equal(one.target.inputs, other.target.inputs)
    assert later.state_dict() == {"epoch": 4, "batch": 0}


def test_two_processes_together_see_what_one_sees() -> None:
    data = small(transforms=(Invert(),))
    whole = epoch(data, 2)
    shares = []
    for rank in range(2):
        part = small(batch_size=50, transforms=(Invert(),))
        part.trainer = type("Two", (), {"global_rank": rank, "world_size": 2, "lightning_module": None})()
        shares.append(epoch(part, 2))
    for one, *parts in zip(whole, *shares, strict=True):
        for half in ("source", "target"):
            together = torch.cat([getattr(part, half).inputs for part in parts])
            assert torch.equal(getattr(one, half).inputs, together)


def test_augmentation_is_the_samples_whatever_the_batch_and_another_in_each_domain_and_round() -> None:
    one, other = (epoch(small(transforms=(Invert(),), batch_size=size)) for size in (100, 70))
    for half in ("source", "target"):
        inputs, places = (
            [torch.cat([getattr(getattr(batch, half), part) for batch in batches]) for batches in (one, other)]
            for part in ("inputs", "index")
        )
        assert torch.equal(*places)
        assert torch.equal(*inputs)
    data = small()
    places = torch.cat([batch.target.index for batch in one])
    inverted = (
        (torch.cat([batch.target.inputs for batch in one]) - data.target.train.inputs[places]).abs().amax((1, 2, 3))
    )
    rounds = [dict(zip(places[i * 1258 : (i + 1) * 1258].tolist(), (inverted[i * 1258 : (i + 1) * 1258] > 0).tolist(),
                       strict=True)) for i in range(2)]  # fmt: skip
    agree = sum(rounds[0][place] == rounds[1][place] for place in range(1258)) / 1258
    assert 0.4 < agree < 0.6


def test_the_control_sees_the_same_source_batches() -> None:
    both, source = epoch(small(), 1), epoch(small(train_on="source"), 1)
    for one, other in zip(both, source, strict=True):
        assert isinstance(other, Labelled)
        assert torch.equal(one.source.inputs, other.inputs)
        assert torch.equal(one.source.targets, other.targets)
    target = epoch(small(train_on="target"), 1)
    assert [len(batch) for batch in target] == [len(batch.target) for batch in both]
    assert all(torch.equal(one.target.inputs, other.inputs) for one, other in zip(both, target, strict=True))


def test_no_batch_to_learn_or_select_by_has_a_target_label() -> None:
    data = small()
    for batch in [*epoch(data), *data.val_dataloader(), *map(_as_pair, data.target_inputs())]:
        assert set(batch.target.targets.tolist()) <= {UNLABELLED}
    assert all(bool(batch.source.labelled.all()) for batch in epoch(data))
    assert all(bool(batch.labelled.all()) for batch in data.test_dataloader())


def _as_pair(batch: Labelled) -> SourceTarget:
    return SourceTarget(batch, batch)


def test_validation_has_every_sample_of_both_domains_once() -> None:
    data = small(eval_batch_size=64)
    batches = list(data.val_dataloader())
    assert len(batches) == 8  # 500 in the source, 180 in the target
    for half, size in (("source", 500), ("target", 180)):
        places = torch.cat([getattr(batch, half).index for batch in batches])
        assert places.tolist() == list(range(size))


def test_a_pair_of_loaders_has_a_position_of_its_own() -> None:
    samples = Labelled(torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.int64))
    parts = Batches(samples, 5, shuffle=True), Batches(samples, 5, shuffle=True, seed=1)
    assert len(list(Pairs(*parts))) == 2
    assert [part.state_dict() for part in parts] == [{"epoch": 0, "batch": 0}] * 2
    with pytest.raises(ValueError, match="neither domain has a batch"):
        Pairs(None, None)


# The bundled pairs


def test_a_blend_is_the_distance_of_patch_and_digit_in_every_channel() -> None:
    patches = torch.tensor([[[[200]], [[10]], [[0]]]], dtype=torch.uint8)
    digit = torch.tensor([[[[250]]]], dtype=torch.uint8)
    assert blended(digit, patches).flatten().tolist() == [50, 240, 250]


def test_patches_are_cut_from_the_photos() -> None:
    photos = [torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in load_sample_images().images]
    patches = patches_of(photos, 6, 28, seeded("a test"))
    windows = [photo.unfold(1, 28, 1).unfold(2, 28, 1) for photo in photos]
    for patch in patches:
        corners = [(w[..., 0, 0] == patch[:, 0, 0, None, None]).all(0).nonzero() for w in windows]
        assert any(torch.equal(w[:, y, x], patch) for w, where in zip(windows, corners, strict=True) for y, x in where)


def test_blended_digits_are_other_ones_in_training_validation_and_test_and_patches_are_seeded() -> None:
    data, mnist = ready(MNISTBlend()), MNIST5k()
    mnist.setup("fit")
    seen = {}
    for split in ("train", "val", "test"):
        source, target = getattr(data.source, split), getattr(data.target, split)
        assert torch.equal(source.inputs, getattr(mnist, split).inputs.expand(-1, 3, -1, -1))
        assert torch.equal(source.targets, target.targets)
        assert target.inputs.shape == source.inputs.shape
        seen[split] = {image.numpy().tobytes() for image in target.inputs}
    assert [len(seen[split]) for split in ("train", "val", "test")] == [3500, 500, 1000]
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    same, other = (ready(MNISTBlend(seed=1, patch_seed=seed)).target.test.inputs for seed in (0, 1))
    assert torch.equal(same, data.target.test.inputs)
    assert not torch.equal(other, data.target.test.inputs)


def test_both_directions_have_one_shape() -> None:
    there, back = small(size=16), small(size=16, direction="digits_to_mnist")
    assert there.input_shape == there.target.input_shape == back.input_shape == (1, 16, 16)
    assert torch.equal(there.source.train.inputs, back.target.train.inputs)
    assert torch.equal(there.target.test.inputs, back.source.test.inputs)
    assert len(epoch(back)) == len(epoch(there)) == 35
    assert 0 <= float(there.source.train.inputs.min()) < float(there.source.train.inputs.max()) <= 1


# What is refused


def test_domains_of_other_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"source, Digits, has inputs \(1, 8, 8\), the target, MNIST5k, \(1, 28, 28\)"):
        ready(Domains(Digits(), MNIST5k()))


class Named(Digits):
    """Digits with names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.classes = names


class Fewer(Digits):
    """Digits up to 7."""

    def load(self) -> Labelled:
        digits = super().load()
        return digits[digits.targets < 8]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Named([*"012345678", "cat"]), "only the source has '9', only the target 'cat'"),
        (Named([*"1023456789"]), "their order differs"),
        (Fewer(), "has 10 classes, the target, Fewer, has 8|has 10 classes, the target, Fewer, 8"),
    ],
    ids=["other", "order", "fewer"],
)
def test_domains_of_other_classes_are_named(target: Digits, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ready(Domains(Named([*"0123456789"]), target))


class Nothing(Digits):
    """No images at all."""

    def load(self) -> Labelled:
        return super().load()[:0]


def test_an_empty_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="the target, Nothing, has no training samples"):
        ready(Domains(Digits(), Nothing()))


def test_a_source_without_labels_is_an_error(unlabelled: Path) -> None:
    with pytest.raises(ValueError, match="the source, Arrays, has no labels: they are what is learnt"):
        ready(Domains(Arrays(path=unlabelled), Digits()))


def test_a_target_without_labels_has_no_test_but_validation_inputs(unlabelled: Path) -> None:
    data = Domains(Digits(), Arrays(path=unlabelled))
    with pytest.warns(UserWarning, match="the target, Arrays, has no labelled samples to test on"):
        ready(data)
    assert not data.has_test
    validated = torch.cat([batch.target.inputs for batch in data.val_dataloader()])
    trained = torch.cat([batch.inputs for batch in data.target_inputs()])
    assert (len(validated), len(trained)) == (10, 90)
    everything = {image.numpy().tobytes() for image in torch.cat([validated, trained])}
    assert everything == {image.numpy().tobytes() for image in data.target.train.inputs}
    with (
        pytest.warns(UserWarning, match="test metrics are left out"),
        pytest.raises(ValueError, match="none of the 90 training samples of the target has a label"),
    ):
        epoch(ready(Domains(Digits(), data.target, "target")))


def test_batch_sizes_that_differ_are_an_error_unless_one_is_said() -> None:
    with pytest.raises(ValueError, match="the source's batch_size is 32, the target's 64"):
        Domains(Digits(batch_size=32), Digits())
    assert len(epoch(ready(Domains(Digits(batch_size=32), Digits(), batch_size=16)))[0].target) == 16


def test_a_module_that_learns_from_other_batches_is_told_what_gives_them() -> None:
    data = small()
    module = Supervised(MLP(10, (1, 8, 8), (4,)), Classification(10))
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    with pytest.raises(UserError, match="Supervised learns from Labelled batches: train_on: source, or target, gives"):
        Trainer(**settings, enable_model_summary=False, accelerator="cpu").fit(module, datamodule=data)
