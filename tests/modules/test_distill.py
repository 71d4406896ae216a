"""Distillation's mathematics against closed forms and float64 references, and its manners inside a fit."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lab import fit
from lab.artifact import Teacher, load_weights
from lab.batch import UNLABELLED, Labelled
from lab.datamodules.digits import Digits
from lab.modules import distill
from lab.modules.distill import Distill, attention_loss, distillation_loss, hint_loss, soft_targets, standardized
from lab.modules.supervised import Supervised
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.objectives.regression import Regression


def logits(seed: int, *, batch: int = 7, classes: int = 5) -> torch.Tensor:
    return 3 * torch.randn(batch, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def student(**arguments: object) -> Distill:
    seed_everything(0, verbose=False)
    network = MLP(num_classes=10, input_shape=(1, 8, 8), hidden=(16,))
    teacher = arguments.pop("teacher", None) or Teacher(ConvNet(num_classes=10, in_channels=1, width=4))
    return Distill(teacher=teacher, network=network, objective=Classification(num_classes=10), **arguments)


def trainer(**arguments: object) -> Trainer:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(**{**settings, "enable_progress_bar": False, "accelerator": "cpu", **arguments})


def some_batch(count: int = 32) -> Labelled:
    data = Digits()
    data.setup()
    return data.train[:count]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_loss_is_the_scaled_divergence_summed_by_hand(temperature: float) -> None:
    z, v = logits(0), logits(1)
    expected = 0.0
    for student_row, teacher_row in zip(z.tolist(), v.tolist(), strict=True):
        p = [torch.tensor(x, dtype=torch.float64).div(temperature).exp().item() for x in student_row]
        q = [torch.tensor(x, dtype=torch.float64).div(temperature).exp().item() for x in teacher_row]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += sum(b * (torch.tensor(b / a, dtype=torch.float64).log().item()) for a, b in zip(p, q, strict=True))
    expected *= temperature**2 / len(z)
    loss = distillation_loss(z, soft_targets([v], temperature, [1.0]), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(temperature: float) -> None:
    v = logits(2)
    z = v.clone().requires_grad_()
    loss = distillation_loss(z, soft_targets([v], temperature, [1.0]), temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-14


def test_at_high_temperature_the_gradient_is_that_of_matching_centred_logits() -> None:
    z, v = logits(3).requires_grad_(), logits(4)
    temperature = 1e4
    distillation_loss(z, soft_targets([v], temperature, [1.0]), temperature).backward()
    centred = (z - z.mean(1, keepdim=True) - v + v.mean(1, keepdim=True)).detach()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, centred / z.shape[1] / len(z), rtol=2e-3, atol=1e-6)


def test_the_gradient_agrees_with_finite_differences() -> None:
    v = soft_targets([logits(5)], 3.0, [1.0])
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, v, 3.0), logits(6).requires_grad_())


def test_several_teachers_are_averaged_by_probability_not_by_logit() -> None:
    first, second = logits(7), logits(8)
    mixed = soft_targets([first, second], 2.0, [0.25, 0.75])
    torch.testing.assert_close(mixed, 0.25 * (first / 2).softmax(1) + 0.75 * (second / 2).softmax(1))
    assert not torch.allclose(mixed, ((0.25 * first + 0.75 * second) / 2).softmax(1), atol=1e-3)


def test_weight_zero_is_plain_cross_entropy() -> None:
    module, batch = student(weight=0.0), some_batch()
    terms = module.loss(batch)
    assert torch.equal(terms.loss, F.cross_entropy(module.network(batch.inputs), batch.targets))


def test_the_soft_loss_keeps_its_scale_when_there_are_no_labels() -> None:
    module, batch = student(weight=1.0, temperature=3.0), some_batch()
    withheld = Labelled(batch.inputs, torch.full_like(batch.targets, UNLABELLED), batch.index)
    assert torch.equal(module.loss(withheld).loss, module.loss(batch).loss)
    assert module.loss(withheld).loss > 0


def test_weights_of_teachers_are_scaled_to_one() -> None:
    teachers = [Teacher(ConvNet(10, 1, width)) for width in (2, 4)]
    module = student(teacher=teachers, teacher_weights=(1.0, 3.0))
    inputs = some_batch().inputs
    expected = soft_targets([teacher(inputs) for teacher in teachers], 4.0, [0.25, 0.75])
    torch.testing.assert_close(module.ask(inputs), expected)
    torch.testing.assert_close(module.ask(inputs).sum(1), torch.ones(len(inputs)))


def test_a_fit_leaves_the_teacher_as_it_was() -> None:
    teacher = Teacher(ConvNet(num_classes=10, in_channels=1, width=4))
    before = copy.deepcopy(teacher.network.state_dict())
    module = student(teacher=teacher, cache=False)
    trainer().fit(module, datamodule=Digits())
    module.train()
    assert all(torch.equal(value, teacher.network.state_dict()[key]) for key, value in before.items())
    assert not any(part.training for part in teacher.network.modules())
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def test_the_teacher_is_neither_saved_nor_optimized() -> None:
    module = student()
    teachers = {id(parameter) for parameter in module.teachers[0].network.parameters()}
    assert all(key.startswith("network.") for key in module.state_dict())
    assert not teachers & {id(parameter) for parameter in module.parameters()}


def test_kept_answers_train_the_same_weights_as_asking_at_every_step() -> None:
    kept, asked = student(cache=True), student(cache=False)
    for module in (kept, asked):
        trainer().fit(module, datamodule=Digits(seed=1, labels=200))
    for name, value in kept.network.state_dict().items():
        torch.testing.assert_close(value, asked.network.state_dict()[name], rtol=1e-4, atol=1e-5)


class _Counted(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.samples += len(inputs)
        return self.network(inputs)


class _Moving(Digits):
    """Digits whose views are not fixed."""

    def fixed_train_inputs(self) -> None:
        return None


@pytest.mark.parametrize(("data", "epochs_asked"), [(Digits, 1), (_Moving, 2)])
def test_teachers_are_asked_once_a_sample_only_where_views_are_fixed(data: type[Digits], epochs_asked: int) -> None:
    counted = _Counted(ConvNet(10, 1, 2))
    datamodule = data()
    trainer().fit(student(teacher=Teacher(counted)), datamodule=datamodule)
    assert counted.samples == epochs_asked * len(datamodule.train)


def test_a_teacher_follows_its_inputs_precision() -> None:
    module = student()
    trainer(precision="64-true", max_epochs=1, limit_train_batches=2).fit(module, datamodule=Digits())
    assert next(module.teachers[0].network.parameters()).dtype == torch.float64


def test_a_taught_student_beats_one_that_has_the_labels_alone() -> None:
    data = {"labels": 40, "seed": 0}
    seed_everything(0, verbose=False)
    taught = Supervised(network=ConvNet(10, 1, 12), objective=Classification(10))
    trainer(max_epochs=20).fit(taught, datamodule=Digits())
    accuracies = []
    alone = Supervised(network=student().network, objective=Classification(num_classes=10))
    for module in (student(teacher=Teacher(taught.network)), alone):
        judge = trainer(max_epochs=20)
        judge.fit(module, datamodule=Digits(**data))
        accuracies.append(judge.test(module, datamodule=Digits(**data), verbose=False)[0]["test/accuracy"])
    assert accuracies[0] > accuracies[1] + 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": [], "temperature": 2.0}, "needs a teacher"),
        ({"teacher_weights": (1.0, 2.0)}, "2 teacher_weights for 1 teachers"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"weight": 1.5}, "less than or equal to 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    teacher = arguments.pop("teacher", Teacher(ConvNet(10, 1, 2)))
    with pytest.raises(ValueError, match=message):
        Distill(teacher=teacher, network=ConvNet(10, 1, 2), objective=Classification(10), **arguments)


def test_an_objective_without_class_probabilities_is_refused() -> None:
    with pytest.raises(ValueError, match="Regression is no classification"):
        Distill(teacher=Teacher(ConvNet(10, 1, 2)), network=ConvNet(10, 1, 2), objective=Regression())


def test_a_teacher_with_other_outputs_is_refused_with_both_shapes() -> None:
    module = student(teacher=Teacher(ConvNet(num_classes=7, in_channels=1, width=2)))
    with pytest.raises(ValueError, match=r"\(32, 10\), the teachers' \(32, 7\)"):
        module.loss(some_batch())


def test_standardised_logits_are_z_scores_and_only_relations_count() -> None:
    z = logits(5)
    expected = torch.tensor([[(x - sum(r) / 5) / (sum((y - sum(r) / 5) ** 2 for y in r) / 5) ** 0.5 for x in r]
                             for r in z.tolist()], dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(standardized(z), expected, rtol=1e-6, atol=1e-9)
    teacher = MLP(num_classes=10, input_shape=(1, 8, 8), hidden=(16,))
    module = student(teacher=Teacher(teacher), weight=1.0, standardize=True)
    module.network.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        module.network.head.weight.mul_(3)
        module.network.head.bias.mul_(3).add_(2)
    assert module.loss(some_batch()).loss.item() < 1e-5
    plain = student(teacher=Teacher(teacher), weight=1.0)
    plain.network.load_state_dict(module.network.state_dict())
    assert plain.loss(some_batch()).loss.item() > 1e-2


def test_hints_and_attention_are_the_papers_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    total = 0.0
    for i in range(3):
        maps = [sum(x[i, c] ** 2 for c in range(4)).flatten() for x in (a, b)]
        maps = [m / (m**2).sum() ** 0.5 for m in maps]
        total += 0.5 * float(((maps[0] - maps[1]) ** 2).sum()) / 3
    assert attention_loss(a, b).item() == pytest.approx(total, rel=1e-12)
    assert hint_loss(a, b).item() == pytest.approx(0.5 * float(((a - b) ** 2).mean()), rel=1e-12)
    smaller = F.avg_pool2d(a[:, :, :4], 2)
    assert attention_loss(a[:, :, :4], smaller).item() < attention_loss(b[:, :, :4], smaller).item()
    assert attention_loss(a * 7, a).item() < 1e-12


LAYERS = {"body.2": "body.2", "body.4": "body.4"}


def convolutional(**arguments: object) -> Distill:
    seed_everything(0, verbose=False)
    network, teacher = ConvNet(10, 1, 4), ConvNet(10, 1, 8)
    return Distill(Teacher(teacher), network=network, objective=Classification(10), input_shape=(1, 8, 8), **arguments)


def test_a_student_with_its_teachers_layers_has_no_hint_and_no_attention_loss() -> None:
    seed_everything(0, verbose=False)
    network = ConvNet(10, 1, 4)
    module = Distill(
        Teacher(copy.deepcopy(network)), network=network, objective=Classification(10), input_shape=(1, 8, 8),
        hints=LAYERS, attention=LAYERS,
    )  # fmt: skip
    module.eval()
    with torch.no_grad():
        for projection in module.projections:
            torch.nn.init.dirac_(projection.weight)
    parts = module.loss(some_batch()).parts
    assert parts["hint"].item() < 1e-10
    assert parts["attention"].item() < 1e-10
    with torch.no_grad():
        network.body[2][0].weight.mul_(-1)
    parts = module.loss(some_batch()).parts
    assert min(parts["hint"].item(), parts["attention"].item()) > 1e-4


def test_hints_teach_the_layers_through_projections_that_train_and_are_no_part_of_the_network() -> None:
    module = convolutional(hints=LAYERS, attention=LAYERS, weight=1.0)
    assert [tuple(p.weight.shape) for p in module.projections] == [(16, 8, 1, 1), (16, 8, 1, 1)]
    before = [p.weight.clone() for p in module.projections]
    teacher = copy.deepcopy(module.teachers[0].network.state_dict())
    first = module.loss(some_batch(256)).parts
    trainer(max_epochs=6).fit(module, datamodule=Digits())
    last = module.loss(some_batch(256)).parts
    assert last["hint"] < first["hint"]
    assert last["attention"] < first["attention"]
    assert not any(torch.equal(p.weight, b) for p, b in zip(module.projections, before, strict=True))
    assert all(torch.equal(teacher[name], t) for name, t in module.teachers[0].network.state_dict().items())
    assert not any("projection" in name for name in module.network.state_dict())


def test_layers_that_there_are_not_or_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"the student has no layer 'body.9' .*did you mean 'body.4'"):
        convolutional(hints={"body.9": "body.0"})
    with pytest.raises(ValueError, match=r"the teacher has no layer 'tail'"):
        convolutional(attention={"body.0": "tail"})
    with pytest.raises(ValueError, match=r"head gives \[1, 10\] and the teacher's head .* attention is that of maps"):
        convolutional(attention={"head": "head"})
    with pytest.raises(ValueError, match=r"body.0 gives \[1, 4, 8, 8\] and the teacher's head \[1, 10\]"):
        convolutional(hints={"body.0": "head"})
    with pytest.raises(ValueError, match="need input_shape"):
        Distill(Teacher(ConvNet(10, 1, 4)), network=ConvNet(10, 1, 4), objective=Classification(10), hints=LAYERS)


def test_answers_too_large_for_memory_lie_in_a_file_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = student(), []
    monkeypatch.setattr(distill, "IN_MEMORY", 0)
    soft = module._soft_targets
    monkeypatch.setattr(module, "_soft_targets", lambda batch: seen.append((batch, soft(batch))) or seen[-1][1])
    trainer(max_epochs=1).fit(module, datamodule=Digits())
    assert len(seen) == 20
    for batch, answers in seen:
        exact = module.ask(batch.inputs)
        assert answers.dtype == exact.dtype
        assert 0 < (answers - exact).abs().max() < 5e-4
    assert module._cached is None


@pytest.mark.filterwarnings("ignore:checkpoints. no metric")
def test_a_student_learns_from_images_of_which_none_has_a_label(tmp_path: Path) -> None:
    data = Digits()
    data.setup()
    np.savez(tmp_path / "unlabelled.npz", inputs=data.train.inputs)
    run = fit(
        {
            "stages": {
                "teacher": {
                    "data": "digits",
                    "trainer": {"max_epochs": 12},
                    "module": {
                        "name": "supervised",
                        "network": {"name": "convnet", "width": 8},
                        "optimizer": {"name": "adam", "lr": 0.01},
                    },
                },
                "student": {
                    "data": {"name": "arrays", "path": str(tmp_path / "unlabelled.npz")},
                    "trainer": {"max_epochs": 12},
                    "module": {
                        "name": "distill",
                        "teacher": {"from": "teacher"},
                        "weight": 1.0,
                        "network": {"name": "convnet", "width": 6, "num_classes": 10},
                        "objective": {"name": "classification", "num_classes": 10},
                        "optimizer": {"name": "adam", "lr": 0.01},
                    },
                },
            }
        }
    )  # fmt: skip
    results = run.results["stages"]["student"]
    assert results["status"] == "finished"
    assert results["n_test"] == 0
    network = ConvNet(10, 1, 6)
    load_weights(network, run.stage("student") / "network.safetensors")
    accuracy = (network.eval()(data.test.inputs).argmax(1) == data.test.targets).float().mean()
    assert accuracy > 0.9
