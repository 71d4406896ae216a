from __future__ import annotations

import pytest
import torch

from lab.networks.resnet import Block, ResNet


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_the_papers_networks_have_the_papers_sizes(depth: int, parameters: int) -> None:
    assert sum(p.numel() for p in ResNet(10, 3, depth).parameters()) == parameters  # table 6: 0.27, 0.46, 0.85, 1.7 M


@pytest.mark.parametrize(("classes", "channels", "depth", "width"), [(10, 1, 20, 16), (7, 3, 8, 5)])
def test_the_number_of_parameters_is_the_docstrings(classes: int, channels: int, depth: int, width: int) -> None:
    n, w = (depth - 2) // 6, width
    formula = 9 * channels * w + (378 * n - 90) * w**2 + (28 * n + 2) * w + 4 * w * classes + classes
    assert sum(p.numel() for p in ResNet(classes, channels, depth, width).parameters()) == formula


@pytest.mark.parametrize(("channels", "out_channels"), [(4, 4), (4, 8)])
def test_a_block_whose_convolutions_are_zero_passes_its_input_on(channels: int, out_channels: int) -> None:
    block = Block(channels, out_channels)
    torch.nn.init.zeros_(block.residual[-1].weight)
    x = torch.rand(2, channels, 7, 7)
    y = block(x)
    if channels == out_channels:
        assert torch.equal(y, x)
    else:
        assert torch.equal(y[:, :channels], x[:, :, ::2, ::2])
        assert not y[:, channels:].any()


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_a_depth_that_no_such_network_has_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=r"greater than or equal to 8|6n \+ 2 \(8, 14, 20"):
        ResNet(10, 1, depth)
