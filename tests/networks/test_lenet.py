from __future__ import annotations

import pytest
import torch

from lab.networks.lenet import LeNet


@pytest.mark.parametrize("side", [28, 32])
def test_it_has_the_papers_sizes_on_the_papers_images(side: int) -> None:
    network = LeNet(10, (1, side, side))
    assert sum(p.numel() for p in network.parameters()) == 61_706


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 28, 28), (1, 31, 33), (2, 40, 12)])
def test_any_image_of_twelve_pixels_and_more_fits(shape: tuple[int, ...]) -> None:
    network = LeNet(10, shape)
    x = torch.rand(5, *shape)
    assert network.features(x).shape == (5, 84)
    assert torch.equal(network(x), network.head(network.features(x)))


def test_images_that_are_too_small_are_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"at least 12×12 pixels, these are 8×8: convnet and mlp"):
        LeNet(10, (1, 8, 8))


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images \(C, H, W\), the inputs have shape \(64,\)"):
        LeNet(10, (64,))
