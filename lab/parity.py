"""Whether a recipe's trainings end with the same weights however many processes share their batches.

Each stage is trained for a few steps with one global batch, by one process that takes it at once and then in other
ways: in parts, by several processes, both, with its weights shared out too. Rounding apart, nothing may differ: in
float64 a difference is a reduction that is missing, or done twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lab import launch, recipe, run, training
from lab.api import load_recipe
from lab.batching import with_size
from lab.check import check
from lab.document import Node, Place, RecipeError
from lab.errors import UserError
from lab.fresh import Fresh
from lab.plan import BATCH_SIZE, GlobalBatch, Plan, Stage, sized
from lab.registry import allow
from lab.run import Run
from lab.types import check_types

TOLERANCE = {"64-true": 1e-9}
"""How far a tensor may be off, relative to its largest element, by precision; others are reported, not judged."""
NATURAL = "natural.json"
"""The file in a stage's folder that says what sees a part of a batch for itself."""
METRICS = 1e-5
"""How far a metric may be off, relative to itself: its sums are in single precision whatever the weights are in."""
PLACE = Place("lab verify-parallel")


@dataclass(frozen=True)
class Width:
    """One way to train a global batch.

    Args:
        processes: that share it.
        parts: that each process takes its share in, before a step.
        strategy: Lightning's name.
    """

    name: str
    processes: int
    parts: int
    strategy: str


ALONE = Width("1", 1, 1, "auto")
WIDTHS = (
    Width("1 in 2 parts", 1, 2, "auto"),
    Width("ddp 2", 2, 1, "ddp"),
    Width("ddp 2 in 2 parts", 2, 2, "ddp"),
    Width("fsdp 2", 2, 1, "fsdp"),
)
"""What is compared with one process that takes all at once."""


@dataclass(frozen=True)
class Verdict:
    """What came of one stage at one width.

    Args:
        off: the largest difference of an element to one process's, relative to the largest element of its tensor.
        tensor: where that is.
        refused: why the stage is not trained so; None where it is.
        metric: the one of validation and test that differs most.
        metric_off: how far it is off, relative to itself.
        natural: what in the module sees a part of a batch for itself, so that a difference is no error.
    """

    stage: str
    width: str
    off: float = 0.0
    tensor: str = ""
    refused: str | None = None
    metric: str = ""
    metric_off: float = 0.0
    natural: tuple[str, ...] = ()

    def differs(self, bound: float) -> bool:
        """Whether it is more than rounding.

        Args:
            bound: how far weights may be off.
        """
        return self.off > bound or self.metric_off > METRICS


def compare(
    source: Any,
    overrides: Iterable[str] = (),
    *,
    folder: Path,
    imports: Sequence[str] = (),
    widths: Sequence[Width] = WIDTHS,
    precision: str = "64-true",
    epochs: int = 2,
    steps: int = 10,
) -> Iterator[Verdict]:
    """Train every stage of a recipe at every width, on CPU, and compare all that its modules hold.

    Args:
        source: a file, a bundled recipe's name, or a mapping.
        overrides: ``path=value`` each.
        folder: an empty one, to work in.
        imports: packages whose classes the recipe may name.
        precision: Lightning's name.
        epochs: of each training.
        steps: of each epoch.

    Raises:
        RecipeError: the recipe is wrong.
        UserError: a training failed; says at which width, and why.
    """
    plan = load_recipe(source, overrides, imports=imports)
    processes = max(width.processes for width in widths)
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with contextlib.ExitStack() as held:
        ranks = [held.enter_context(Fresh("lab.parity", environment)) for _ in range(processes)]

        def trained(width: Width) -> tuple[Run | None, dict[str, str]]:
            """The run at a width, if there is any, and why which stages are not trained so."""
            stages = {name: _at(stage, width, precision, epochs, steps) for name, stage in plan.stages.items()}
            refused = {name: why for name, stage in stages.items() if (why := _refusal(plan, name, stage)) is not None}
            needed = _needed(plan, [name for name in stages if name not in refused])
            if not needed:
                return None, refused
            instead = replace(width, parts=1, strategy="ddp" if width.processes > 1 else "auto")
            stages |= {name: _at(plan.stages[name], instead, precision, epochs, steps) for name in refused}
            chosen = replace(plan, stages={name: stage for name, stage in stages.items() if name in needed})
            this = run.create(chosen, folder / width.name.replace(" ", "-"), imports=imports)
            _train(this, ranks[: width.processes], width)
            return this, refused

        alone, refused = trained(ALONE)
        if alone is None or refused:
            raise UserError("; ".join(f"{name}: {why}" for name, why in refused.items()))
        for width in widths:
            this, refused = trained(width)
            for name in plan.stages:
                if this is None or name in refused:
                    yield Verdict(name, width.name, refused=refused[name])
                else:
                    yield _judged(alone, this, name, width)


def _judged(alone: Run, this: Run, name: str, width: Width) -> Verdict:
    """What came of a stage, beside what one process made of it."""
    off, tensor = difference(_state(alone, name), _state(this, name))
    metric_off, metric = _apart(_metrics(alone, name), _metrics(this, name))
    natural = tuple(json.loads((alone.stage(name) / NATURAL).read_text(encoding="utf-8")))
    return Verdict(name, width.name, off, tensor, metric=metric, metric_off=metric_off, natural=natural)


def difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of an element, relative to the largest of its tensor, and the tensor's name.

    Infinite where a tensor is missing, or not a number in one of both alone.
    """
    worst = 0.0, ""
    for name in {**expected, **found}:
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            return float("inf"), name
        one, other = expected[name].double(), found[name].double()
        if not one.numel():
            continue
        known = ~one.isnan()
        if not torch.equal(known, ~other.isnan()):
            return float("inf"), name
        scale = float(one[known].abs().max()) if known.any() else 0.0
        off = float((one - other)[known].abs().max()) / (scale or 1.0) if known.any() else 0.0
        worst = max(worst, (off, name))
    return worst


def _needed(plan: Plan, names: Iterable[str]) -> set[str]:
    """Stages, and those that they take networks from."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += plan.stages[name].parents
    return found


def _at(stage: Stage, width: Width, precision: str, epochs: int, steps: int) -> Stage:
    """A stage as it is trained at a width: same samples a step, a few steps."""

    def said(value: Any) -> Node:
        return Node.of(value, PLACE)

    data, batch = sized(stage.data), None
    trainer = {key: value for key, value in stage.trainer.mapping.items() if key != "accumulate_grad_batches"}
    if data is not None:
        size = data.arguments.get(BATCH_SIZE)
        plain: Any = size.plain() if isinstance(size, Node) else data.signature.parameters[BATCH_SIZE].literal
        wanted = stage.global_batch.size if stage.global_batch is not None else int(plain)
        every = max(one.processes * one.parts for one in (ALONE, *WIDTHS))
        batch = -(-wanted // every) * every
    elif width.parts > 1:
        trainer["accumulate_grad_batches"] = said(width.parts)
    changed = {
        "accelerator": "cpu", "devices": width.processes, "num_nodes": 1, "strategy": width.strategy,
        "precision": precision, "max_epochs": epochs, "max_steps": -1,
    } | ({"limit_train_batches": steps * width.parts} if batch else {})  # fmt: skip
    return replace(
        stage,
        trainer=replace(stage.trainer, value={**trainer, **{key: said(value) for key, value in changed.items()}}),
        global_batch=GlobalBatch(batch, PLACE) if batch else None,
        data=with_size(stage.data, said(batch // width.processes // width.parts)) if batch else stage.data,
        callbacks={**stage.callbacks, "progress": None, "profile": None},
        loggers=[],
        gates=[],
    )


def _refusal(plan: Plan, name: str, stage: Stage) -> str | None:
    """Why ``lab check`` would not have a stage trained so."""
    try:
        check_types(replace(plan, stages={name: stage}))
    except RecipeError as cause:
        return "; ".join(problem.message for problem in cause.problems)
    return None


def _train(this: Run, ranks: Sequence[Fresh], width: Width) -> None:
    """Have every process train all stages of a run, together."""
    order = launch.Order([], str(this.folder), len(ranks), len(ranks), "127.0.0.1", launch.free_port())

    def one(rank: int) -> int:
        asked = {"run": str(this.folder), "environment": order.environment(rank), "imports": this.manifest["imports"]}
        return ranks[rank].call([json.dumps(asked)], _said(this, rank))

    with ThreadPoolExecutor(len(ranks)) as pool:
        codes = list(pool.map(one, range(len(ranks))))
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        lines = [_said(this, rank).read_text(encoding="utf-8").strip().splitlines() for rank in failed]
        last = [said[-1] if said else f"exit code {codes[rank]}" for rank, said in zip(failed, lines, strict=True)]
        raise UserError(f"{width.name}: " + "; ".join(dict.fromkeys(last)))


def main(arguments: Sequence[str]) -> None:
    """One of the processes that train a run's stages together, one stage after the other."""
    asked = json.loads(arguments[0])
    os.environ.update(asked["environment"])
    for package in asked["imports"]:
        allow(package)
    this = Run(Path(asked["run"]))
    plan = check(recipe.load(this.recipe))
    for name in plan.stages:
        this.stage(name).mkdir(exist_ok=True)
        prepared = training.prepare(this, plan, name)
        (this.stage(name) / NATURAL).write_text(json.dumps(list(_natural(prepared.built.module))), encoding="utf-8")
        training.train(this, plan, prepared)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the next stage may start from what the first process has kept


def _natural(module: nn.Module) -> Iterator[str]:
    """The first layer of each kind that sees a part of a batch for itself."""
    layers = [(name, layer) for name, layer in module.named_modules() if layer.training]
    normal = [name for name, layer in layers if isinstance(layer, _BatchNorm)]
    dropping = [name for name, layer in layers if isinstance(layer, _DropoutNd) and layer.p > 0]
    if normal:
        yield f"{normal[0]} normalises each part by its own statistics"
    if dropping:
        yield f"{dropping[0]} drops other units in every part"


def _said(this: Run, rank: int) -> Path:
    return this.folder / f"said-{rank}.txt"


def _state(this: Run, name: str) -> dict[str, Tensor]:
    saved: dict[str, Tensor] = torch.load(this.stage(name) / training.STATE, weights_only=True)["state_dict"]
    return saved


def _metrics(this: Run, name: str) -> dict[str, float]:
    """Those that are of all processes: what training logs is the first one's."""
    found = this.results["stages"][name]["metrics"]
    return {metric: value for metric, value in found.items() if not metric.startswith("train/")}


def _apart(expected: Mapping[str, float], found: Mapping[str, float]) -> tuple[float, str]:
    """The largest difference of a metric, relative to itself, and its name."""
    worst = 0.0, ""
    for name in {**expected, **found}:
        one, other = expected.get(name), found.get(name)
        if one is None or other is None or math.isnan(one) != math.isnan(other):
            return float("inf"), name
        if not math.isnan(one):
            worst = max(worst, (abs(one - other) / max(abs(one), 1e-3), name))
    return worst
