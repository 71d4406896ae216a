"""MAML's siblings against their definitions, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.func import functional_call

from lab import fit
from lab.batch import Episodes, Labelled
from lab.few_shot import figures_of, losses_of, nearest_neighbour
from lab.modules.anil import ANIL
from lab.modules.maml import MAML
from lab.modules.protonet import ProtoNet, closeness, prototypes
from lab.modules.reptile import Reptile
from lab.networks.conv4 import Conv4
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.objectives.regression import Regression

SMALL = {"name": "episodes", "source": "digits", "ways": 2, "shots": 2, "queries": 3, "val_classes": 0.2,
         "episodes": 96, "val_episodes": 20, "test_episodes": 20}  # fmt: skip


def tasks(count: int = 3, ways: int = 3) -> Episodes:
    generator = torch.Generator().manual_seed(1)

    def some(size: int) -> Labelled:
        inputs = torch.randn(count, size, 5, generator=generator, dtype=torch.float64)
        return Labelled(inputs, torch.arange(size).remainder(ways).expand(count, size), task=torch.arange(count))

    return Episodes(some(2 * ways), some(3 * ways))


def built(kind: Any, **arguments: Any) -> Any:
    seed_everything(0, verbose=False)
    return kind(network=MLP(3, (5,), (7,)), objective=Classification(3), **arguments).double()


def close(one: list[Tensor], other: list[Tensor], off: float = 1e-12) -> bool:
    largest = max(float(tensor.abs().max()) for tensor in other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) <= off * largest


# ANIL


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_anil_is_maml_whose_features_do_not_move(execution: str) -> None:
    module, batch = built(ANIL, inner_lr=0.5, inner_steps=3, execution=execution), tasks()
    network, weights = module.network, dict(module.network.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for task in range(len(batch)):
        fast = dict(weights)
        for _ in range(3):
            loss = F.cross_entropy(
                functional_call(network, fast, (batch.support.inputs[task],)), batch.support.targets[task]
            )
            head = {name: fast[name] for name in fast if name.startswith("head")}
            found = torch.autograd.grad(loss, list(head.values()), create_graph=True)
            fast |= {name: weight - 0.5 * g for (name, weight), g in zip(head.items(), found, strict=True)}
        total = (
            total
            + F.cross_entropy(functional_call(network, fast, (batch.query.inputs[task],)), batch.query.targets[task])
            / 3
        )
    loss, gradients = module.meta_gradient(batch)
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-12)
    assert close(gradients, list(torch.autograd.grad(total, list(weights.values()))))
    assert len(module.answered(module._tensors(), batch)) == 4


def test_anil_computes_features_once_a_task() -> None:
    module, calls = built(ANIL, inner_steps=5, execution="loop"), []
    module._function._whole.network.body[1].register_forward_hook(lambda *_: calls.append(1))
    module.meta_gradient(tasks(1))
    assert len(calls) == 2


# Reptile


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("inner_batch", [None, 4])
def test_the_outer_step_is_the_way_to_the_tasks_weights(execution: str, inner_batch: int | None) -> None:
    module, batch = built(Reptile, inner_lr=0.3, inner_steps=4, inner_batch=inner_batch, execution=execution), tasks()
    start = [parameter.detach().clone() for parameter in module.network.parameters()]
    moved = [torch.zeros_like(weight) for weight in start]
    for task in range(len(batch)):
        inputs = torch.cat([batch.support.inputs[task], batch.query.inputs[task]])
        targets = torch.cat([batch.support.targets[task], batch.query.targets[task]])
        network = MLP(3, (5,), (7,)).double()
        network.load_state_dict(module.network.state_dict())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
        size = inner_batch or len(inputs)
        for step in range(4):
            which = torch.arange(step * size, (step + 1) * size) % len(inputs)
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[which]), targets[which]).backward()
            optimizer.step()
        for sums, end, begin in zip(moved, network.parameters(), start, strict=True):
            sums.add_((end.detach() - begin) / len(batch))
    assert close(module.meta_gradient(batch)[1], [-difference for difference in moved])


def test_reptile_has_to_have_an_inner_step() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        built(Reptile, inner_steps=0)


# Prototypical networks


def test_prototypes_are_means_and_closeness_is_minus_the_squared_distance() -> None:
    features, targets = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]]), torch.tensor([[0, 0, 1]])
    centres = prototypes(features, targets, 2)
    assert centres.tolist() == [[[1.0, 0.0], [0.0, 4.0]]]
    assert closeness(torch.tensor([[[1.0, 3.0]]]), centres).tolist() == [[[-9.0, -2.0]]]
    empty = closeness(features, prototypes(features, targets, 3))
    assert bool((empty[..., 2] == -torch.inf).all())


def test_protonet_minimises_the_cross_entropy_of_the_distances() -> None:
    module, batch = built(ProtoNet, execution="vmap"), tasks()
    total = torch.zeros((), dtype=torch.float64)
    for task in range(len(batch)):
        support, query = (module.network.features(part.inputs[task]) for part in (batch.support, batch.query))
        centres = torch.stack([support[batch.support.targets[task] == k].mean(0) for k in range(3)])
        total = total + F.cross_entropy(-torch.cdist(query, centres).square(), batch.query.targets[task]) / 3
    loss, gradients = module.meta_gradient(batch)
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-10)
    expected = torch.autograd.grad(total, list(module.network.body.parameters()))
    assert close(gradients[: len(expected)], list(expected), 1e-9)


def test_protonet_compares_classes_only() -> None:
    with pytest.raises(ValueError, match="Regression is no classification"):
        ProtoNet(network=MLP(1, (5,)), objective=Regression())


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("kind", [ANIL, ProtoNet])
def test_a_network_without_features_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="`features`"):
        kind(network=Headless(), objective=Classification(3))


# What they share


def test_losses_and_figures_are_those_of_each_task() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, classes = torch.randn(4, 6, 3, generator=generator), torch.randint(3, (4, 6), generator=generator)
    for smoothing in (0.0, 0.1):
        objective = Classification(3, label_smoothing=smoothing)
        expected = torch.stack([objective.loss(*pair) for pair in zip(outputs, classes, strict=True)])
        torch.testing.assert_close(losses_of(objective, outputs, classes), expected)
    assert figures_of(Classification(3), outputs, outputs.argmax(2)).tolist() == [1.0] * 4
    values = torch.randn(4, 6, 3, generator=generator)
    for name in ("mse", "mae", "huber"):
        real = Regression(name)
        expected = torch.stack([real.loss(*pair) for pair in zip(outputs, values, strict=True)])
        torch.testing.assert_close(losses_of(real, outputs, values), expected)
        torch.testing.assert_close(figures_of(real, outputs, values), (outputs - values).square().mean((1, 2)))


def test_the_nearest_neighbour_is_that_of_the_inputs() -> None:
    support = Labelled(torch.tensor([[[0.0], [10.0]]]), torch.tensor([[0, 1]]))
    query = Labelled(torch.tensor([[[1.0], [9.0], [4.0], [6.0]]]), torch.tensor([[0, 1, 1, 1]]))
    assert nearest_neighbour(Episodes(support, query)).tolist() == [0.75]


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "none"])
@pytest.mark.parametrize("kind", [MAML, ANIL, Reptile, ProtoNet])
def test_all_of_conv4_is_the_same_vectorised_and_looped(kind: Any, norm: str) -> None:
    generator, found = torch.Generator().manual_seed(0), []
    inputs = torch.rand(2, 10, 1, 20, 20, generator=generator, dtype=torch.float64)
    targets = torch.arange(10).remainder(5).expand(2, 10)
    batch = Episodes(Labelled(inputs[:, :5], targets[:, :5]), Labelled(inputs[:, 5:], targets[:, 5:]))
    for execution in ("loop", "vmap"):
        seed_everything(0, verbose=False)
        network = Conv4(5, (1, 20, 20), width=8, norm=norm)
        module = kind(network=network, objective=Classification(5), execution=execution).double()
        loss, gradients = module.meta_gradient(batch)
        found.append([loss, *gradients, *module._answers(batch)])
    assert close(found[0], found[1], 1e-10)


@pytest.mark.parametrize(
    ("name", "said"), [("anil", {"inner_lr": 0.5}), ("reptile", {"inner_lr": 0.5}), ("protonet", {})]
)
def test_each_learns_real_tasks(name: str, said: dict[str, Any], tmp_path: Path) -> None:
    module = {
        "name": name,
        "network": {"name": "mlp", "hidden": [32]},
        "optimizer": {"name": "adam", "lr": 0.01},
        **said,
    }
    found = []
    for batches in (0, 1.0):
        run = fit({
            "data": {**SMALL, "batch_size": 8}, "trainer": {"max_epochs": 8, "limit_train_batches": batches},
            "module": module, "logger": "csv", "callbacks": {"profile": None, "progress": None},
        }, fresh=True)  # fmt: skip
        found.append(run.results["stages"]["main"]["metrics"])
    assert found[1]["test/loss"] < found[0]["test/loss"]
    assert found[1]["test/accuracy"] > 0.6
    assert found[0]["test/nearest_neighbour"] == found[1]["test/nearest_neighbour"]
