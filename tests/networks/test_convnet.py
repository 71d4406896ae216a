from __future__ import annotations

import pytest
import torch

from lab.datamodules.digits import Digits
from lab.networks.convnet import ConvNet, separable_convolution
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
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=10 * len(loader))
    for _ in range(10):
        for batch in loader:
            optimizer.zero_grad()
            objective.loss(network(batch.inputs), batch.targets).backward()
            optimizer.step()
            schedule.step()
    accuracy = (network.eval()(data.test.inputs).argmax(1) == data.test.targets).float().mean()
    assert accuracy > 0.98  # a linear model reaches .96


def test_arguments_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="width"):
        ConvNet(10, 1, width=0)


@pytest.mark.parametrize(("channels", "width", "classes"), [(1, 16, 10), (3, 4, 7)])
def test_separable_convolutions_have_the_docstrings_parameters(channels: int, width: int, classes: int) -> None:
    network = ConvNet(classes, channels, width, separable=True)
    formula = 9 * channels * width + 6 * width**2 + 43 * width + 2 * width * classes + classes
    assert sum(p.numel() for p in network.parameters()) == formula


def test_a_separable_convolution_is_a_full_one_of_rank_one_kernels() -> None:
    torch.manual_seed(0)
    depthwise, pointwise = separable_convolution(3, 5)
    x = torch.rand(2, 3, 9, 9)
    kernel = pointwise[0].weight * depthwise[0].weight.squeeze(1)  # (5, 3, 1, 1) * (3, 3, 3)
    full = torch.nn.functional.conv2d(x, kernel, padding=1)
    assert torch.allclose(pointwise[0](depthwise[0](x)), full, atol=1e-6)


def test_the_weights_names_are_those_of_saved_networks() -> None:
    layers = {f"body.{at}.{part}" for at in (0, 2, 4) for part in (
        *("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"),)}  # fmt: skip
    assert set(ConvNet(10, 1).state_dict()) == layers | {"head.weight", "head.bias"}
