"""What all techniques on streams share, and each of them against its equations."""

from __future__ import annotations

import copy
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR

from lab import fit, stages
from lab.batch import Tasks
from lab.datamodules.digits import Digits
from lab.datamodules.permuted import Permuted
from lab.datamodules.split import Split
from lab.modules.continual import Continual, transfer
from lab.modules.ewc import EWC
from lab.modules.joint import Joint
from lab.modules.lwf import LwF
from lab.modules.mas import MAS
from lab.modules.naive import Naive
from lab.modules.replay import Replay, balanced, reservoir
from lab.modules.si import SI
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.registry import callbacks

KINDS: dict[str, type[Continual]] = {
    "naive": Naive, "joint": Joint, "ewc": EWC, "si": SI, "mas": MAS, "lwf": LwF, "replay": Replay,
}  # fmt: skip
PENALISED = {name: kind for name, kind in KINDS.items() if name in ("ewc", "si", "mas", "lwf")}


def permuted(tasks: int = 3, **source: Any) -> Permuted:
    return Permuted(Digits(**{"batch_size": 128, **source}), tasks=tasks)


def split(scenario: Any, tasks: int = 3) -> Split:
    return Split(Digits(batch_size=128), tasks=tasks, scenario=scenario)


def built(kind: type[Continual], data: Any, network: nn.Module | None = None, **arguments: Any) -> Any:
    data.setup("fit")
    seed_everything(0, verbose=False)
    network = network or MLP(data.num_classes, (1, 8, 8), (32,))
    facts = {"tasks": data.tasks, "scenario": data.scenario, "heads": data.heads}
    given = {"optimizer": partial(Adam, lr=0.003), **arguments}
    return kind(network=network, objective=Classification(data.num_classes), **facts, **given)


def trained(module: Any, data: Any, *callbacks: Callback, **arguments: Any) -> Any:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        **{**settings, "enable_progress_bar": False, "accelerator": "cpu", **arguments}, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=data)
    return module


def accuracies(module: Continual, data: Any) -> list[float]:
    """Of the network as it is, on every task's test samples; without lab's loaders and masks."""
    found = []
    for task in range(data.tasks):
        places = data._places("test", [task])
        samples = data.source.test[places % len(data.source.test)]
        with torch.no_grad():
            outputs = copy.deepcopy(module.network).eval()(data.changed(samples.inputs, task))
        found.append(float((outputs.argmax(1) == samples.targets).float().mean()))
    return found


class Snapshots(Callback):
    """The accuracies before training and at the end of every epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(accuracies(pl_module, trainer.datamodule))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(accuracies(pl_module, trainer.datamodule))


# The matrix


def test_the_measures_are_those_of_their_equations() -> None:
    matrix = torch.tensor([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.5, 0.9, 0.7]])
    found = transfer(matrix, torch.tensor([0.1, 0.15, 0.05]))
    expected = {
        "average": (0.5 + 0.9 + 0.7) / 3,
        "bwt": ((0.5 - 0.9) + (0.9 - 0.8)) / 2,
        "fwt": ((0.2 - 0.15) + (0.3 - 0.05)) / 2,
        "forgetting": ((0.9 - 0.5) + (0.8 - 0.9)) / 2,
    }
    assert found == pytest.approx(expected)


def test_what_was_not_measured_is_left_out() -> None:
    matrix = torch.full((3, 3), torch.nan)
    matrix[-1] = torch.tensor([0.5, 0.6, 0.7])
    assert transfer(matrix, torch.zeros(3)) == pytest.approx({"average": 0.6})
    assert transfer(torch.tensor([[0.5]]), torch.zeros(1)) == pytest.approx({"average": 0.5})


def test_the_matrix_has_the_accuracy_on_every_task_after_every_task() -> None:
    data, seen = permuted(), Snapshots()
    module = trained(built(Naive, data), data, seen)
    torch.testing.assert_close(module.before, torch.tensor(seen.seen[0]))
    torch.testing.assert_close(module.matrix, torch.tensor(seen.seen[2::2]))
    assert float(module.matrix.diagonal().min()) > 0.5


def test_joint_learns_all_tasks_and_has_the_last_row_alone() -> None:
    data = permuted()
    module = trained(built(Joint, data), data, max_epochs=4)
    assert module.matrix[:2].isnan().all()
    assert float(module.matrix[2].min()) > 0.6


def test_what_is_tested_is_the_last_row_and_its_measures_are_logged() -> None:
    data = permuted()
    module = built(Naive, data)
    trained(module, data)
    rows = module.matrix.clone()
    logged = module.trainer.test(module, datamodule=data, verbose=False)[0]
    torch.testing.assert_close(module.matrix, rows)
    assert logged["test/average"] == pytest.approx(float(rows[-1].mean()), abs=1e-6)
    assert logged["test/accuracy"] == pytest.approx(logged["test/average"], abs=1e-6)
    assert {name: logged[f"test/{name}"] for name in ("bwt", "fwt", "forgetting")} == pytest.approx(
        {k: v for k, v in transfer(rows, module.before).items() if k != "average"}, abs=1e-6
    )


# Tasks


def test_every_task_begins_with_a_new_optimizer_and_a_schedule_of_its_own() -> None:
    rates: list[tuple[float, float]] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            state = trainer.optimizers[0].state
            rates.append((trainer.optimizers[0].param_groups[0]["lr"], float(next(iter(state.values()))["step"])))

    data = permuted()
    module = built(Naive, data, scheduler=partial(OneCycleLR, max_lr=0.01))
    trained(module, data, Rates())
    steps = len(rates) // 3
    assert [step for _, step in rates] == [*range(1, steps + 1)] * 3
    assert [rate for rate, _ in rates[:steps]] == [rate for rate, _ in rates[steps : 2 * steps]]
    assert max(rate for rate, _ in rates[:steps]) == pytest.approx(0.01, rel=0.05)
    assert rates[steps - 1][0] < rates[0][0]


@pytest.mark.parametrize("policy", ["freeze", "adapt"])
def test_batch_normalisation_keeps_the_first_tasks_statistics_unless_it_is_to_adapt(policy: Any) -> None:
    after: list[Tensor] = []

    class Statistics(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            after.append(torch.cat([b.float().flatten() for b in pl_module.network.buffers()]).clone())

    data = permuted(tasks=2)
    trained(built(Naive, data, ConvNet(10, 1, 4), batch_norm=policy), data, Statistics(), max_epochs=1)
    assert torch.equal(*after) == (policy == "freeze")


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_outputs_that_are_not_asked_neither_learn_nor_answer(scenario: Any) -> None:
    data = split(scenario)
    module = built(Naive, data, optimizer=partial(SGD, lr=0.1))
    heads = module.network.head.weight
    after: list[Tensor] = [heads.detach().clone()]

    class Heads(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            after.append(heads.detach().clone())

    trained(module, data, Heads(), max_epochs=1)
    for task in range(3):
        moved = (after[task + 1] - after[task]).abs().sum(1) > 0
        asked = data.heads[task] if scenario == "task" else [c for head in data.heads[: task + 1] for c in head]
        assert moved.nonzero().squeeze(1).tolist() == sorted(asked)
    batch = next(iter(data.of_tasks("test", [1])))
    answers = module.answers(batch)
    named = [data.heads[1]] if scenario == "task" else data.heads
    assert answers.isfinite().nonzero()[:, 1].unique().tolist() == sorted(c for head in named for c in head)


def test_a_task_scenario_is_judged_among_the_tasks_own_classes() -> None:
    data = split("task", tasks=5)
    module = trained(built(Naive, data), data)
    alone = []
    for task, head in enumerate(data.heads):
        batch = next(iter(data.of_tasks("test", [task])))
        with torch.no_grad():
            chosen = torch.tensor(head)[module.network(batch.inputs)[:, head].argmax(1)]
        alone.append(float((chosen == batch.targets).float().mean()))
    torch.testing.assert_close(module.matrix[-1], torch.tensor(alone))


def test_the_class_scenario_has_no_answers_for_tasks_to_come() -> None:
    data = split("class")
    module = trained(built(Naive, data), data)
    assert module.matrix.isnan().tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    assert "fwt" not in transfer(module.matrix, module.before)


# Each technique


@pytest.mark.parametrize("name", PENALISED)
def test_without_strength_it_is_naive_bit_by_bit(name: str) -> None:
    plain, other = (
        trained(built(kind, data, **arguments), data).network.state_dict()
        for kind, arguments, data in [(Naive, {}, permuted()), (KINDS[name], {"strength": 0.0}, permuted())]
    )
    assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("name", [*PENALISED, "replay"])
def test_it_forgets_less_than_naive(name: str) -> None:
    strengths = {"ewc": 100.0, "si": 0.3, "mas": 0.1, "lwf": 1.0}
    arguments = {"strength": strengths[name]} if name in strengths else {}
    naive, other = (
        trained(built(kind, data, MLP(10, (1, 8, 8), (100,)), **more), data, max_epochs=10)
        for kind, more, data in [(Naive, {}, permuted()), (KINDS[name], arguments, permuted())]
    )
    measures = [transfer(module.matrix, module.before) for module in (other, naive)]
    assert measures[0]["forgetting"] < measures[1]["forgetting"] - 0.01


@pytest.mark.parametrize("name", ["ewc", "mas", "si"])
def test_the_penalty_is_a_quadratic_around_what_was(name: str) -> None:
    data = permuted(tasks=2)
    module = trained(built(KINDS[name], data, strength=3.0), data, max_epochs=1)
    module.importance, module.anchor = (torch.rand_like(module.importance) for _ in range(2))
    weights = torch.cat([p.detach().reshape(-1) for p in module.network.parameters()])
    expected = 3.0 * (module.importance * (weights - module.anchor) ** 2).sum() * (0.5 if name == "ewc" else 1.0)
    assert float(expected) > 0
    torch.testing.assert_close(module.penalty(), expected)


class Consolidated(Callback):
    """The weights at each task's end, and what the module's buffers were then."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.importances: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before the module's own."""
        self.weights.append(pl_module.weights().detach().clone())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.importances.append(pl_module.importance.clone())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.importances.append(pl_module.importance.clone())


def test_ewcs_one_quadratic_is_the_sum_of_all_tasks() -> None:
    data, seen = permuted(tasks=4), Consolidated()
    module = trained(built(EWC, data, strength=50.0).double(), data, seen, max_epochs=1, precision="64-true")
    informations = [after - before for before, after in zip(seen.importances, seen.importances[1:], strict=False)]
    assert len(informations) == 4
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(3):
        theta = module.anchor + 0.1 * torch.randn(len(module.anchor), generator=generator, dtype=torch.float64)
        apart = sum((f * (theta - w) ** 2).sum() for f, w in zip(informations, seen.weights, strict=True))
        values.append(float(apart - (module.importance * (theta - module.anchor) ** 2).sum()))
    assert values[0] > 0
    assert values == pytest.approx([values[0]] * 3, rel=1e-8)  # they differ by a constant


def test_online_ewc_forgets_old_information_and_is_centred_on_the_last_weights() -> None:
    data, seen = permuted(tasks=3), Consolidated()
    module = built(EWC, data, online=True, gamma=0.5)
    found: list[Tensor] = []
    information = module.information
    module.information = lambda task: found.append(information(task)) or found[-1]
    trained(module, data, seen, max_epochs=1)
    torch.testing.assert_close(module.importance, 0.25 * found[0] + 0.5 * found[1] + found[2])
    assert torch.equal(module.anchor, seen.weights[-1])


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_ewcs_information_is_the_mean_of_squared_gradients_of_single_samples(kind: Any) -> None:
    data = permuted(tasks=2, labels=40)
    module = trained(built(EWC, data, fisher=kind), data, max_epochs=1)
    found = module.information(1)
    parameters = list(module.network.parameters())
    total = torch.zeros_like(found)
    samples = [batch[i : i + 1] for batch in data.of_tasks("train", [1]) for i in range(len(batch))]
    assert len(samples) == 40
    for sample in samples:
        scores = module.network(sample.inputs).log_softmax(1)[0]
        for c in [int(sample.targets)] if kind == "empirical" else range(10):
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(scores[c], parameters, retain_graph=True)])
            total += gradient.square() * (1.0 if kind == "empirical" else scores[c].exp().detach()) / len(samples)
    if kind == "sampled":  # one class of each sample: the same in the mean alone
        assert float(found.sum() / total.sum()) == pytest.approx(1, abs=0.5)
        assert not torch.allclose(found, total)
    else:
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-9)


def test_information_counts_the_outputs_that_are_asked_alone() -> None:
    data = split("task")
    module = trained(built(EWC, data), data, max_epochs=1)
    rows = module.information(1)[-(10 * 33) : -10].reshape(10, 32).sum(1)
    assert (rows > 0).nonzero().squeeze(1).tolist() == data.heads[1]
    assert bool(module.importance.isfinite().all())


def test_information_of_some_samples_is_near_that_of_all() -> None:
    data = permuted(tasks=2)
    module = trained(built(EWC, data, samples=200), data)
    some = module.information(0)
    module.samples = None
    everything = module.information(0)
    assert not torch.equal(some, everything)
    assert float(some.sum() / everything.sum()) == pytest.approx(1, abs=0.3)


def test_sis_importance_is_the_path_of_the_task_alone_by_hand() -> None:
    data = permuted(tasks=2)
    module = built(SI, data, strength=2.0, damping=0.1, optimizer=partial(SGD, lr=0.05, momentum=0.9)).double()
    trained(module, data, max_epochs=1, precision="64-true")
    again = built(SI, data).double()
    parameters = list(again.network.parameters())
    flat = lambda: torch.cat([p.detach().reshape(-1) for p in parameters]).clone()  # noqa: E731
    importance, anchor = torch.zeros_like(flat()), flat()
    for task in range(2):
        data.trainer = None
        optimizer = SGD(parameters, lr=0.05, momentum=0.9)
        path, begin = torch.zeros_like(anchor), flat()
        loader = data._loader("train", data._places("train", [task]), 128, shuffle=True, seed=0)
        loader.set_epoch(task)
        for batch in loader:
            before = flat()
            loss = F.cross_entropy(again.network(batch.inputs.double()), batch.targets)
            own = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
            gradient = own + 2 * 2.0 * importance * (before - anchor)
            for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.reshape(parameter.shape)
            optimizer.step()
            path -= own * (flat() - before)
        importance = importance + path.clamp(min=0) / ((flat() - begin) ** 2 + 0.1)
        anchor = flat()
    torch.testing.assert_close(module.importance, importance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(module.anchor, anchor, rtol=1e-9, atol=1e-12)
    assert float(importance.min()) >= 0 < float(importance.max())


def test_mas_counts_how_much_the_outputs_length_depends_on_a_weight() -> None:
    data = permuted(tasks=2, labels=30)
    module = trained(built(MAS, data), data, max_epochs=1)
    before = module.importance.clone()
    module.learnt(1)
    parameters, total = list(module.network.parameters()), torch.zeros_like(before)
    batch = next(iter(data.of_tasks("train", [1])))
    for i in range(len(batch)):
        length = module.network(batch.inputs[i : i + 1]).square().sum()
        total += torch.cat([g.abs().reshape(-1) for g in torch.autograd.grad(length, parameters)]) / len(batch)
    torch.testing.assert_close(module.importance - before, total, rtol=1e-4, atol=1e-6)


def test_lwf_answers_of_the_network_before_are_the_targets_of_the_outputs_before() -> None:
    data = split("task")
    module = trained(built(LwF, data, strength=0.7, temperature=3.0), data, max_epochs=1)
    torch.manual_seed(0)
    for parameter in module.network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    module.task, module.trainer.state.fn = 2, "fit"
    batch = next(iter(data.of_tasks("train", [2])))
    new, old = module.network(batch.inputs), module.old(batch.inputs)
    kept = sum(
        9 * F.kl_div((new[:, h] / 3).log_softmax(1), (old[:, h] / 3).softmax(1), reduction="batchmean")
        for h in data.heads[:2]
    )
    task = F.cross_entropy(new[:, data.heads[2]], batch.targets - data.heads[2][0])
    torch.testing.assert_close(module.loss(batch).loss, task + 0.7 * kept)
    assert float(kept.detach()) > 0


def test_a_reservoir_has_each_sample_as_likely_and_shrinks_by_leaving_some_out() -> None:
    places = torch.arange(1000)
    counts = torch.zeros(1000)
    for seed in range(400):
        counts[reservoir(places, 100, seed)] += 1
    expected, spread = 40.0, math.sqrt(400 * 0.1 * 0.9)
    assert float((counts - expected).abs().max()) < 5 * spread
    assert float(((counts - expected) ** 2).mean()) == pytest.approx(spread**2, rel=0.2)
    now, later = reservoir(places[:500], 100, 0), reservoir(places, 100, 0)
    assert {place for place in later.tolist() if place < 500} <= set(now.tolist())
    assert len(reservoir(places[:30], 100, 0)) == 30


def test_a_balanced_memory_gives_what_a_small_group_leaves_to_the_others() -> None:
    groups = torch.tensor([0] * 50 + [1] * 3 + [2] * 47)
    chosen = balanced(torch.arange(100) + 1000, groups, 23, 0) - 1000
    assert groups[chosen].bincount().tolist() == [10, 3, 10]
    assert len(chosen.unique()) == 23


def test_replay_learns_from_the_mean_over_new_and_remembered_samples() -> None:
    data = permuted()
    module = trained(built(Replay, data, memory=60), data, max_epochs=1)
    module.task, module.trainer.state.fn = 2, "fit"
    memory = module.remembered()
    assert sorted(set(memory.task.tolist())) == [0, 1]
    assert (memory.task * 10 + memory.targets).bincount().tolist() == [3] * 20
    batch = next(iter(data.of_tasks("train", [2])))[:32]
    old = module.recalled(batch)
    assert set(old.index.tolist()) <= set(memory.index.tolist())
    both = torch.cat([module.network(batch.inputs), module.network(old.inputs)])
    expected = F.cross_entropy(both, torch.cat([batch.targets, old.targets]))
    torch.testing.assert_close(module.loss(batch).loss, expected)
    assert isinstance(old, Tasks)


class Interrupting(Callback):
    """Asks the process to stop in the middle of the last task but one."""

    watches_only = True
    after = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == Interrupting.after:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_that_was_left_in_a_task_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    callbacks.register("interrupting")(Interrupting)
    recipe = {
        "data": {"name": "split", "source": {"name": "digits", "batch_size": 64}, "tasks": 4, "scenario": "class"},
        "module": {"name": name, "network": {"name": "mlp", "hidden": [16]}, "optimizer": "adam"},
        "trainer": {"max_epochs": 2}, "logger": "csv", "callbacks": {"profile": None, "interrupting": {}},
    }  # fmt: skip
    Interrupting.after = 0
    whole = fit(recipe)
    Interrupting.after = 25 if name != "joint" else 10
    with pytest.raises(stages.Terminated) as stopped:
        fit(recipe, fresh=True)
    Interrupting.after = 0
    left = stopped.value.run
    assert left is not None
    stages.resume(left)
    for file in ("network.safetensors",):
        one, other = (load_file(run.stage("main") / file) for run in (whole, left))
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (run.results["stages"]["main"] for run in (whole, left))
    assert {key: one[key] for key in ("matrix", "before", "metrics")} == {
        key: other[key] for key in ("matrix", "before", "metrics")
    }
    assert (left.stage("main") / "pictures" / "tasks.png").exists()


def test_a_finished_run_is_tested_with_all_its_tasks_and_its_matrix(tmp_path: Path) -> None:
    from lab.assemble import open_stage

    recipe = {
        "data": {"name": "split", "source": {"name": "digits"}, "tasks": 5, "scenario": "class"},
        "module": {"name": "naive", "network": {"name": "mlp", "hidden": [16]}},
        "trainer": {"max_epochs": 1}, "logger": "csv", "callbacks": {"profile": None},
    }  # fmt: skip
    run = fit(recipe)
    opened, trainer = open_stage(run, None)
    logged = trainer.test(opened.module, datamodule=opened.data, verbose=False)[0]
    kept = run.results["stages"]["main"]["metrics"]
    assert logged == pytest.approx({name: kept[name] for name in logged}, abs=1e-6)
    assert "test/bwt" in logged


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (EWC, {"strength": -1.0}, "greater than or equal to 0"),
        (EWC, {"gamma": 0.5}, "say online: true too"),
        (Naive, {"heads": [[0, 1]], "tasks": 2}, "1 heads for 2 tasks"),
    ],
    ids=["negative", "gamma", "heads"],
)
def test_arguments_out_of_range_are_errors(kind: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kind(network=MLP(10, (1, 8, 8), (4,)), objective=Classification(10), **arguments)


def test_label_smoothing_over_heads_of_other_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="label smoothing has no meaning"):
        Naive(network=MLP(10, (1, 8, 8), (4,)), objective=Classification(10, 0.1), heads=[[0, 1]], tasks=1)


def test_a_head_that_is_too_small_is_told_what_the_stream_needs() -> None:
    data = split("class")
    with pytest.raises(ValueError, match=r"outputs have shape \[\d+, 4\], the stream needs 10 outputs"):
        trained(built(Naive, data, MLP(4, (1, 8, 8), (8,))), data)
