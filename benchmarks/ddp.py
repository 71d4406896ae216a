"""Two processes on one machine: samples a second of one network at one global batch, and where the time of a step goes.

    python benchmarks/ddp.py [--turns N] [--epochs E]

``convnet`` of 32 channels on mnist5k, Adam, 256 samples a step whatever it is trained on:

- one process with one thread, one process with two, two processes with one thread each (DDP over gloo);
- each through ``lab fit`` (a recipe's ``global_batch_size``, lab's defaults but for validation, the run's own
  ``samples_per_second``), and as a plain loop over the same images with ``torch.nn.parallel``.

A turn runs all six, in turns. The figures are medians over the turns; so are the ratios, of the same turn. Then what a
step of two processes is made of: forward, backward and optimizer on half a batch, alone and beside the other process
that does the same, and an all-reduce of as many numbers as the network has parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

BATCH, WIDTH, ALONE = 256, 32, 30
"""Samples a step, channels, and how often the parts of a step are timed."""
WIDTHS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def images() -> tuple[Tensor, Tensor]:
    """The images that ``mnist5k`` trains on."""
    from lab.datamodules.mnist5k import MNIST5k

    data = MNIST5k(batch_size=BATCH)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    return torch.cat([batch.inputs for batch in batches]), torch.cat([batch.targets for batch in batches])


def network() -> nn.Module:
    from lab.networks.convnet import ConvNet

    torch.manual_seed(0)
    return ConvNet(10, 1, WIDTH)


def lab(processes: int, epochs: int, folder: Path) -> float:
    """Samples a second that a run says."""
    devices = f"accelerator: cpu, devices: {processes}" + (", strategy: ddp" if processes > 1 else "")
    (folder / "recipe.yaml").write_text(f"""
data: {{name: mnist5k, drop_last: true}}
global_batch_size: {BATCH}
trainer: {{max_epochs: {epochs}, limit_val_batches: 0, limit_test_batches: 1, {devices}}}
callbacks: {{progress: null, profile: null}}
logger: csv
module:
  name: supervised
  network: {{name: convnet, width: {WIDTH}}}
  optimizer: {{name: adam, lr: 1e-3}}
""")
    command = [sys.executable, "-m", "lab", "fit", "recipe.yaml", "--fresh", "--out", "runs"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    [results] = folder.glob("runs/*/*/results.json")
    return float(json.loads(results.read_text())["stages"]["main"]["samples_per_second"])


def stepper(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[Tensor], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(chosen: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs.index_select(0, chosen)), targets.index_select(0, chosen)).backward()
        optimizer.step()

    return step


def loop(rank: int, counts: tuple[int, int, int], port: int, file: str) -> None:
    """A process of the plain loop: writes its samples a second, and with several the parts of a step.

    Args:
        counts: processes, threads of each, epochs.
    """
    processes, threads, epochs = counts
    torch.set_num_threads(threads)
    inputs, targets = images()
    model: nn.Module = network()
    if processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=processes, timeout=timedelta(minutes=5)
        )
        model = DistributedDataParallel(model)
    step, each = stepper(model, inputs, targets), BATCH // processes
    steps = len(inputs) // BATCH
    began = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))
        for number in range(steps):
            step(order[number * BATCH + rank * each :][:each])
    found: dict[str, Any] = {"speed": BATCH * steps * epochs / (time.perf_counter() - began)}
    if processes > 1:
        found["parts"] = parts(rank, inputs, targets, each)
        dist.destroy_process_group()
    if rank == 0:
        Path(file).write_text(json.dumps(found))


def parts(rank: int, inputs: Tensor, targets: Tensor, each: int) -> dict[str, float]:
    """Milliseconds of what a step of two processes is made of, medians, on the first of them."""
    model = network()
    step, first = stepper(model, inputs, targets), torch.arange(each)
    gradients = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))

    def timed(call: Callable[[], Any]) -> float:
        spent = []
        for _ in range(ALONE + 3):
            began = time.perf_counter()
            call()
            spent.append(time.perf_counter() - began)
        return 1e3 * statistics.median(spent[3:])

    found = {"bytes": float(gradients.nbytes)}
    for name, ranks, call in (
        ("half a batch, alone", (0,), lambda: step(first)),
        ("half a batch, both at once", (0, 1), lambda: step(first)),
        ("all-reduce", (0, 1), lambda: dist.all_reduce(gradients)),
    ):
        dist.barrier()
        if rank in ranks:
            found[name] = timed(call)
    dist.barrier()
    return found


def plain(processes: int, threads: int, epochs: int, folder: Path) -> dict[str, Any]:
    """What the loop writes, of a process of its own."""
    file = folder / "found.json"
    command = [sys.executable, __file__, "--loop", str(processes), str(threads), str(epochs), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(file.read_text()))


def main(turns: int, epochs: int) -> None:
    speeds: dict[tuple[str, str], list[float]] = {(way, title): [] for way in ("lab", "plain") for title in WIDTHS}
    measured: dict[str, list[float]] = {}
    for turn in range(turns):
        order = list(speeds)
        for way, title in (*order[turn % len(order) :], *order[: turn % len(order)]):
            processes, threads = WIDTHS[title]
            os.environ["OMP_NUM_THREADS"] = str(threads)
            with tempfile.TemporaryDirectory() as folder:
                if way == "lab":
                    speeds[way, title].append(lab(processes, epochs, Path(folder)))
                    continue
                found = plain(processes, threads, epochs, Path(folder))
            speeds[way, title].append(found["speed"])
            for name, value in found.get("parts", {}).items():
                measured.setdefault(name, []).append(value)
    print(f"samples a second, medians of {turns} turns: convnet of {WIDTH} channels, mnist5k, {BATCH} samples a step\n")
    print(f"| {'':26} | lab | to 1 × 1 | plain | to 1 × 1 | lab/plain |\n|---|---|---|---|---|---|")
    alone = next(iter(WIDTHS))
    for title in WIDTHS:
        cells = []
        for way in ("lab", "plain"):
            cells += [
                f"{statistics.median(speeds[way, title]):.0f}",
                f"{ratio(speeds, (way, title), (way, alone)):.2f}",
            ]
        print(f"| {title:26} | {' | '.join(cells)} | {ratio(speeds, ('lab', title), ('plain', title)):.2f} |")
    told(speeds, {name: statistics.median(values) for name, values in measured.items()})


def ratio(speeds: dict[tuple[str, str], list[float]], one: tuple[str, str], other: tuple[str, str]) -> float:
    """The median over turns of one way's speed to another's."""
    return statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))


def told(speeds: dict[tuple[str, str], list[float]], part: dict[str, float]) -> None:
    """What a step of two processes is made of."""
    whole, ddp = (
        1e3 * BATCH / statistics.median(speeds["plain", title])
        for title in ("1 process, 1 thread", "2 processes, 1 thread each")
    )
    half, both, reduced = part["half a batch, alone"], part["half a batch, both at once"], part["all-reduce"]
    print("\n| a step, plain | ms | of the DDP step |\n|---|---|---|")
    for name, value in (
        ("1 process, 1 thread, the whole batch", whole),
        ("half a batch, alone", half),
        ("half a batch, both processes at once", both),
        (f"all-reduce of {part['bytes'] / 1e3:.0f} kB, gloo", reduced),
        ("2 processes, 1 thread each", ddp),
    ):
        print(f"| {name} | {value:.2f} | {value / ddp:.1%} |")
    lost = {
        "computing half a batch, which takes more than half of the time of a whole one": half - whole / 2,
        "the cores' memory and caches, which both processes share": both - half,
        "the all-reduce, and waiting for the slower process": ddp - both,
    }
    print(f"\nOf the {ddp - whole / 2:.2f} ms that a DDP step takes beyond half of a whole one:")
    for name, value in lost.items():
        print(f"- {value:+.2f} ms: {name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loop"]:
        count, threads, epochs = map(int, sys.argv[2:5])
        from lab.launch import free_port

        arguments = ((count, threads, epochs), free_port(), sys.argv[5])
        if count == 1:
            loop(0, *arguments)
        else:
            torch.multiprocessing.spawn(loop, arguments, nprocs=count)
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--turns", type=int, default=5)
        parser.add_argument("--epochs", type=int, default=8)
        said = parser.parse_args()
        main(said.turns, said.epochs)
