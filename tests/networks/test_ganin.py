from __future__ import annotations

import pytest
import torch

from lab.networks.ganin import Ganin


def test_it_has_the_papers_sizes_on_the_papers_images() -> None:
    network = Ganin(10, (3, 28, 28))
    shapes = [tuple(p.shape) for p in network.parameters() if p.ndim > 1]
    assert shapes == [(32, 3, 5, 5), (48, 32, 5, 5), (100, 768), (100, 100), (10, 100)]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 28, 28), (1, 31, 33), (2, 40, 16)])
def test_any_image_of_sixteen_pixels_and_more_fits(shape: tuple[int, ...]) -> None:
    network = Ganin(10, shape, width=4, hidden=(8,))
    x = torch.rand(5, *shape)
    assert network.features(x).shape[0] == 5
    assert torch.equal(network(x), network.head(network.features(x)))


def test_a_head_may_be_linear() -> None:
    assert [type(layer).__name__ for layer in Ganin(10, (1, 16, 16), hidden=()).head] == ["Linear"]


def test_images_that_are_too_small_are_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"at least 16×16 pixels, these are 8×8: convnet and mlp"):
        Ganin(10, (1, 8, 8))


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images \(C, H, W\), the inputs have shape \(64,\)"):
        Ganin(10, (64,))
