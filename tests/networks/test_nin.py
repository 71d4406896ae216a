from __future__ import annotations

import torch
from torch import nn

from lab.networks.nin import NiN


def test_the_channels_are_the_authors() -> None:
    widths = [module.out_channels for module in NiN(10, 3).modules() if isinstance(module, nn.Conv2d)]
    assert widths == [192, 160, 96, 192, 192, 192, 192, 192]


def test_a_linear_layer_after_the_mean_is_a_1x1_convolution_before_it() -> None:
    torch.manual_seed(0)
    network = NiN(10, 1, width=12).double().eval()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    maps = nn.functional.conv2d(network.body(x), network.head.weight[:, :, None, None], network.head.bias)
    assert torch.allclose(maps.mean(dim=(2, 3)), network(x), rtol=1e-12)
