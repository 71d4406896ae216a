"""Domain-adversarial training against its equations, its schedule, and its manners inside a fit."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lab import fit
from lab.batch import Labelled, SourceTarget
from lab.datamodules.domains import Domains
from lab.datamodules.mnist_digits import MNISTDigits
from lab.modules.adaptation import ORACLE, View, correlations, ramp, width_of
from lab.modules.dann import DANN, Discriminator, domain_losses, reversed_gradient
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.objectives.regression import Regression
from lab.registry import callbacks
from lab.testing import check_module
from lab.validators import a_distance, projected

SMALL = {"name": "mnist_digits", "direction": "digits_to_mnist", "size": 8, "val_fraction": 0.05, "test_fraction": 0.75}


def digits(**arguments: Any) -> MNISTDigits:
    given = {key: value for key, value in SMALL.items() if key != "name"}
    data = MNISTDigits(**{**given, **arguments})
    data.prepare_data()
    data.setup("fit")
    return data


def built(kind: Any = DANN, network: nn.Module | None = None, **arguments: Any) -> Any:
    seed_everything(0, verbose=False)
    network = network or MLP(10, (1, 8, 8), (24,))
    given = {"optimizer": partial(Adam, lr=0.003), "input_shape": (1, 8, 8), **arguments}
    return kind(network=network, objective=Classification(10), **given)


def trained(module: Any, data: Any, *callbacks: Callback, **arguments: Any) -> Any:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        **{**settings, "enable_progress_bar": False, "accelerator": "cpu", **arguments}, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=data)
    return module


def some(batch: int = 12) -> SourceTarget:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(2, batch, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (2, batch), generator=generator)
    return SourceTarget(Labelled(inputs[0], labels[0]), Labelled(inputs[1], labels[1]))


class At:
    """A trainer at a step."""

    def __init__(self, step: int) -> None:
        self.global_step, self.log_every_n_steps = step, 10**9


def at(module: Any, step: int, total: int) -> Any:
    module._trainer, module.total_steps = At(step), total
    module.log_dict = lambda *_, **__: None
    return module


# The reversal


def test_the_reversal_is_the_identity_whose_gradient_is_minus_lambda() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = reversed_gradient(x, 0.3)
    assert torch.equal(x, y)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(gradient, -0.3 * upstream, rtol=1e-15, atol=0)


def test_one_step_is_the_two_opposing_losses_in_float64() -> None:
    """E(θ_f, θ_y, θ_d) = L_task − λ L_d, of which θ_f and θ_y take the minimum and θ_d the maximum (equation 9)."""
    module = at(built(hidden=(7,)).double(), 30, 100)
    level, batch = ramp(0.3, 10.0), some()
    ours = dict(zip(module.state_dict(), torch.autograd.grad(module.training_step(batch, 0), module.parameters()),
                    strict=True))  # fmt: skip
    both = module.network.features(torch.cat([batch.source.inputs, batch.target.inputs]))
    task = F.cross_entropy(module.network.head(both[:12]), batch.source.targets)
    logits = module.discriminator(both)
    domain = F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0] * 12 + [0.0] * 12, dtype=torch.float64))
    named = dict(module.named_parameters())
    network = {name: p for name, p in named.items() if name.startswith("network.")}
    judge = {name: p for name, p in named.items() if name.startswith("discriminator.")}
    first = torch.autograd.grad(task - level * domain, network.values(), retain_graph=True)
    second = torch.autograd.grad(domain, judge.values())
    for name, expected in [*zip(network, first, strict=True), *zip(judge, second, strict=True)]:
        assert float((ours[name] - expected).abs().max()) <= 1e-10, name
    assert max(float(g.abs().max()) for g in second) > 1e-4


def test_the_schedule_scales_the_features_gradient_and_not_the_discriminators() -> None:
    found = {}
    for step in (10, 90):
        module = at(built().double(), step, 100)
        terms = module.alignment(*module.views(some()))
        wanted = [module.discriminator[0].weight, module.network.body[1].weight]
        found[step] = torch.autograd.grad(terms.loss, wanted)
    torch.testing.assert_close(found[10][0], found[90][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[10][1] / ramp(0.1, 10), found[90][1] / ramp(0.9, 10), rtol=1e-9, atol=1e-16)
    assert float(found[10][1].abs().max()) > 0


def test_the_domain_loss_is_the_cross_entropy_of_source_and_target_by_hand() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    sigmoid = [1 / (1 + math.exp(-value)) for value in logits.tolist()]
    expected = [-math.log(sigmoid[0]), -math.log(1 - sigmoid[1]), -math.log(1 - sigmoid[2])]
    assert domain_losses(logits, 1).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_head_learns_from_the_source_alone_and_one_pass_sees_both() -> None:
    module, calls = at(built().double(), 50, 100), []
    module.network.body[0].register_forward_hook(lambda *_: calls.append(1))
    batch = some()
    whole = torch.autograd.grad(module.training_step(batch, 0), module.network.head.weight)[0]
    alone = F.cross_entropy(module.network(batch.source.inputs), batch.source.targets)
    torch.testing.assert_close(whole, torch.autograd.grad(alone, module.network.head.weight)[0])
    assert len(calls) == 2  # one of them this test's own


def test_the_targets_entropy_is_weighed_and_ramped() -> None:
    plain, module = (at(built(entropy_weight=w).double(), 40, 100) for w in (0.0, 0.7))
    batch = some()
    probabilities = module.network(batch.target.inputs).softmax(1)
    entropy = -(probabilities * probabilities.log()).sum(1).mean()
    difference = module.training_step(batch, 0) - plain.training_step(batch, 0)
    torch.testing.assert_close(difference, 0.7 * ramp(0.4, 10) * entropy)


def test_a_linear_discriminator_and_a_deep_one() -> None:
    assert [type(layer).__name__ for layer in Discriminator(5, ())] == ["Linear"]
    deep = Discriminator(5, (4, 3))
    assert [tuple(p.shape) for p in deep.parameters() if p.ndim == 2] == [(4, 5), (3, 4), (1, 3)]
    assert deep(torch.zeros(6, 5)).shape == (6,)


# The schedule


class Levels(Callback):
    """λ of every step."""

    watches_only = True
    seen: list[tuple[int, float]]
    stop_after: int | None = None

    def __init__(self) -> None:
        self.unsaved = ()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        Levels.seen.append((trainer.global_step, pl_module.level))


def test_lambda_rises_over_all_steps_of_the_training() -> None:
    Levels.seen = []
    data = digits(batch_size=128)
    trained(built(strength=0.5), data, Levels(), max_epochs=3)
    total = 3 * len(data.train_dataloader())
    assert [step for step, _ in Levels.seen] == list(range(total))
    expected = [0.5 * (2 / (1 + math.exp(-10 * step / total)) - 1) for step in range(total)]
    assert [level for _, level in Levels.seen] == pytest.approx(expected, rel=1e-12)


def test_lambda_goes_on_after_an_interruption_as_if_there_had_been_none(tmp_path: Path) -> None:
    import os
    import signal

    from lab import stages

    class Interrupt(Levels):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == Levels.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

    callbacks.register("levels")(Interrupt)
    recipe = {
        "data": {**SMALL, "batch_size": 64}, "trainer": {"max_epochs": 3}, "logger": "csv",
        "module": {"name": "dann", "network": {"name": "mlp", "hidden": [8]}, "optimizer": "adam",
                   "scheduler": "inverse_decay"},
        "callbacks": {"profile": None, "progress": None, "levels": {}},
    }  # fmt: skip
    Levels.seen, Levels.stop_after = [], None
    whole = fit(recipe)
    uninterrupted = dict(Levels.seen)
    Levels.seen, Levels.stop_after = [], 17
    with pytest.raises(stages.Terminated) as stopped:
        fit(recipe, fresh=True)
    Levels.stop_after = None
    assert stopped.value.run is not None
    stages.resume(stopped.value.run)
    assert dict(Levels.seen) == uninterrupted
    assert [step for step, _ in Levels.seen].count(17) == 1
    one, other = (run.stage("main") for run in (whole, stopped.value.run))
    weights = [load_file(folder / "network.safetensors") for folder in (one, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for key in ("a_distance", "validators", "metrics"):
        assert results[0][key] == results[1][key]


# Labels of the target


class Shuffled(MNISTDigits):
    """The target's labels mean nothing."""

    def setup(self, stage: str | None = None) -> None:
        ready = self._ready
        super().setup(stage)
        if not ready:
            for split in (self.target.train, self.target.val, self.target.test, self._target_train, self._target_val):
                split.targets = split.targets[torch.randperm(len(split), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("validator", ["information", "snd"])
def test_labels_of_the_target_change_neither_the_weights_nor_which_are_kept(validator: str) -> None:
    from lab.registry import datamodules

    datamodules.register("shuffled")(Shuffled)
    results = {}
    for name in ("mnist_digits", "shuffled"):
        run = fit({
            "data": {**SMALL, "name": name, "batch_size": 128}, "trainer": {"max_epochs": 4}, "logger": "csv",
            "module": {"name": "dann", "network": {"name": "mlp", "hidden": [16]}, "validator": validator,
                       "entropy_weight": 0.1, "optimizer": {"name": "adam", "lr": 0.01}},
            "callbacks": {"profile": None, "progress": None},
        })  # fmt: skip
        results[name] = (
            load_file(run.stage("main") / "network.safetensors"), run.results["stages"]["main"],
            torch.load(run.stage("main") / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"],
        )  # fmt: skip
    (weights, one, last), (others, other, end) = results.values()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert all(torch.equal(last[key], end[key]) for key in last if not key.startswith("test_"))
    assert abs(one["metrics"]["test/accuracy"] - other["metrics"]["test/accuracy"]) > 0.02
    assert one["metrics"]["test/information"] == other["metrics"]["test/information"]
    assert not one["selected_by_target_labels"]


def test_choosing_by_the_targets_labels_is_said_aloud_and_in_the_results() -> None:
    with pytest.warns(UserWarning, match=f"the weights are chosen by {ORACLE}: by labels of the target"):
        run = fit({
            "data": {**SMALL, "batch_size": 256}, "trainer": {"max_epochs": 1}, "logger": "csv",
            "module": {"name": "dann", "network": {"name": "mlp", "hidden": [8]}},
            "callbacks": {"profile": None, "progress": None, "checkpoints": {"monitor": ORACLE, "mode": "max"}},
        })  # fmt: skip
    found = run.results["stages"]["main"]
    assert found["selected_by_target_labels"]
    assert found["selected_by"] == ORACLE


def test_the_results_say_what_chose_how_the_validators_followed_and_how_far_the_domains_were_apart() -> None:
    run = fit({
        "data": {**SMALL, "batch_size": 128}, "trainer": {"max_epochs": 4}, "logger": "csv",
        "module": {"name": "dann", "network": {"name": "mlp", "hidden": [16]}, "optimizer": "adam"},
        "callbacks": {"profile": None, "progress": None},
    })  # fmt: skip
    found = run.results["stages"]["main"]
    assert found["selected_by"] == "val/information"
    assert found["target_labels"] == "test metrics and the validators' correlation with them"
    assert set(found["a_distance"]) == {"before", "after"}
    assert set(found["validators"]) == {"information", "entropy", "snd"}
    assert all(-1 <= value <= 1 for pair in found["validators"].values() for value in pair.values())
    assert {"train/lambda", "train/domain_accuracy", "test/accuracy", ORACLE} <= set(found["metrics"])
    assert 0 <= found["metrics"]["train/domain_accuracy"] <= 1
    assert (run.stage("main") / "pictures" / "features.png").read_bytes().startswith(b"\x89PNG")


def test_the_domains_are_compared_before_the_first_step_and_with_the_weights_that_are_kept() -> None:
    data, module = digits(batch_size=128), built()
    features = {}
    for when in ("before", "after"):
        if when == "after":
            trained(module, data)
        network = copy.deepcopy(module.network).eval()
        with torch.no_grad():
            features[when] = [network.features(part.val.inputs) for part in (data.source, data.target)]
    module.finish()
    for when, (source, target) in features.items():
        assert module.apart[when] == pytest.approx(a_distance(source, target), abs=1e-9)
        torch.testing.assert_close(module.planes[when], projected(torch.cat([source[:500], target[:500]])))
    assert module.drawn == len(features["after"][0])


def test_correlations_are_those_of_the_series() -> None:
    assert correlations([1.0, 2.0, 4.0], [1.0, 3.0, 9.0]) == {"pearson": pytest.approx(0.995871), "spearman": 1.0}
    assert correlations([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == {"pearson": None, "spearman": None}
    assert correlations([1.0, 2.0], [2.0, 1.0])["spearman"] is None


# Promises


def test_it_keeps_what_modules_promise() -> None:
    check_module(
        DANN,
        {"network": {"name": "mlp", "hidden": [16]}, "hidden": [8], "optimizer": {"name": "adam", "lr": 0.003},
         "entropy_weight": 0.1},
        data=SMALL, promises=("resumes", "opens", "learns"),
    )  # fmt: skip


def test_it_closes_a_part_of_the_gap_that_the_source_alone_leaves() -> None:
    results = {}
    common = {"network": {"name": "mlp", "hidden": [128]}, "optimizer": {"name": "adam", "lr": 0.002}}
    for name, train_on in (("supervised", "source"), ("dann", "both")):
        run = fit({
            "data": {"name": "mnist_digits", "size": 8, "train_on": train_on, "batch_size": 128},
            "trainer": {"max_epochs": 8}, "module": {"name": name, **common}, "logger": "csv",
            "callbacks": {"profile": None, "progress": None},
        })  # fmt: skip
        results[name] = run.results["stages"]["main"]["metrics"]["test/accuracy"]
    assert results["dann"] > results["supervised"] + 0.02, results


class Headless(nn.Module):
    """A network in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Beside(MLP):
    """Answers by something else than its features."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"network": Headless()}, "Headless has no `features` and `head`"),
        ({"network": Beside(10, (1, 8, 8), (4,))}, "Beside's head does not answer by its features"),
        ({"input_shape": None}, "input_shape is needed, and the data does not give it"),
        ({"objective": Regression()}, "Regression is no classification"),
        ({"strength": -1.0}, "greater than or equal to 0"),
        ({"gamma": 0.0}, "greater than 0"),
        ({"hidden": (0,)}, "greater than or equal to 1"),
    ],
    ids=["headless", "beside", "shape", "regression", "strength", "gamma", "hidden"],
)
def test_what_cannot_be_adapted_is_an_error_at_construction(change: dict[str, Any], said: str) -> None:
    given = {"network": MLP(10, (1, 8, 8), (4,)), "objective": Classification(10), "input_shape": (1, 8, 8)}
    with pytest.raises(ValueError, match=said):
        DANN(**{**given, **change})


def test_a_width_is_found_without_moving_statistics() -> None:
    network = ConvNet(10, 1, 4)
    before = copy.deepcopy(network.state_dict())
    assert width_of(network, (1, 8, 8)) == 8
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert isinstance(View(torch.zeros(1), torch.zeros(1)), tuple)


def test_a_training_without_an_end_has_no_lambda() -> None:
    from lab.errors import UserError

    with pytest.raises(UserError, match=r"needs its end: say trainer\.max_epochs or trainer\.max_steps"):
        trained(built(optimizer=partial(SGD, lr=0.1)), digits(), max_epochs=-1)


def test_a_target_without_labels_is_adapted_to_without_a_test(tmp_path: Path) -> None:
    import numpy as np

    images = digits().target.train.inputs[:200].numpy()
    np.savez(tmp_path / "target.npz", inputs=images)
    with pytest.warns(UserWarning, match="test metrics are left out"):
        run = fit({
            "data": {"name": "domains", "source": "digits", "target": {"name": "arrays", "path": "target.npz"}},
            "trainer": {"max_epochs": 3}, "logger": "csv", "callbacks": {"profile": None, "progress": None},
            "module": {"name": "dann", "network": {"name": "mlp", "hidden": [8]}},
        })  # fmt: skip
    found = run.results["stages"]["main"]
    assert not [name for name in found["metrics"] if name.startswith(("test/", "oracle/"))]
    assert "validators" not in found
    assert found["a_distance"]["after"] > 0


def test_the_module_consumes_what_domains_yield() -> None:
    assert DANN.consumes is Domains.yields is SourceTarget


def test_entropy_is_best_low_and_the_other_validators_are_best_high() -> None:
    modes = {validator: built(validator=validator).monitor for validator in ("information", "entropy", "snd", "source")}
    assert modes == {
        "information": ("val/information", "max"), "entropy": ("val/entropy", "min"), "snd": ("val/snd", "max"),
        "source": ("val/source_accuracy", "max"),
    }  # fmt: skip
