"""Whether a recipe's trainings resume exactly: left in the middle, taken up by another process, and compared.

Each stage is trained for a few batches once without a break. Then it is left after some of them, as if the process had
been asked to stop, and gone on with by a fresh process. Both note, for every batch, what came in, how the random
generators stood, and what the weights were after; so the first thing that differs has a name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lab import recipe, run, stages, state, stopping, training
from lab.api import load_recipe
from lab.callbacks import Lean
from lab.check import check
from lab.fresh import Fresh
from lab.registry import allow
from lab.run import Run
from lab.stages import StageFailed

TRACE = "trace.jsonl"
"""The file in a stage's folder that has a line for every batch."""
GENERATORS = {"python": "Python's", "numpy": "NumPy's", "torch": "torch's", "cuda": "CUDA's"}
BESIDES = ("seconds", "train_seconds", "milliseconds", "train/env_steps_per_second", "filled")
"""What may differ between equal trainings: times, and whether an attribute's object was there from the beginning."""


@dataclass(frozen=True)
class Verdict:
    """What came of one break.

    Args:
        batches: how many were trained before it.
        difference: the first, in words; None where there is none.
    """

    stage: str
    batches: int
    difference: str | None

    def __str__(self) -> str:
        return f"{self.stage}, left after {self.batches} batches: {self.difference or 'the same'}"


def verify(
    source: Any,
    overrides: Iterable[str] = (),
    *,
    folder: Path,
    imports: Sequence[str] = (),
    batches: int = 6,
    places: Iterable[int] = (),
) -> Iterator[Verdict]:
    """Break every stage's training in three places: within an epoch, at an epoch's end, within a later one.

    Args:
        source: a file, a bundled recipe's name, or a mapping.
        overrides: ``path=value`` each.
        folder: an empty one, to work in.
        imports: packages whose classes the recipe may name.
        batches: of training an epoch; two epochs are trained.
        places: after how many batches to break, instead.

    Raises:
        RecipeError: the recipe is wrong.
        StageFailed: a stage cannot be trained, or not be gone on with.
    """
    short = [
        "trainer.max_epochs=2", "trainer.max_steps=-1", f"trainer.limit_train_batches={batches}",
        "trainer.limit_val_batches=2", "trainer.limit_test_batches=2", "trainer.devices=1", "trainer.num_nodes=1",
        "trainer.strategy=auto", "logger=csv", "callbacks.progress=null", "callbacks.profile=null",
    ]  # fmt: skip
    plan = load_recipe(source, [*overrides, *short], imports=imports)
    whole = run.create(plan, folder / "whole", imports=imports)
    environment = {  # sums of other threads are rounded otherwise
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    with Fresh("lab.verification", environment) as fresh:
        for name in plan.stages:
            stages.train_stage(whole, plan, name, watching=[Trace()])
            trained = len(_read(whole.stage(name) / TRACE))
            for place in sorted(set(places) or {batches // 2, batches, batches + 1}):
                if 0 < place < trained:
                    yield Verdict(name, place, _broken(whole, name, place, folder / f"{name}-{place}", fresh))


def _broken(whole: Run, name: str, place: int, folder: Path, fresh: Fresh) -> str | None:
    """Train one stage with a break; the first difference to the whole training."""
    parted = Run(folder / whole.folder.parent.name / whole.id)
    shutil.copytree(whole.folder, parted.folder)
    shutil.rmtree(parted.stage(name))
    results = parted.results["stages"]
    parted.forget(name)
    plan = check(recipe.load(parted.recipe))
    with contextlib.suppress(stages.Terminated):
        stages.train_stage(parted, plan, name, watching=[Trace(), Leaves(place)])
        raise StageFailed(f"stage {name}: it did not stop after batch {place}", parted)
    said = folder / "said.txt"
    if code := fresh.call([str(parted.folder), name, *parted.manifest["imports"]], said):
        last = said.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {code}"]
        return f"cannot be resumed: {last[-1]}"
    return first_difference(whole, parted, name) or differing_metrics(results[name], parted.results["stages"][name])


def first_difference(whole: Run, parted: Run, name: str) -> str | None:
    """The first batch, random generator or tensor that differs, in words."""
    expected, found = (_read(one.stage(name) / TRACE) for one in (whole, parted))
    for place, noted in expected.items():
        where = f"batch {place[1] + 1} of epoch {place[0] + 1}"
        if place not in found:
            return f"{where} was not trained"
        other = found[place]
        for generator in noted["random"]:
            if noted["random"][generator] != other["random"].get(generator):
                return f"{GENERATORS[generator]} random generator differs before {where}"
        if noted["inputs"] != other["inputs"]:
            return f"the inputs of {where} differ"
        for tensor, digest in noted["weights"].items():
            if digest != other["weights"].get(tensor):
                return f"{tensor} differs after {where}"
    if extra := [place for place in found if place not in expected]:
        return f"batch {extra[0][1] + 1} of epoch {extra[0][0] + 1} was trained, but is not in the whole training"
    saved = [torch.load(one.stage(name) / training.STATE, weights_only=True) for one in (whole, parted)]
    different = differences(saved[0], saved[1])
    return f"{different[0]} differs in the last state" if different else None


def differing_metrics(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first metric of a stage's results that differs."""
    names = differences(expected["metrics"], found["metrics"])
    return f"the metric {names[0]} differs" if names else None


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two values of numbers, strings, tensors and containers differ; times of day are left out."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if key not in BESIDES]
        absent = object()
        pairs = ((f"{place}.{key}".removeprefix("."), one.get(key, absent), other.get(key, absent)) for key in keys)
        return [found for where, left, right in pairs for found in differences(left, right, where)]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        if len(one) == 2 and isinstance(one[0], str) and one[0] == other[0] in BESIDES:  # a mapping's, in attributes
            return []
        pairs = ((f"{place}[{i}]", left, right) for i, (left, right) in enumerate(zip(one, other, strict=True)))
        return [found for where, left, right in pairs for found in differences(left, right, where)]
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return [] if one == other or both_nan else [place]


class Trace(Lean):
    """Notes of every batch what came in, how the random generators stood, and the weights after it."""

    watches_only = True

    def __init__(self) -> None:
        self._noted: dict[str, Any] = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._noted = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "random": {name: _digest([value]) for name, value in state.randomness().items()},
            "inputs": _digest(batch if isinstance(batch, list | tuple) else [batch]),
        }

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._noted["weights"] = {name: _digest([tensor]) for name, tensor in pl_module.state_dict().items()}
        with (Path(trainer.default_root_dir) / TRACE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._noted) + "\n")


class Leaves(Lean):
    """Has the training stopped after so many batches, as SIGTERM would."""

    watches_only = True

    def __init__(self, batches: int) -> None:
        self.left = batches

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.left -= 1
        if not self.left:
            stopping.ask(signal.SIGTERM)


def _digest(values: Iterable[Any]) -> str:
    """What tells contents apart; dataclasses and other batches by the tensors that they unpack to."""
    total = hashlib.blake2b(digest_size=12)
    for value in tree_leaves(list(values)):
        if isinstance(value, Tensor):
            total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif hasattr(value, "__dataclass_fields__"):
            total.update(_digest(vars(value).values()).encode())
        else:
            total.update(repr(value).encode())
    return total.hexdigest()


def _read(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return {(line["epoch"], line["batch"]): line for line in lines}


def main(arguments: Sequence[str]) -> None:
    """Run, stage and imported packages: go on with the stage, and note every batch."""
    folder, name, *imports = arguments
    for package in imports:
        allow(package)
    this = Run(Path(folder))
    stages.train_stage(this, check(recipe.load(this.recipe)), name, watching=[Trace()])
