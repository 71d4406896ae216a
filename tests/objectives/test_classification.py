from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn_metrics
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lab.batch import UNLABELLED
from lab.objectives.classification import Classification, Measure


@pytest.fixture(scope="module")
def judged() -> tuple[Tensor, Tensor]:
    """Logits of a poor classifier of real digits, and their classes."""
    images, classes = load_digits(return_X_y=True)
    model = LogisticRegression(max_iter=300, C=1e-5).fit(images[:300], classes[:300])
    return torch.from_numpy(model.decision_function(images[300:])).float(), torch.from_numpy(classes[300:])


def compute(objective: Classification, logits: Tensor, classes: Tensor) -> dict[str, float]:
    metrics = objective.metrics()
    for part in torch.arange(len(logits)).split(256):
        metrics.update(logits[part], classes[part])
    return {name: value.item() for name, value in metrics.compute().items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("unlabelled", [False, True])
def test_the_loss_and_its_gradient_are_the_equations(smoothing: float, unlabelled: bool) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(12, 5, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(5, (12,))
    if unlabelled:
        targets[::3] = UNLABELLED
    loss = Classification(5, label_smoothing=smoothing).loss(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)

    z, known = logits.detach().numpy(), (targets != UNLABELLED).numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    q = np.full((12, 5), smoothing / 5)
    q[np.arange(12)[known], targets.numpy()[known]] += 1 - smoothing
    assert loss.item() == pytest.approx(-(q * np.log(p))[known].sum() / known.sum(), rel=1e-12)
    assert np.allclose(gradient, (p - q) * known[:, None] / known.sum(), rtol=1e-10, atol=1e-15)


def test_without_any_label_loss_and_gradient_are_zero() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = Classification(3, label_smoothing=0.1).loss(logits, torch.full((4,), UNLABELLED))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 3))


def test_metrics_agree_with_scikit_learn(judged: tuple[Tensor, Tensor]) -> None:
    logits, classes = judged
    got = compute(Classification(10, measures=get_args(Measure)), logits, classes)
    predicted, p = logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(classes, predicted, average="macro")
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(classes, predicted),
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "auroc": sklearn_metrics.roc_auc_score(classes, p, multi_class="ovr", average="macro"),
        "top5": sklearn_metrics.top_k_accuracy_score(classes, p, k=5),
    }
    calibration = got.pop("calibration")
    assert got == pytest.approx(expected, abs=1e-5)
    assert expected["accuracy"] < 0.95, "too good a classifier to tell the metrics apart"

    confidence, right = p.max(1), predicted == classes.numpy()
    bins = np.ceil(confidence * 15).astype(int)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    assert calibration == pytest.approx(sum(gaps), abs=1e-5)


def test_logits_that_lie_in_zero_to_one_are_still_logits(judged: tuple[Tensor, Tensor]) -> None:
    logits, classes = judged
    low, high = logits.min(), logits.max()
    small = (logits - low) / (high - low)  # a shift leaves the softmax alone: the scale is all that differs
    shifted = small - 5
    objective = Classification(10, measures=("auroc", "calibration"))
    assert compute(objective, small, classes) == pytest.approx(compute(objective, shifted, classes), abs=1e-5)


def test_a_first_batch_that_is_all_right_does_not_tie_top5_to_recall() -> None:
    metrics = Classification(6, measures=("recall", "top5")).metrics()
    classes = torch.arange(6)
    metrics.update(torch.eye(6)[classes], classes)
    metrics.update(torch.eye(6)[(classes + 1) % 6] * 2 + torch.eye(6)[classes], classes)
    values = metrics.compute()
    assert (values["recall"], values["top5"]) == (0.5, 1.0)


def test_accuracy_is_always_reported_as_it_is_the_monitor() -> None:
    objective = Classification(10, measures=("f1",))
    assert set(objective.metrics()) == {"accuracy", "f1"}
    assert objective.monitor == ("val/accuracy", "max")


def test_metrics_are_new_each_time() -> None:
    objective = Classification(3)
    used = objective.metrics()
    used.update(torch.eye(3), torch.arange(3))
    assert objective.metrics()["accuracy"] is not used["accuracy"]


def test_predictions_come_with_a_probability_for_each_class(judged: tuple[Tensor, Tensor]) -> None:
    columns = Classification(10).columns(judged[0])
    assert torch.allclose(columns["probabilities"].sum(1), torch.ones(len(judged[0])))
    assert torch.equal(columns["probabilities"].argmax(1), columns["prediction"])


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (
            torch.zeros(4, 5),
            torch.zeros(4, dtype=torch.long),
            r"outputs have shape \[4, 5\], for 3 classes \[batch, 3\]",
        ),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), r"outputs have shape \[4\]"),
        (torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long), r"\[4, 1\], for classes whole numbers \[4\]"),
        (torch.zeros(4, 3), torch.zeros(4), "float32.*objective 'regression'"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(3).loss(outputs, targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 3, "label_smoothing": 1.0}, "label_smoothing"),
        ({"num_classes": 3, "measures": ("acuracy",)}, "accuracy"),
        ({"num_classes": 5, "measures": ("top5",)}, "always 1 with 5 classes"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(**arguments)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_blended_targets_cost_the_blend_of_their_classes_and_unknown_ones_nothing(smoothing: float) -> None:
    objective = Classification(5, label_smoothing=smoothing)
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    one, other = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 1, 4, 0, 2, 3])
    soft = 0.3 * F.one_hot(one, 5).double() + 0.7 * F.one_hot(other, 5).double()
    torch.testing.assert_close(
        objective.loss(logits, soft), 0.3 * objective.loss(logits, one) + 0.7 * objective.loss(logits, other)
    )
    unknown = soft.clone()
    unknown[2] = torch.nan
    known = [0, 1, 3, 4, 5]
    loss = objective.loss(logits, unknown)
    torch.testing.assert_close(loss, objective.loss(logits[known], soft[known]))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[2].abs().max() == 0
    assert objective.loss(logits, torch.full_like(soft, torch.nan)).item() == 0
