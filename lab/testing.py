"""For authors of techniques: whether a module keeps what lab promises of every module.

def test_my_module():
    check_module(MyModule, {"network": {"name": "mlp"}}, data="digits")
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file

from lab import Run, artifact, fit, training
from lab.assemble import open_stage
from lab.recipe import ONLY_STAGE
from lab.registry import allow
from lab.verification import verify

Promise: TypeAlias = Literal["resumes", "opens", "parallel", "learns"]
TOLERANCE = 1e-9
"""Of a weight after training on two processes, relative to the largest of its tensor; in float64."""


def check_module(
    module: type[LightningModule],
    arguments: Mapping[str, Any] | None = None,
    *,
    data: str | Mapping[str, Any] = "digits",
    promises: Iterable[Promise] = get_args(Promise),
    epochs: int = 5,
    batch_size: int = 32,
) -> None:
    """Train a module a few times on little data, and see whether it keeps what is promised.

    - ``resumes``: left in the middle of an epoch, at its end and in the next one, and gone on with by another process,
      it ends with the same weights, bit for bit.
    - ``opens``: its checkpoints and its network hold no pickled code, and a finished run's network, opened again, has
      the weights that were kept.
    - ``parallel``: in float64, two processes with half the batch each end with the weights of one, within 1e-9 of the
      largest of each tensor. Batch normalisation, and what each process draws for itself, break that by their nature.
    - ``learns``: after ``epochs`` epochs the metric that it is judged by is better than before the first.

    Args:
        module: importable by its name: at the top level of a file.
        arguments: as a recipe says them.
        data: a component; of lab's own, or with an argument ``batch_size``.
        promises: those that are looked at.
        epochs: of the training that is to learn.
        batch_size: of one process.

    Raises:
        AssertionError: one is not kept; says which, and how.
    """
    package = module.__module__
    if package == "__main__":
        raise AssertionError(f"{module.__qualname__} is in no file that another process could import")
    said = dict(data) if isinstance(data, Mapping) else {"name": data}
    recipe = {
        "data": {**said, "batch_size": batch_size},
        "module": {"name": f"{package}.{module.__qualname__}", **(arguments or {})},
        "callbacks": {"progress": None, "profile": None},
    }
    checks = {"resumes": _resumes, "opens": _opens, "parallel": _parallel, "learns": _learns}
    with _importable(), tempfile.TemporaryDirectory(prefix="lab-check-") as folder:
        allow(package)
        trial = Trial(recipe, [package], Path(folder), epochs)
        for promise in promises:
            checks[promise](trial)


@dataclass(frozen=True)
class Trial:
    """A recipe that is tried in several ways, in a folder."""

    recipe: Mapping[str, Any]
    imports: Sequence[str]
    folder: Path
    epochs: int

    def fit(self, *overrides: str) -> Run:
        """A run of the recipe with something changed."""
        out = Path(tempfile.mkdtemp(dir=self.folder))
        return fit(self.recipe, overrides, out=out, fresh=True, imports=self.imports)


def _resumes(trial: Trial) -> None:
    folder = Path(tempfile.mkdtemp(dir=trial.folder))
    for verdict in verify(trial.recipe, folder=folder, imports=trial.imports):
        if verdict.difference is not None:
            raise AssertionError(f"it does not resume exactly: {verdict}")


def _opens(trial: Trial) -> None:
    run = trial.fit("trainer.max_epochs=1", "trainer.limit_train_batches=2")
    folder = run.stage(ONLY_STAGE)
    for path in sorted((folder / "checkpoints").glob("*.ckpt")):
        torch.load(path, weights_only=True)
    built, _ = open_stage(run, None)
    kept = load_file(folder / artifact.WEIGHTS)
    opened = built.network.state_dict()
    if different := [name for name in kept if not torch.equal(kept[name], opened[name].cpu())]:
        raise AssertionError(f"its network, opened again, has another {different[0]}")


def _parallel(trial: Trial) -> None:
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=8", "trainer.precision=64-true")
    size = trial.recipe["data"]["batch_size"]
    alone = trial.fit(*short, "trainer.accelerator=cpu")
    together = trial.fit(
        *short, "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", f"data.batch_size={size // 2}"
    )
    one, two = (
        torch.load(run.stage(ONLY_STAGE) / training.STATE, weights_only=True)["state_dict"] for run in (alone, together)
    )
    for name, expected in one.items():
        off = (
            float((two[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
            if expected.numel()
            else 0
        )
        if off > TOLERANCE:
            raise AssertionError(
                f"two processes end with another {name} than one: off by {off:.1e} of its largest weight"
            )


def _learns(trial: Trial) -> None:
    before = trial.fit("trainer.max_epochs=1", "trainer.limit_train_batches=0")
    after = trial.fit(f"trainer.max_epochs={trial.epochs}")
    monitor = getattr(open_stage(after, None)[0].module, "monitor", None)
    if monitor is None:
        raise AssertionError("it has no `monitor`, a metric and its mode, to be judged by")
    metric, mode = monitor
    tested = metric.replace("val", "test", 1)
    first, last = (run.results["stages"][ONLY_STAGE]["metrics"].get(tested) for run in (before, after))
    if first is None or last is None:
        raise AssertionError(f"its test gives no {tested}")
    if not (last > first if mode == "max" else last < first):
        raise AssertionError(
            f"it does not learn: {tested} is {last:.4g} after {trial.epochs} epochs, {first:.4g} before"
        )


@contextmanager
def _importable() -> Iterator[None]:
    """Let other processes find what this one can import, such as the files of tests."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
