"""Meta-iterations a second, second order, beside a loop over tasks as learn2learn's examples have it.

    python benchmarks/maml.py [sinusoid] [convolutions] [--turns N] [--threads N]

learn2learn no longer installs on Python 3.11, so its way is written out: for each task of a batch a clone of the
weights, gradients with ``create_graph``, the query's loss, backward; then a step of Adam. Beside it, on the same tasks
and in turns within one process:

- eager, compiled: lab's meta-gradient and the same step of Adam, nothing else;
- fit: ``lab fit recipes/maml.yaml`` with its defaults (compiled; progress, CSV, checkpoints, validation), and with
  ``callbacks.compile=null``, from the second epoch to the training's end.

Sinusoids: 25 tasks, 10 points, MLP 1-40-40-1, 1 and 5 inner steps. Convolutions: four of 64 channels with batch
normalisation on 28×28 glyphs, 5-way, one inner step, as many queries as shots; ``execution: auto`` chooses. Figures are
medians over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.func import functional_call

from lab import fit, registry
from lab.batch import Episodes
from lab.datamodules.episodes import Episodes as EpisodesData
from lab.datamodules.glyphs import Glyphs
from lab.datamodules.sinusoid import Sinusoid
from lab.modules.maml import MAML
from lab.networks.conv4 import Conv4
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.objectives.regression import Regression

RECIPE = Path(__file__).parents[1] / "recipes" / "maml.yaml"
ROW = "| {:34} | {:>8} | {:>8} | {:>8} | {:>7} | {:>7} | {:>8} | {:>8} | {:>7} | {:>7} |"


def looped(
    network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], rate: float, steps: int
) -> Callable[[Episodes], None]:
    """One meta-iteration, task after task."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def iteration(batch: Episodes) -> None:
        optimizer.zero_grad()
        for task in range(len(batch)):
            fast = {name: weight.clone() for name, weight in network.named_parameters()}
            for _ in range(steps):
                error = loss(functional_call(network, fast, (batch.support.inputs[task],)), batch.support.targets[task])
                gradients = torch.autograd.grad(error, list(fast.values()), create_graph=True)
                fast = {n: w - rate * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
            error = loss(functional_call(network, fast, (batch.query.inputs[task],)), batch.query.targets[task])
            (error / len(batch)).backward()
        optimizer.step()

    return iteration


def labs(module: MAML, *, compiled: bool) -> Callable[[Episodes], None]:
    """One meta-iteration of lab's."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
    module._watch = lambda terms: None  # type: ignore[method-assign]  # a trainer logs
    if compiled:
        module.compile_step({})

    def iteration(batch: Episodes) -> None:
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return iteration


def in_turns(
    ways: dict[str, Callable[[Episodes], None]], batches: list[Episodes], turns: int, seconds: float
) -> dict[str, float]:
    """Iterations a second of each way."""
    for way in ways.values():
        way(batches[0]), way(batches[1])  # compiled, chosen, warm
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            spent: list[float] = []
            while sum(spent) < seconds or len(spent) < 2:
                began = time.perf_counter()
                way(batches[len(spent) % len(batches)])
                spent.append(time.perf_counter() - began)
            found[name].append(1 / statistics.median(spent))
    return {name: statistics.median(values) for name, values in found.items()}


class Clock(Callback):
    """Training steps a second from the second epoch on."""

    watches_only = True
    speed = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.began, self.step = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Clock.speed = (trainer.global_step - self.step) / (time.perf_counter() - self.began)


def fitted(steps: int, turns: int, *, compiled: bool) -> float:
    registry.callbacks.register("clock")(Clock)
    found = []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            said = [f"module.inner_steps={steps}", "trainer.max_epochs=3", "callbacks.clock={}", "logger=csv",
                    f"data.episodes={25 * (1500 if steps == 1 else 500)}"]  # fmt: skip
            fit(RECIPE, said if compiled else [*said, "callbacks.compile=null"], out=folder, fresh=True)
        found.append(Clock.speed)
    return statistics.median(found)


def sinusoids(turns: int) -> None:
    batches = list(islice(Sinusoid().train_dataloader(), 64))
    for steps in (1, 5):
        networks = [MLP(1, (1,), (40, 40)) for _ in range(3)]
        given: dict[str, Any] = {"objective": Regression(), "inner_steps": steps}
        ways = {
            "loop": looped(networks[0], F.mse_loss, 0.01, steps),
            "eager": labs(MAML(network=networks[1], **given), compiled=False),
            "compiled": labs(MAML(network=networks[2], **given), compiled=True),
        }
        speed = in_turns(ways, batches, turns, 1.0)
        speed["fit"], speed["fit eager"] = (fitted(steps, max(turns // 2, 1), compiled=flag) for flag in (True, False))
        cells = [f"{speed['loop']:.0f}"]
        for pair in (("eager", "compiled"), ("fit eager", "fit")):
            cells += [f"{speed[way]:.0f}" for way in pair]
            cells += [f"{speed[way] / speed['loop']:.1f}×" for way in pair]
        print(ROW.format(f"sinusoid, 25 tasks, {steps} step{'s' * (steps > 1)}", *cells), flush=True)


def convolutions(turns: int) -> None:
    for shots in (1, 5):
        for tasks in (4, 32):
            data = EpisodesData(source=Glyphs(faces=12), shots=shots, queries=shots, batch_size=tasks, val_episodes=0)
            data.prepare_data()
            data.setup()
            batches = list(islice(data.train_dataloader(), 2))
            networks = [Conv4(5, (1, 28, 28)) for _ in range(2)]
            module = MAML(network=networks[1], objective=Classification(5), inner_lr=0.4)
            ways = {"loop": looped(networks[0], F.cross_entropy, 0.4, 1), "lab": labs(module, compiled=False)}
            speed = in_turns(ways, batches, turns, 1.0)
            choice = module.choices["train"]
            print(ROW.format(
                f"conv4, 5-way {shots}-shot, {tasks} tasks", f"{speed['loop']:.2f}", f"{speed['lab']:.2f}", "",
                f"{speed['lab'] / speed['loop']:.2f}×", *[""] * 5,
            ), f"chunk {choice['chunk']} of {choice['milliseconds']} ms a task", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["sinusoid", "convolutions", []], default=[])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seed_everything(0, verbose=False)
    print(f"iterations a second, medians of {options.turns} turns, {options.threads} thread(s)\n")
    print(ROW.format("", "loop", "eager", "compiled", "/loop", "/loop", "fit eager", "fit", "/loop", "/loop"))
    print("|---" * 10 + "|", flush=True)
    if "sinusoid" in options.what or not options.what:
        sinusoids(options.turns)
    if "convolutions" in options.what or not options.what:
        convolutions(options.turns)


if __name__ == "__main__":
    main()
