from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from sklearn.datasets import load_diabetes
from torch import Tensor

from lab.objectives.regression import Regression

REFERENCES = {
    "mse": lambda r: r**2,
    "mae": np.abs,
    "huber": lambda r: np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5),
}


@pytest.mark.parametrize("loss", REFERENCES)
@pytest.mark.parametrize("unlabelled", [False, True])
def test_the_loss_is_the_equation_over_the_samples_that_are_known(loss: str, unlabelled: bool) -> None:
    torch.manual_seed(0)
    outputs, targets = 2 * torch.randn(2, 12, 3, dtype=torch.float64)
    if unlabelled:
        targets[::3, 1] = torch.nan
    known = ~targets.isnan().any(1).numpy()
    expected = REFERENCES[loss]((outputs - targets).numpy()[known]).mean()
    assert Regression(loss).loss(outputs, targets).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", REFERENCES)
def test_samples_that_are_not_known_have_no_gradient(loss: str) -> None:
    torch.manual_seed(0)
    outputs = torch.randn(4, 2, requires_grad=True)
    targets = torch.randn(4, 2)
    targets[1, 0] = torch.nan
    Regression(loss).loss(outputs, targets).backward()
    assert torch.equal(outputs.grad[1], torch.zeros(2))
    assert (outputs.grad[[0, 2, 3]] != 0).all()


@pytest.mark.parametrize("loss", REFERENCES)
def test_with_no_known_sample_loss_and_gradient_are_zero(loss: str) -> None:
    outputs = torch.randn(4, 2, requires_grad=True)
    value = Regression(loss).loss(outputs, torch.full((4, 2), torch.nan))
    value.backward()
    assert value.item() == 0
    assert torch.equal(outputs.grad, torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(4, 1), torch.zeros(4), r"outputs have shape \[4, 1\], the targets \[4\]"),
        (torch.zeros(4), torch.zeros(4, 1), r"\[4\], the targets \[4, 1\]"),
        (torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.long), "int64.*objective 'classification'"),
    ],
)
def test_shapes_that_would_be_broadcast_and_classes_are_refused(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regression().loss(outputs, targets)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_metrics_agree_with_scikit_learn_also_far_from_zero(offset: float) -> None:
    data = load_diabetes()
    targets = torch.from_numpy(np.stack([data.target / 100, data.data[:, 2]], 1) + offset).float()
    outputs = targets + 0.1 * torch.randn(targets.shape, generator=torch.Generator().manual_seed(0))
    metrics = Regression().metrics()
    for part in torch.arange(len(targets)).split(64):
        metrics.update(outputs[part], targets[part])
    got = {name: value.item() for name, value in metrics.compute().items()}
    y, z = targets.double().numpy(), outputs.double().numpy()
    expected = {
        "mse": sklearn_metrics.mean_squared_error(y, z),
        "mae": sklearn_metrics.mean_absolute_error(y, z),
        "r2": sklearn_metrics.r2_score(y, z),
    }
    assert got == pytest.approx(expected, rel=1e-3)


def test_r2_of_a_single_sample_is_not_a_number() -> None:
    metrics = Regression().metrics()
    metrics.update(torch.ones(1, 2), torch.zeros(1, 2))
    assert metrics.compute()["r2"].isnan()


def test_predictions_are_the_outputs() -> None:
    outputs = torch.randn(4, 2)
    assert torch.equal(Regression().columns(outputs)["prediction"], outputs)


def test_an_unknown_loss_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'mse', 'mae' or 'huber'"):
        Regression("l2")
