from __future__ import annotations

import torch
from torch import nn

from lab.networks.alexnet import AlexNet


def test_the_channels_are_the_papers() -> None:
    layers = [m for m in AlexNet(10, 1).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [m.out_channels if isinstance(m, nn.Conv2d) else m.out_features for m in layers] == [
        *(96, 256, 384, 384, 256),
        *(4096, 4096, 10),
    ]


def test_dropout_acts_in_training_only() -> None:
    network = AlexNet(10, 1, width=3)
    torch.manual_seed(0)
    x = torch.rand(4, 1, 28, 28)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
