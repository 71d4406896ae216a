"""MAML against finite differences, its vectorised form against a loop, and its manners inside a fit."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from lab import fit
from lab.batch import Episodes, Labelled
from lab.callbacks.ema import EMA
from lab.callbacks.execution import Compile
from lab.datamodules.sinusoid import Sinusoid
from lab.errors import UserError
from lab.modules.maml import MAML, adapted, importance
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.objectives.regression import Regression
from lab.registry import callbacks
from lab.testing import check_module
from lab.vectorization import fastest

NORMS = ("none", "batch", "layer", "group", "instance")
SMALL = {"name": "sinusoid", "shots": 5, "queries": 5, "eval_queries": 20, "episodes": 320, "val_episodes": 40,
         "test_episodes": 60}  # fmt: skip
QUIET = {"profile": None, "progress": None}


class Smooth(nn.Module):
    """Two convolutions without a kink, which finite differences would meet."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        layers = {"none": nn.Identity(), "batch": nn.BatchNorm2d(4), "layer": nn.LayerNorm([4, 6, 6]),
                  "group": nn.GroupNorm(2, 4), "instance": nn.InstanceNorm2d(4, affine=True)}  # fmt: skip
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layers[norm], nn.Softplus(), nn.Flatten())
        self.head = nn.Linear(4 * 36, 3)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def tasks(count: int = 3, shape: tuple[int, ...] = (1, 6, 6), ways: int = 3) -> Episodes:
    generator = torch.Generator().manual_seed(1)

    def some(size: int) -> Labelled:
        inputs = torch.randn(count, size, *shape, generator=generator, dtype=torch.float64)
        return Labelled(inputs, torch.arange(size).remainder(ways).expand(count, size), task=torch.arange(count))

    return Episodes(some(2 * ways), some(3 * ways))


def built(network: nn.Module | None = None, kind: Any = MAML, **arguments: Any) -> Any:
    seed_everything(0, verbose=False)
    network = network or Smooth("none")
    return kind(network=network, objective=Classification(3), **{"inner_lr": 0.3, **arguments}).double()


def reference(module: Any, batch: Episodes, weights: dict[str, Tensor], steps: int) -> Tensor:
    """The meta-loss as one writes it for one task after the other."""
    total = torch.zeros((), dtype=torch.float64)
    network = module.network.train()
    for task in range(len(batch)):
        fast = dict(weights)
        for _ in range(steps):
            outputs = functional_call(network, fast, (batch.support.inputs[task],))
            loss = F.cross_entropy(outputs, batch.support.targets[task])
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: w - module.inner_lr * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
        outputs = functional_call(network, fast, (batch.query.inputs[task],))
        total = total + F.cross_entropy(outputs, batch.query.targets[task]) / len(batch)
    return total


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    largest = max(float(tensor.abs().max()) for tensor in other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


# The gradient


@pytest.mark.parametrize("norm", NORMS)
def test_the_second_order_gradient_is_that_of_finite_differences(norm: str) -> None:
    module, batch = built(Smooth(norm), inner_steps=2, execution="vmap", inner_lr=0.05), tasks()
    _, gradients = module.meta_gradient(batch)
    weights = {name: parameter.detach() for name, parameter in module.network.named_parameters()}
    generator, step = torch.Generator().manual_seed(2), 1e-4
    for _ in range(4):
        direction = {n: torch.randn(w.shape, generator=generator, dtype=torch.float64) for n, w in weights.items()}

        def along(distance: float, direction: dict[str, Tensor] = direction) -> float:
            moved = {name: (weight + distance * direction[name]).requires_grad_() for name, weight in weights.items()}
            return float(reference(module, batch, moved, 2).detach())

        near, far = (along(k * step) - along(-k * step) for k in (1, 2))
        expected = (8 * near - far) / (12 * step)  # of fourth order
        found = sum(float((g * d).sum()) for g, d in zip(gradients, direction.values(), strict=True))
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arguments", [{}, {"first_order": True}, {"batch_norm": "task"}, {"learned_rates": "element"},
                                       {"learned_rates": "layer", "per_step_losses": 10}],
                         ids=["second", "first", "task", "element", "layer"])  # fmt: skip
def test_vectorised_and_chunked_and_looped_are_the_same(norm: str, arguments: dict[str, Any]) -> None:
    batch, found = tasks(5), []
    for execution in ({"execution": "loop"}, {"execution": "vmap"}, {"execution": "vmap", "chunk_size": 2}):
        module = built(Smooth(norm), inner_steps=2, test_steps=3, **arguments, **execution)
        loss, gradients = module.meta_gradient(batch)
        found.append([loss, *gradients, *module._answers(batch)])
    assert apart(found[1], found[0]) <= 1e-12
    assert apart(found[2], found[0]) <= 1e-12


def test_the_compiled_step_is_the_same() -> None:
    batch = tasks()
    plain, compiled = (built(Smooth("batch"), inner_steps=2, execution="vmap") for _ in range(2))
    compiled.compile_step({"backend": "eager"})
    one, other = plain.meta_gradient(batch), compiled.meta_gradient(batch)
    assert apart([other[0], *other[1]], [one[0], *one[1]]) <= 1e-12
    assert compiled._execution._programs


def test_the_first_order_gradient_is_the_gradient_at_the_adapted_weights() -> None:
    module, batch = built(inner_steps=3, first_order=True), tasks()
    _, gradients = module.meta_gradient(batch)
    total = [torch.zeros_like(gradient) for gradient in gradients]
    for task in range(len(batch)):
        fast = {
            name: parameter.detach().clone().requires_grad_() for name, parameter in module.network.named_parameters()
        }
        for _ in range(3):
            loss = F.cross_entropy(
                functional_call(module.network, fast, (batch.support.inputs[task],)), batch.support.targets[task]
            )
            found = torch.autograd.grad(loss, list(fast.values()))
            fast = {n: (w - 0.3 * g).detach().requires_grad_() for (n, w), g in zip(fast.items(), found, strict=True)}
        loss = F.cross_entropy(
            functional_call(module.network, fast, (batch.query.inputs[task],)), batch.query.targets[task]
        )
        for sums, part in zip(total, torch.autograd.grad(loss, list(fast.values())), strict=True):
            sums.add_(part / len(batch))
    assert apart(gradients, total) <= 1e-12
    second = built(inner_steps=3).meta_gradient(batch)[1]
    assert apart(gradients, second) > 1e-3


def test_adaptation_of_a_quadratic_is_that_by_hand() -> None:
    """∇ ½(w − c)² is w − c: after n steps w_n − c is (1 − α)ⁿ (w − c), and its derivative by w is (1 − α)ⁿ."""
    start = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    *_, last = adapted(lambda w: 0.5 * (w["w"] - 1.0).square(), {"w": start}, lambda *_: 0.1, 4)
    assert float(last["w"].detach()) == pytest.approx(1 + 0.9**4 * 2, rel=1e-14)
    assert float(torch.autograd.grad(last["w"], start)[0]) == pytest.approx(0.9**4, rel=1e-14)


@pytest.mark.parametrize(("kind", "place"), [("element", (2, 5)), ("layer", (0,)), ("layer", (1,))])
def test_a_learned_rate_has_the_gradient_of_finite_differences(kind: str, place: tuple[int, ...]) -> None:
    batch, step, name, ends = tasks(), 1e-6, "rates.head__weight", []
    module = built(inner_steps=2, learned_rates=kind, execution="vmap")
    names, (_, gradients) = module._trainable, module.meta_gradient(batch)
    for sign in (1, -2):
        module.get_parameter(name).data[place] += sign * step
        ends.append(float(module.meta_gradient(batch)[0]))
    expected = (ends[0] - ends[1]) / (2 * step)
    assert abs(expected) > 1e-6
    assert float(gradients[names.index(name)][place]) == pytest.approx(expected, rel=1e-5)


def test_losses_after_every_step_count_less_and_less() -> None:
    assert importance(0, 10, 4) == [0.25, 0.25, 0.25, 0.25]
    assert importance(5, 10, 4) == [0.125, 0.125, 0.125, 0.625]
    assert importance(10, 10, 4) == [0, 0, 0, 1]
    batch = tasks()
    module = built(inner_steps=2, per_step_losses=4)
    each = [float(built(inner_steps=steps).meta_gradient(batch)[0]) for steps in (1, 2)]
    assert float(module.meta_gradient(batch)[0]) == pytest.approx(sum(each) / 2, rel=1e-12)


# Normalisation


def test_batch_statistics_of_the_task_answer_each_query_for_itself() -> None:
    batch = tasks()
    fewer = Episodes(batch.support, Labelled(batch.query.inputs[:, :2], batch.query.targets[:, :2]))
    same = {}
    for kind in ("transductive", "task"):
        module = built(Smooth("batch"), inner_steps=1, batch_norm=kind, execution="vmap")
        same[kind] = torch.allclose(module._answers(batch)[-1][:, :2], module._answers(fewer)[-1], rtol=0, atol=1e-12)
    assert same == {"transductive": False, "task": True}


def test_running_statistics_are_refused_and_never_touched() -> None:
    with pytest.raises(ValueError, match="running statistics would be a mixture of all tasks"):
        built(Smooth("batch"), batch_norm="running")
    module = built(Smooth("batch"))
    module.meta_gradient(tasks())
    module._answers(tasks())
    assert float(module.network.body[1].running_mean.abs().max()) == 0
    assert int(module.network.body[1].num_batches_tracked) == 0


class Silent(torch.autograd.Function):
    """Right one by one; vectorised its gradient is wrong, and nobody says so."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> Any:
        return 1.01 * x, dims[0]


class Wrong(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Silent.apply(x))


class Branching(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > 0 else -x)


@pytest.mark.parametrize(("network", "said"), [(Wrong, "off by"), (Branching, "vmap")])
def test_a_network_whose_vectorised_form_is_wrong_is_looped_or_refused(network: Any, said: str) -> None:
    batch = tasks()
    with pytest.raises(UserError, match=rf"execution: vmap does not fit this network: .*{said}"):
        built(network("none"), execution="vmap").meta_gradient(batch)
    module = built(network("none"))
    with pytest.warns(UserWarning, match="tasks are computed one by one"):
        found = module.meta_gradient(batch)[1]
    assert module.choices["train"]["chunk"] == 1
    assert apart(found, built(network("none"), execution="loop").meta_gradient(batch)[1]) == 0


def test_what_is_measured_to_be_fastest_is_taken() -> None:
    import time

    asked: list[int] = []

    def measure(count: int, chunk: int) -> list[Tensor]:
        asked.append(chunk)
        time.sleep(0.001 * count * {32: 3, 16: 1, 4: 3, 1: 4}[chunk])
        return []

    choice = fastest(measure, 32)
    assert choice.chunk == 16
    assert set(choice.milliseconds) == set(map(str, (32, 16, 4, 1)))
    assert asked.count(4) == 2


# In a fit


def trained(*extra: Callback, **arguments: Any) -> MAML:
    seed_everything(0, verbose=False)
    settings = {"inner_steps": 1, "execution": "vmap", "optimizer": partial(SGD, lr=0.05), **arguments}
    module = MAML(network=MLP(1, (1,), (16,)), objective=Regression(), **settings)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        accelerator="cpu", limit_val_batches=0, gradient_clip_val=5.0, accumulate_grad_batches=2, callbacks=list(extra),
    )  # fmt: skip
    trainer.fit(module, datamodule=Sinusoid(**{k: v for k, v in SMALL.items() if k != "name"}, batch_size=16))
    return module


def test_clipping_accumulation_and_averages_see_the_meta_gradient() -> None:
    module = trained()
    seed_everything(0, verbose=False)
    network = MLP(1, (1,), (16,))
    optimizer = SGD(network.parameters(), lr=0.05)
    data = Sinusoid(**{k: v for k, v in SMALL.items() if k != "name"}, batch_size=16)
    other = MAML(network=network, objective=Regression(), execution="loop")
    batches, norms = list(data.train_dataloader()), []
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        pairs = zip(other.meta_gradient(first)[1], other.meta_gradient(second)[1], strict=True)
        for parameter, (a, b) in zip(network.parameters(), pairs, strict=True):
            parameter.grad = (a + b) / 2
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), 5.0)))
        optimizer.step()
    for one, two in zip(module.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert min(norms) < 5 < max(norms)
    assert len(trained(EMA(0.5)).network.state_dict()) == len(network.state_dict())


def test_the_compile_callback_compiles_the_whole_step() -> None:
    class Look(Callback):
        programs: ClassVar[int] = 0

        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            Look.programs = len(module._execution._programs)

    plain, compiled = trained(), trained(Compile(backend="eager"), Look())
    assert Look.programs == 1
    assert not compiled._execution._programs
    assert [module.choices["train"]["compiled"] for module in (plain, compiled)] == [False, True]
    for one, two in zip(plain.network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_it_keeps_what_modules_promise() -> None:
    arguments = {"network": {"name": "mlp", "hidden": [16]}, "inner_steps": 2, "learned_rates": "element",
                 "execution": "vmap", "optimizer": {"name": "adam", "lr": 0.01}}  # fmt: skip
    check_module(MAML, arguments, data=SMALL, batch_size=16, promises=("opens",))


def test_a_resumed_run_keeps_its_choice_and_sees_the_same_tasks() -> None:
    from lab import stages

    class Interrupt(Callback):
        watches_only = True
        stop_after: int | None = None
        seen: list[tuple[int, float]]

        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            Interrupt.seen.append((trainer.global_step, float(batch.support.inputs.sum())))
            if trainer.global_step == Interrupt.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

    callbacks.register("interrupt")(Interrupt)
    recipe = {
        "data": {**SMALL, "batch_size": 16}, "trainer": {"max_epochs": 3}, "logger": "csv",
        "module": {"name": "maml", "network": {"name": "mlp", "hidden": [8]}, "execution": "vmap", "chunk_size": 8},
        "callbacks": {**QUIET, "interrupt": {}},
    }  # fmt: skip
    Interrupt.seen, Interrupt.stop_after = [], None
    whole = fit(recipe)
    seen, Interrupt.seen, Interrupt.stop_after = Interrupt.seen, [], 27
    with pytest.raises(stages.Terminated) as stopped:
        fit(recipe, fresh=True)
    Interrupt.stop_after = None
    assert stopped.value.run is not None
    stages.resume(stopped.value.run)
    assert Interrupt.seen == seen
    assert len(set(dict(seen).values())) == len(seen)
    one, other = (run.stage("main") for run in (whole, stopped.value.run))
    weights = [load_file(folder / "network.safetensors") for folder in (one, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for key in ("execution", "adaptation", "metrics"):
        assert results[0][key] == results[1][key]
    assert results[0]["execution"]["train"]["chunk"] == 8


def test_a_test_leaves_figures_after_every_step_a_table_and_pictures() -> None:
    run = fit({
        "data": {**SMALL, "batch_size": 16}, "trainer": {"max_epochs": 6}, "logger": "csv", "callbacks": QUIET,
        "module": {"name": "maml", "network": {"name": "mlp", "hidden": [16]}, "test_steps": 3,
                   "optimizer": {"name": "adam", "lr": 0.01}},
    })  # fmt: skip
    found, folder = run.results["stages"]["main"], run.stage("main")
    assert len(found["adaptation"]) == 4
    assert found["metrics"]["test/mse"] == pytest.approx(found["adaptation"][-1]["mean"], rel=1e-4)
    assert found["metrics"]["test/mse_before"] > found["metrics"]["test/mse"]
    assert found["n_test"] == 60
    lines = (folder / "tables" / "adaptation.csv").read_text().splitlines()
    assert lines[0] == "steps,mse,interval,median"
    assert len(lines) == 5
    assert {path.name for path in (folder / "pictures").iterdir()} >= {"adaptation.png", "tasks.png"}
    assert set(found["execution"]) >= {"train"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"first_order": True, "inner_steps": 0}, "first_order says how the inner steps are learnt from"),
        ({"learned_rates": "layer", "inner_steps": 0}, "learned_rates says how"),
        ({"per_step_losses": 5, "inner_steps": 0}, "per_step_losses says how"),
        ({"inner_lr": 0.0}, "greater than 0"),
        ({"chunk_size": 4, "execution": "loop"}, "chunk_size=4 has no meaning where execution: loop"),
    ],
    ids=["first", "rates", "losses", "rate", "chunk"],
)  # fmt: skip
def test_what_cannot_be_meant_is_an_error_at_construction(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        built(**arguments)


def test_data_without_tasks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"maml learns tasks, such as data: \{name: episodes"):
        built().test_step(Labelled(torch.zeros(2, 1), torch.zeros(2, 1)), 0)
