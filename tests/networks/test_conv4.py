"""The four convolutions: sizes, shapes, and what they don't take."""

from __future__ import annotations

import pytest
import torch

from lab.networks.conv4 import Conv4


def test_it_is_as_large_as_its_docstring_says() -> None:
    width, channels, classes = 64, 1, 5
    network = Conv4(classes, (channels, 28, 28))
    positions = 4
    expected = 9 * channels * width + 27 * width**2 + 12 * width + positions * width * classes + classes
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 5)


@pytest.mark.parametrize("downsample", ["stride", "pool"])
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "none"])
def test_every_form_takes_any_image_that_is_large_enough(downsample: str, norm: str) -> None:
    network = Conv4(4, (3, 37, 20), width=6, downsample=downsample, norm=norm)
    features = network.features(torch.rand(2, 3, 37, 20))
    assert network.head(features).shape == (2, 4)


def test_what_it_cannot_take_is_said() -> None:
    with pytest.raises(ValueError, match="conv4 takes images"):
        Conv4(2, (5,))
    with pytest.raises(ValueError, match="pooling takes 16×16 pixels at least, these are 8×8"):
        Conv4(2, (1, 8, 8), downsample="pool")
    with pytest.raises(ValueError, match="one pixel of these images"):
        Conv4(2, (1, 16, 16), norm="instance")
    assert Conv4(2, (1, 8, 8))(torch.rand(2, 1, 8, 8)).shape == (2, 2)
