"""Draws, batch transforms against torchvision's on the same numbers, mixings, and how loaders apply them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2

from lab.batch import Labelled
from lab.datamodules.digits import Digits
from lab.datamodules.loader import Batches, Streamed
from lab.transforms import Augmentation, BatchTransform, Draw, Transform
from lab.transforms.color import ColorJitter, Grayscale, Invert, grey
from lab.transforms.geometry import Affine, Crop, Erasing, Flip, ResizedCrop
from lab.transforms.mix import CutMix, Mixup
from lab.transforms.tokens import TokenDropout

PHOTOS = torch.stack([torch.tensor(photo).permute(2, 0, 1) for photo in load_sample_images().images])
BATCH = PHOTOS[:, :, :96, :128].float().div(255).repeat(3, 1, 1, 1)
ALL: list[Any] = [
    Flip(0.5, 0.5), Crop(3), Crop(3, "reflect"), ResizedCrop(), ResizedCrop(24), Affine(20, 0.2, (0.7, 1.3), 10),
    Erasing(1.0), ColorJitter(hue=0.2), Grayscale(0.5), Invert(), v2.RandAugment(), v2.RandomPerspective(p=1.0),
]  # fmt: skip


def draw(count: int = len(BATCH), *key: int) -> Draw:
    return Draw(torch.arange(count), *key)


def augmented(transform: Transform, inputs: Tensor, samples: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
    return Augmentation([transform], seed, None).transformed(inputs, samples, epoch)


def test_draws_are_uniform_and_unrelated_over_samples_calls_places_and_keys() -> None:
    several = [draw(4000, key).at(place).uniform(2) for key in range(3) for place in range(3)]
    columns = torch.cat(several, 1).double()
    for column in columns.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 5 / 4000**0.5
    lagged = torch.corrcoef(torch.stack([columns[:-1, 0], columns[1:, 0]]))[0, 1]
    assert lagged.abs() < 5 / 4000**0.5
    later = draw(4000)
    assert torch.corrcoef(torch.stack([later.uniform(), later.uniform()]))[0, 1].abs() < 5 / 4000**0.5


def test_a_samples_numbers_do_not_depend_on_its_batch() -> None:
    whole = draw(10, 7).uniform(3)
    assert torch.equal(Draw(torch.tensor([9, 2]), 7).uniform(3), whole[[9, 2]])
    assert not torch.equal(draw(10, 8).uniform(3), whole)


@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
def test_what_a_sample_becomes_is_a_function_of_seed_epoch_and_index_alone(transform: Transform) -> None:
    torch.manual_seed(1)
    before, inputs = torch.random.get_rng_state(), BATCH.clone()
    whole = augmented(transform, BATCH, torch.arange(6))
    torch.random.manual_seed(2)
    torch.random.set_rng_state(before)
    some = torch.tensor([4, 1])
    torch.testing.assert_close(augmented(transform, BATCH[some], some), whole[some])
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state was moved"
    assert torch.equal(BATCH, inputs), "the inputs were changed in place"
    epochs = torch.stack([augmented(transform, BATCH, torch.arange(6), epoch=epoch) for epoch in range(4)])
    seeds = torch.stack([augmented(transform, BATCH, torch.arange(6), seed=seed) for seed in range(4)])
    assert (epochs[0] != epochs[1:]).any()
    assert (seeds[0] != seeds[1:]).any()
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_flips_and_crops_are_torchvisions_at_the_places_that_were_drawn() -> None:
    flipped = Flip(0.5, 0.5)(BATCH, draw())
    options = [BATCH, BATCH.flip(-1), BATCH.flip(-2), BATCH.flip(-1).flip(-2)]
    assert all(any(torch.equal(image, option[i]) for option in options) for i, image in enumerate(flipped))
    assert torch.equal(Flip(1.0)(BATCH, draw()), BATCH.flip(-1))
    cropped = Crop(2)(BATCH, draw())
    places = {(top, left) for top in range(5) for left in range(5)}
    for image, result in zip(BATCH, cropped, strict=True):
        padded = reference.pad(image, [2])
        assert any(torch.equal(reference.crop(padded, *place, *image.shape[1:]), result) for place in places)
    tops = (Draw(torch.arange(5000)).uniform(2) * 5).long()
    assert stats.chisquare(tops[:, 0].bincount()).pvalue > 1e-4


class Given(Draw):
    """Draws that are told: each call of ``uniform`` gives the next of these numbers to every sample."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def __len__(self) -> int:
        return len(BATCH)

    def uniform(self, *shape: int) -> Tensor:
        count = int(torch.Size(shape).numel())
        numbers, self.numbers = self.numbers[:count], self.numbers[count:]
        return torch.tensor(numbers).reshape(shape).expand(len(BATCH), *shape)


@pytest.mark.parametrize(
    ("angle", "shear", "scale", "shift"),
    [(30.0, 0.0, 1.0, (0, 0)), (0.0, 15.0, 1.0, (0, 0)), (-20.0, 0.0, 1.25, (8, -4)), (10.0, -10.0, 0.8, (-3, 6))],
)
def test_an_affine_map_is_torchvisions(angle: float, shear: float, scale: float, shift: tuple[int, int]) -> None:
    height, width = BATCH.shape[-2:]
    moved = [0.5 + shift[0] / width, 0.5 + shift[1] / height]
    turned, slanted = (angle + 90) / 180, (shear + 45) / 90
    result = Affine(90, 0.5, (scale, scale), 45)(BATCH, Given(turned, slanted, 0.0, *moved))
    expected = reference.affine(
        BATCH, angle, list(shift), scale, [shear, 0.0], interpolation=v2.InterpolationMode.BILINEAR
    )
    inner = (slice(None), slice(None), slice(30, 66), slice(30, 98))
    torch.testing.assert_close(result[inner], expected[inner], atol=2e-2, rtol=0)


def test_colours_are_torchvisions_for_the_factors_that_were_drawn() -> None:
    brighter, stronger, purer = 1.3, 0.6, 1.4
    unit = [(factor - 0.5) / 1.0 for factor in (brighter, stronger, purer)]
    result = ColorJitter(0.5, 0.5, 0.5)(BATCH, Given(*unit, 0.5))
    expected = reference.adjust_brightness(BATCH, brighter)
    expected = reference.adjust_contrast(expected, stronger)
    expected = reference.adjust_saturation(expected, purer)
    torch.testing.assert_close(result, expected, atol=2e-3, rtol=0)
    turned = ColorJitter(0, 0, 0, 0.5)(torch.eye(3).reshape(1, 3, 1, 3).repeat(6, 1, 1, 1), Given(0, 0, 0, 5 / 6))
    expected_turn = torch.eye(3)[[1, 2, 0]]  # a third of the circle: red becomes green, green blue
    torch.testing.assert_close(turned[0, :, 0].T, expected_turn, atol=1e-5, rtol=0)
    one = BATCH[:, :1]
    assert ColorJitter(0.5, 0.5, 0.5, 0.1)(one, draw()).shape == one.shape
    with pytest.raises(ValueError, match="3 channels, or 1; these have 2"):
        Grayscale(1.0)(BATCH[:, :2], draw())


def test_grey_keeps_the_luma_and_inversion_is_its_own_inverse() -> None:
    torch.testing.assert_close(Grayscale(1.0)(BATCH, draw()), reference.rgb_to_grayscale(BATCH, 3), atol=1e-3, rtol=0)
    assert grey(BATCH).shape == (6, 1, 96, 128)
    torch.testing.assert_close(Invert(1.0)(Invert(1.0)(BATCH, draw()), draw()), BATCH)


def test_a_resized_crop_of_all_is_the_image_and_of_a_part_a_part() -> None:
    same = ResizedCrop(scale=(1.0, 1.0), ratio=(128 / 96, 128 / 96))(BATCH, draw())
    torch.testing.assert_close(same, BATCH, atol=1e-4, rtol=0)
    ramp = torch.linspace(0, 1, 64).expand(6, 1, 64, 64)
    part = ResizedCrop(scale=(0.25, 0.25), ratio=(1.0, 1.0))(ramp, draw())
    span = part[:, 0, 0, -1] - part[:, 0, 0, 0]
    torch.testing.assert_close(span, torch.full((6,), 0.5), atol=0.02, rtol=0)
    assert ResizedCrop(24)(BATCH, draw()).shape == (6, 3, 24, 24)


def test_erasing_paints_a_part_within_the_range() -> None:
    erased = Erasing(1.0, (0.1, 0.3), (0.5, 2.0), 7.0)(BATCH, draw())
    part = (erased == 7).float().mean((1, 2, 3))
    assert ((part > 0.09) & (part < 0.31)).all()
    assert torch.equal(erased[erased != 7], BATCH[erased != 7])
    assert torch.equal(Erasing(0.0)(BATCH, draw()), BATCH)


@pytest.mark.parametrize("mixing", [Mixup(0.4), CutMix(1.0)])
def test_a_blend_has_as_much_of_each_target_as_of_each_input(mixing: Any) -> None:
    inputs = torch.cat([torch.zeros(3, 1, 32, 32), torch.ones(3, 1, 32, 32)])
    targets = torch.tensor([0, 0, 0, 1, 1, 1])
    samples = torch.arange(6)
    blended, soft = Augmentation([mixing], 0, 2).mixed((inputs, targets), (inputs.flip(0), targets.flip(0)), samples, 0)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    torch.testing.assert_close(blended.mean((1, 2, 3)), soft[:, 1])
    assert ((soft > 0) & (soft < 1)).any()


def test_mixups_shares_have_the_beta_distribution() -> None:
    ones = torch.ones(4000, 1)
    shares = Mixup(0.3)(ones, 0 * ones, draw(4000))[1]
    assert stats.kstest(shares.double().numpy(), stats.beta(0.3, 0.3).cdf).pvalue > 1e-4


def test_mixings_take_turns_and_unknown_targets_stay_unknown() -> None:
    targets = torch.zeros(1000, dtype=torch.long)
    targets[0] = -1
    inputs = torch.cat([torch.zeros(500, 1, 4, 4), torch.ones(500, 1, 4, 4)])
    both = Augmentation([Mixup(8.0), CutMix(1.0, p=0.5)], 0, 3)
    blended, soft = both.mixed((inputs, targets), (inputs.flip(0), targets.flip(0)), torch.arange(1000), 0)
    assert soft[0].isnan().all()
    between = ((blended > 0) & (blended < 1)).flatten(1).any(1)
    assert 430 < between.sum() < 570, "half of the samples should be mixed up"
    cut = ~between & (blended != inputs).flatten(1).any(1)
    assert 150 < cut.sum() < 250, "a quarter should be cut, but for rectangles of no pixel or all"


def served(loader: Batches | Streamed, epochs: int = 2) -> list[Labelled]:
    return [batch for _ in range(epochs) for batch in loader]


def numbered(count: int) -> Labelled:
    images = torch.arange(count * 36, dtype=torch.float32).reshape(count, 1, 6, 6) / (count * 36)
    return Labelled(images, torch.arange(count) % 3)


TRANSFORMS: list[Any] = [Crop(1), Flip(), Mixup(0.5)]


@settings(deadline=None, max_examples=40)
@given(count=st.integers(4, 40), share=st.integers(1, 5), ranks=st.integers(1, 3))
def test_augmented_processes_together_see_what_one_process_sees(count: int, share: int, ranks: int) -> None:
    count = max(count, share * ranks)
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "augmentation": Augmentation(TRANSFORMS, 3, 3)}
    alone = served(Batches(numbered(count), share * ranks, **options))
    each = [served(Batches(numbered(count), share, rank=r, world_size=ranks, **options)) for r in range(ranks)]
    for batch, parts in zip(alone, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(torch.cat([part.inputs for part in parts]), batch.inputs)
        torch.testing.assert_close(torch.cat([part.targets for part in parts]), batch.targets)


def test_a_sample_that_comes_again_in_an_epoch_is_augmented_otherwise() -> None:
    options: dict[str, Any] = {"among": torch.tensor([5]), "length": 8, "augmentation": Augmentation([Crop(2)], 0, 3)}
    batch = next(iter(Batches(numbered(8), 8, shuffle=True, **options)))
    assert batch.index.tolist() == [5] * 8
    assert len(batch.inputs.unique(dim=0)) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_serve_what_memory_serves_also_from_the_middle(workers: int) -> None:
    options: dict[str, Any] = {"shuffle": True, "seed": 5, "augmentation": Augmentation(TRANSFORMS, 1, 3)}
    expected = served(Batches(numbered(20), 6, **options))
    streamed = Streamed(numbered(20), 6, num_workers=workers, **options)
    got = served(streamed)
    streamed.load_state_dict({"epoch": 1, "batch": 2})
    got_again = list(streamed)
    for one, other in zip([*expected, *expected[6:]], [*got, *got_again], strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.index, other.index)


def test_training_inputs_are_augmented_and_those_to_judge_by_are_not() -> None:
    data = Digits(transforms=(Crop(1),))
    data.setup()
    plain = Digits()
    plain.setup()
    assert data.fixed_train_inputs() is None
    assert any(
        not torch.equal(one.inputs, other.inputs)
        for one, other in zip(data.train_dataloader(), plain.train_dataloader(), strict=True)
    )
    for one, other in zip(data.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(one.inputs, other.inputs)


def test_a_transform_of_ones_own_is_a_callable_on_one_image() -> None:
    def noisy(image: Tensor) -> Tensor:
        return image + torch.rand_like(image)

    result = augmented(noisy, BATCH, torch.arange(6))
    assert len({float(noise) for noise in (result - BATCH)[:, 0, 0, 0]}) == 6
    assert isinstance(Flip(), BatchTransform)


def test_dropped_tokens_are_unknown_padding_stays_and_a_token_has_its_own_chance() -> None:
    ids = torch.arange(2, 52).repeat(400, 1)
    ids[:, 40:] = 0
    dropped = TokenDropout(0.3)(ids, draw(400))
    assert torch.equal(dropped[:, 40:], ids[:, 40:])
    changed = dropped[:, :40] != ids[:, :40]
    assert (dropped[:, :40][changed] == 1).all()
    assert abs(changed.float().mean() - 0.3) < 0.02
    assert (changed.float().mean(0) - 0.3).abs().max() < 0.1
    assert len(changed.unique(dim=0)) == 400
