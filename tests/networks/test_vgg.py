from __future__ import annotations

import pytest
import torch
from torch import nn

from lab.networks.vgg import VGG


def test_the_number_of_parameters_is_the_docstrings() -> None:
    assert sum(p.numel() for p in VGG(10, 1).parameters()) == 9_227_210


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_it_has_the_papers_layers_but_for_two(depth: int) -> None:
    network = VGG(10, 1, depth, width=2)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth - 2


def test_a_depth_that_the_paper_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="11, 13, 16 or 19"):
        VGG(10, 1, 12)


def test_it_sees_the_whole_image() -> None:
    network = VGG(2, 1, width=2).eval()
    x = torch.rand(1, 1, 32, 32, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().amin(dim=(0, 1))[::31, ::31].count_nonzero() == 4  # the corners
