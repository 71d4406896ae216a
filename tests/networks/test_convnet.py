from __future__ import annotations

import pytest
import torch

from lab.datamodules.digits import Digits
from lab.networks.convnet import ConvNet
from lab.objectives.classification import Classification


@pytest.mark.parametrize(
    ("channels", "width", "classes", "parameters"), [(1, 16, 10, 14_458), (1, 8, 10, 3_778), (3, 4, 7, 1_075)]
)
def test_the_number_of_parameters_is_the_docstrings(channels: int, width: int, classes: int, parameters: int) -> None:
    network = ConvNet(classes, channels, width)
    formula = 9 * channels * width + 54 * width**2 + 10 * width + 2 * width * classes + classes
    assert sum(p.numel() for p in network.parameters()) == formula == parameters


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (7, 5), (2, 2)])
def test_any_image_size_works(size: tuple[int, int]) -> None:
    network = ConvNet(10, 3, 4).eval()
    x = torch.rand(5, 3, *size)
    assert network.features(x).shape == (5, 8)
    assert torch.equal(network(x), network.head(network.features(x)))


def test_it_learns_digits_far_past_a_linear_model() -> None:
    torch.manual_seed(0)
    data = Digits()
    data.setup()
    network, objective = ConvNet(10, 1, 8), Classification(10)
    loader = data.train_dataloader()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(8):
        for batch in loader:
            optimizer.zero_grad()
            objective.loss(network(batch.inputs), batch.targets).backward()
            optimizer.step()
    accuracy = (network.eval()(data.test.inputs).argmax(1) == data.test.targets).float().mean()
    assert accuracy > 0.98  # a linear model reaches .96


def test_arguments_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="width"):
        ConvNet(10, 1, width=0)
