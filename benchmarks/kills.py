"""Whether a run that is killed at any moment and resumed ends as one that never was: `python benchmarks/kills.py`.

A recipe is trained once undisturbed. Then, again and again, it is trained in a process that kills itself (SIGKILL, so
that nothing can be tidied up) at a random moment of one phase: in a training step, in a validation, while a checkpoint
is written, between two stages. What is left is resumed, and compared: every stage's network and checkpoints, tensor by
tensor, bit for bit; its metrics; every row of metrics.csv. Batches are counted, to see how many were trained twice.

Processes are forked after everything is imported, so that forty kills take minutes.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer import call

from lab import Run, artifact, assemble, files, stages, training
from lab.api import load_recipe
from lab.callbacks.checkpoints import Checkpoints
from lab.verification import differences

PHASES = ("training", "validation", "writing", "between")
SHORTENED = (
    "trainer.max_epochs=3", "trainer.limit_train_batches=12", "callbacks.checkpoints.every_seconds=0.02",
    "callbacks.progress=null", "callbacks.profile=null", "logger=csv",
)  # fmt: skip
LONGEST_DELAY = {"training": 0.004, "validation": 0.004, "writing": 0.006, "between": 0.1}
"""Seconds within which a kill comes after its phase was entered."""


class Counts:
    """What several processes count together."""

    def __init__(self) -> None:
        self.batches = multiprocessing.Value("q", 0)
        self.kept = multiprocessing.Value("q", 0)
        self.phases = {phase: multiprocessing.Value("q", 0) for phase in PHASES}


def watch(counts: Counts, phase: str | None = None, occurrence: int = 0, delay: float = 0.0) -> None:
    """Count what happens in this process, and kill it in the given occurrence of a phase."""

    def entered(name: str) -> None:
        counts.phases[name].value += 1
        if name == phase and counts.phases[name].value == occurrence:
            threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL))).start()

    def wrap(owner: Any, name: str, before: Callable[..., None], after: Callable[[], None] | None = None) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            before(*arguments)
            result = original(*arguments, **named)
            if after is not None:
                after()
            return result

        setattr(owner, name, wrapped)

    def hook(trainer: Trainer, name: str, *_: Any) -> None:
        if name == "training_step":
            counts.batches.value += 1
            entered("training")
        elif name == "validation_step":
            entered("validation")

    @contextmanager
    def replacing(path: Path) -> Any:
        if path.suffix == ".ckpt":
            entered("writing")
        with original_replacing(path) as temporary:
            yield temporary

    original_replacing = files.replacing
    for module in (files, artifact, __import__("lab.callbacks.checkpoints").callbacks.checkpoints):
        module.replacing = replacing
    wrap(call, "_call_strategy_hook", hook)
    wrap(Checkpoints, "keep", lambda *_: None, lambda: setattr(counts.kept, "value", counts.batches.value))
    between = (Trainer, "test"), (artifact, "save"), (Run, "record"), (training, "build"), (assemble, "fetch")
    for owner, name in between:
        wrap(owner, name, lambda *_: entered("between"))


def forked(action: Callable[[], None]) -> int:
    """The exit status of a child process that does something; negative: the signal that killed it."""
    if (child := os.fork()) == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def the_run(out: Path) -> Run:
    return Run(next(out.glob("*/*/manifest.json")).parent)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def compare(one: Run, other: Run) -> list[str]:
    """Where two runs of one recipe differ."""
    found = [] if other.status == one.status else [f"status {other.status}"]
    for name in one.results["stages"]:
        for file in ("network.safetensors", "network.json"):
            if (one.stage(name) / file).read_bytes() != (other.stage(name) / file).read_bytes():
                found.append(f"{name}/{file}")
        for path in sorted((one.stage(name) / "checkpoints").iterdir()):
            beside = other.stage(name) / "checkpoints" / path.name
            pair = [torch.load(p, weights_only=True) if p.exists() else None for p in (path, beside)]
            found += differences(*pair, f"{name}/{path.name}")
        found += differences(*(rows(run.stage(name) / "metrics.csv") for run in (one, other)), f"{name}/metrics.csv")
        pair = [run.results["stages"].get(name, {}).get("metrics") for run in (one, other)]
        found += differences(*pair, f"{name} metrics")
    return found


def trial(plan: Any, reference: Run, totals: Counts, phase: str, dice: random.Random) -> tuple[bool, int]:
    """One kill: whether the resumed run is the same, and how many batches were trained again."""
    with tempfile.TemporaryDirectory() as folder:
        out, counts = Path(folder), Counts()
        occurrence = dice.randint(1, totals.phases[phase].value)
        delay = dice.uniform(0, LONGEST_DELAY[phase])

        def killed() -> None:
            watch(counts, phase, occurrence, delay)
            stages.fit(plan, out=out)

        def resumed() -> None:
            watch(counts)
            stages.resume(the_run(out))

        status = forked(killed)
        at, kept = counts.batches.value, counts.kept.value
        if status == 0:
            return True, 0  # it was over before the kill came
        if status != -signal.SIGKILL:
            raise SystemExit(f"the run ended by itself with {status}")
        if not list(out.glob("*/*/results.json")):  # killed before there was a run
            return True, 0
        if the_run(out).status not in ("finished", "gated") and (failed := forked(resumed)):
            raise SystemExit(f"resuming ended with {failed}")
        found = compare(reference, the_run(out))
        again = counts.batches.value - totals.batches.value
        fine = not found and again <= at - kept
        if not fine:
            print(
                f"{phase} {occurrence} +{delay * 1e3:.1f} ms: trained again {again}, kept {kept} of {at}; {found[:5]}"
            )
        return fine, again


def ranks_of(process: int) -> list[int]:
    """The processes that one has started."""
    children = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def distributed_trial(plan: Any, reference: Run, dice: random.Random) -> tuple[bool, float]:
    """One of two processes killed in mid-training: whether the resumed run is the same, and seconds until it ended."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if (parent := os.fork()) == 0:
            try:
                stages.fit(plan, out=out, fresh=True)
            except stages.StageFailed as failure:
                print(f"  {failure}", flush=True)
                os._exit(1)
            os._exit(0)
        while not list(out.glob("*/*/*/checkpoints/last.ckpt")):
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 3))
        os.kill(dice.choice(ranks_of(parent)), signal.SIGKILL)
        began = time.monotonic()
        status = os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1])
        took = time.monotonic() - began
        if status != 1 or the_run(out).status != "failed":
            print(f"  ended with {status}, the run is {the_run(out).status}")
            return False, took
        if forked(lambda: (stages.resume(the_run(out)), None)[1]):
            return False, took
        found = compare(reference, the_run(out))
        if found:
            print(f"  differs in {found[:5]}")
        return not found, took


def distributed(options: argparse.Namespace, overrides: list[str], dice: random.Random) -> None:
    """Kill one of two processes, as often as asked."""
    on_two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
    plan = load_recipe(options.recipe, [*overrides, *on_two])
    with tempfile.TemporaryDirectory() as folder:
        if forked(lambda: (stages.fit(plan, out=Path(folder)), None)[1]):
            raise SystemExit("the undisturbed run failed")
        tried = [distributed_trial(plan, the_run(Path(folder)), dice) for _ in range(options.kills)]
    same = sum(fine for fine, _ in tried)
    print(f"two processes, one killed: {same}/{options.kills} the same; ended within {max(t for _, t in tried):.1f} s")
    raise SystemExit(same != options.kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="distill")
    parser.add_argument("overrides", nargs="*", help="instead of those that shorten the bundled recipes")
    parser.add_argument("--kills", type=int, default=10, help="in each phase")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--two-processes", action="store_true", help="train on two, and kill one of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dice, totals = random.Random(options.seed), Counts()
    overrides = [*(options.overrides or SHORTENED)]
    if options.two_processes:
        distributed(options, overrides, dice)
    plan = load_recipe(options.recipe, overrides)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)

        def undisturbed() -> None:
            watch(totals)
            stages.fit(plan, out=out)

        if forked(undisturbed):
            raise SystemExit("the undisturbed run failed")
        reference, right = the_run(out), 0
        print(
            f"undisturbed: {totals.batches.value} batches; "
            + ", ".join(f"{k} {v.value}" for k, v in totals.phases.items())
        )
        for phase in PHASES:
            tried = [trial(plan, reference, totals, phase, dice) for _ in range(options.kills)]
            same = sum(fine for fine, _ in tried)
            right += same
            print(f"{phase}: {same}/{options.kills} the same; trained again at most {max(n for _, n in tried)} batches")
    print(f"{right}/{options.kills * len(PHASES)}")
    raise SystemExit(right != options.kills * len(PHASES))


if __name__ == "__main__":
    main()
