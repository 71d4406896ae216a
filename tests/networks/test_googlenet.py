from __future__ import annotations

import pytest
import torch

from lab.networks.googlenet import GoogLeNet, Inception


def test_the_modules_channels_are_table_1s() -> None:
    outputs = [m.out_channels for m in GoogLeNet(10, 3).modules() if isinstance(m, Inception)]
    assert outputs == [256, 480, 512, 512, 512, 528, 832, 832, 1024]


@pytest.mark.parametrize("width", [1, 10, 16])
def test_all_channels_follow_the_width(width: int) -> None:
    network = GoogLeNet(10, 1, width).eval()
    assert network.head.in_features == sum(max(size * width // 64, 1) for size in (384, 384, 128, 128))
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_the_branches_see_the_same_image_and_stand_side_by_side() -> None:
    inception = Inception(3, [2, 1, 4, 1, 5, 1]).eval()
    x = torch.rand(2, 3, 9, 7)
    assert torch.equal(inception(x)[:, 2:6], inception.branches[1](x))
    assert inception(x).shape == (2, 12, 9, 7)
