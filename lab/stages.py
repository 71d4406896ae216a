"""Running a plan: its stages in dependency order, each built, trained, tested and kept.

A stage on one process is trained in this one; a stage on several in a process tree of its own, started from the run's
folder (``python -m lab.stages RUN STAGE``), because every process of a distributed strategy starts the program again
and would run the other stages too.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lab import artifact, pictures, recipe, report, run, trainer
from lab.assemble import Built, build
from lab.callbacks import Draws, Lean, Reports
from lab.check import check, component
from lab.document import Place, RecipeError
from lab.errors import UserError
from lab.plan import Component, Plan, Stage
from lab.registry import allow
from lab.run import Run
from lab.types import check_types

DEFAULT_CALLBACKS = ("progress", "checkpoints", "profile")
"""The callbacks that every stage has unless its recipe says ``null``."""
RELATIONS = {
    "<": float.__lt__, "<=": float.__le__, "==": float.__eq__, ">=": float.__ge__, ">": float.__gt__,
}  # fmt: skip


class StageFailed(RuntimeError):
    """A stage's training raised; the cause is chained, and its traceback is in the stage's ``error.txt``."""

    def __init__(self, message: str, run: Run) -> None:
        super().__init__(message)
        self.run = run


class Interrupted(KeyboardInterrupt):
    """Training was stopped from outside; what there was is saved."""


def fit(
    plan: Plan,
    *,
    out: Path | None = None,
    smoke: bool = False,
    command: Sequence[str] = (),
    imports: Sequence[str] = (),
    group: str | None = None,
) -> Run:
    """Train every stage of a plan in a new run.

    Args:
        group: what runs that belong together share.

    Raises:
        RecipeError: an argument has the wrong type or range; nothing was written.
        StageFailed: a stage raised; the run's folder has what there is.
        Interrupted: Ctrl-C.
    """
    check_types(plan)
    this = run.create(plan, out, command, imports, group)
    closed: set[str] = set()  # stages that missed a gate, and all that need them
    for name, stage in plan.stages.items():
        if closed & set(stage.parents):
            closed.add(name)
            this.record("running", {name: {"status": "skipped", "parents": stage.parents}})
            continue
        result = _run_stage(this, plan, name, smoke=smoke, imports=imports)
        if result["missed"]:
            closed.add(name)
    this.record("gated" if closed else "finished")
    return this


def _run_stage(this: Run, plan: Plan, name: str, *, smoke: bool, imports: Sequence[str]) -> dict[str, Any]:
    """One stage, here or in processes of its own; records its result, also when it fails."""
    this.stage(name).mkdir()
    try:
        if trainer.processes(plan.stages[name].trainer.plain()) > 1:
            flags = [*(["--smoke"] if smoke else []), *(f"--import={package}" for package in imports)]
            finished = subprocess.run([sys.executable, "-m", "lab.stages", str(this.folder), name, *flags], check=False)
            if finished.returncode:
                raise RuntimeError(f"its processes ended with exit code {finished.returncode}")
            return dict(this.results["stages"][name])
        return train(this, plan, name, smoke=smoke)
    except KeyboardInterrupt:
        this.record("interrupted", {name: {"status": "interrupted", "parents": plan.stages[name].parents}})
        raise
    except Exception as cause:  # whatever a technique, plugin or disk may raise
        (this.stage(name) / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        message = str(cause) or type(cause).__name__
        this.record("failed", {name: {"status": "failed", "error": message, "parents": plan.stages[name].parents}})
        if isinstance(cause, RecipeError):
            raise
        said = message if isinstance(cause, ValueError | OSError | UserError) else f"{type(cause).__name__}: {message}"
        raise StageFailed(f"stage {name}: {said}", this) from cause


def train(this: Run, plan: Plan, name: str, *, smoke: bool = False) -> dict[str, Any]:
    """Build, train, select, test and keep one stage in this process.

    Returns:
        The stage's entry of ``results.json``.
    """
    stage, folder = plan.stages[name], this.stage(name)
    with trainer.quiet():
        built = build(stage, this)
        callbacks, loggers = _attachments(built, this, plan)
        meter = _Meter()
        lightning = trainer.make(stage.trainer.plain(), folder, [*callbacks.values(), meter], loggers, smoke=smoke)
        try:
            _describe(this, built, lightning, plan)
            seed_everything(stage.seed, workers=True, verbose=False)
            _fit(lightning, built)
            metrics = _logged(lightning)
            metrics |= getattr(callbacks.get("checkpoints"), "chosen_metrics", {})
            checkpoint = _select(built, callbacks.get("checkpoints"))
            if _tests(built):
                lightning.test(built.module, datamodule=built.data, verbose=False)
                metrics |= _logged(lightning)
            result: dict[str, Any] = {
                "status": "finished",
                "metrics": metrics,
                "n_test": meter.samples(lightning),
                "train_seconds": round(meter.seconds, 3),
                "parent": stage.parents[0] if stage.parents else None,
                "parents": stage.parents,
                "checkpoint": checkpoint.relative_to(this.folder).as_posix() if checkpoint else None,
            }
            if lightning.is_global_zero:
                result |= _keep(built, lightning, folder)
                result["missed"] = _missed(stage, result)
                result["status"] = "gated" if result["missed"] else "finished"
                this.record("running", {name: result})
                _tell(lightning.loggers, result, this)
                _draw(built, lightning, folder)
        finally:
            for logger in loggers:
                if hasattr(logger, "finish"):
                    logger.finish()
    return result


def _attachments(built: Built, this: Run, plan: Plan) -> tuple[dict[str, Callback], list[Logger]]:
    """The stage's callbacks by name, the defaults first, and its loggers, the CSV first."""
    stage, place = built.stage, Place("lab's defaults")
    monitor = getattr(built.module, "monitor", None)
    title = f"{plan.name}/{stage.name}"
    told = {"title": title, **(dict(zip(("monitor", "mode"), monitor, strict=True)) if monitor else {})}
    wanted: dict[str, Component | None] = {name: component("callbacks", name, place) for name in DEFAULT_CALLBACKS}
    wanted |= stage.callbacks
    callbacks = {name: built.builder.build(found, told) for name, found in wanted.items() if found is not None}
    given = {
        "save_dir": str(this.stage(stage.name)),
        "group": this.manifest["group"],
        "job_type": stage.name,
        "title": title,
    }
    chosen = stage.loggers
    if all(logger.name != "csv" for logger in chosen):
        chosen = [component("loggers", "csv", place), *chosen]
    return callbacks, [built.builder.build(logger, given) for logger in chosen]


def _describe(this: Run, built: Built, lightning: Trainer, plan: Plan) -> None:
    """Tell the manifest and the loggers what is trained, before it is."""
    if not lightning.is_global_zero:
        return
    manifest = this.manifest
    if callable(fingerprint := getattr(built.data, "fingerprint", None)):
        manifest["data"][built.stage.name] = fingerprint()
    manifest["callbacks"][built.stage.name] = [type(c).__qualname__ for c in lightning.callbacks]  # type: ignore[attr-defined]
    this.note(data=manifest["data"], callbacks=manifest["callbacks"])
    for logger in lightning.loggers:
        logger.log_hyperparams(plan.resolved(this.folder))


def _fit(lightning: Trainer, built: Built) -> None:
    try:
        lightning.fit(built.module, datamodule=built.data)
    except SystemExit as cause:  # how Lightning ends on Ctrl-C, after its callbacks have saved
        raise Interrupted from cause
    if lightning.interrupted:
        raise Interrupted


def _logged(lightning: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in lightning.callback_metrics.items()}


def _select(built: Built, checkpoints: Any) -> Path | None:
    """Put the chosen checkpoint's weights into the module; the file that was chosen."""
    chosen: Path | None = getattr(checkpoints, "chosen", None)
    if chosen is not None and chosen == getattr(checkpoints, "best", None):
        saved = torch.load(chosen, map_location="cpu", weights_only=True)
        built.module.load_state_dict(saved["state_dict"])
    return chosen


def _tests(built: Built) -> bool:
    """Whether there is something to test with, and on."""
    if not is_overridden("test_step", built.module):
        return False
    if built.data is not None and is_overridden("test_dataloader", built.data):
        return bool(getattr(built.data, "has_test", True))
    return is_overridden("test_dataloader", built.module)


def _keep(built: Built, lightning: Trainer, folder: Path) -> dict[str, Any]:
    """Save the network, and what its data learnt; what the callbacks and the file say about it."""
    reported: dict[str, Any] = {}
    for callback in lightning.callbacks:  # type: ignore[attr-defined]  # Lightning adds it outside the constructor
        if isinstance(callback, Reports):
            reported |= callback.results(lightning, built.module)
    if built.data is not None:
        artifact.save_learnt(folder, built.data)
    return {**reported, "bytes": artifact.save(folder, built.network, built.description)}


def _missed(stage: Stage, result: Mapping[str, Any]) -> list[str]:
    """The gates that a result does not pass, in words."""
    missed = []
    for gate in stage.gates:
        value = {**result, **result["metrics"]}.get(gate.metric)
        if not isinstance(value, int | float):
            missed.append(f"{gate.metric} was not measured, {gate.relation} {gate.bound:g} is required")
        elif not RELATIONS[gate.relation](float(value), gate.bound):
            missed.append(f"{gate.metric} is {value:.6g}, {gate.relation} {gate.bound:g} is required")
    return missed


def _tell(loggers: Sequence[Logger], result: Mapping[str, Any], this: Run) -> None:
    """Give the loggers the stage's figures, and the scoreboard so far to those that show tables."""
    figures = {key: float(value) for key, value in result.items() if key in report.FIGURES and value is not None}
    figures |= {f"latency_ms/{size}": value for size, value in result.get("latency_ms", {}).items()}
    columns, rows = report.rows(this.results)
    for logger in loggers:
        logger.log_metrics(figures)
        if hasattr(logger, "log_table"):
            logger.log_table("scoreboard", columns=columns, data=rows)


def _draw(built: Built, lightning: Trainer, folder: Path) -> None:
    """Keep the stage's pictures and give them to the loggers; one that cannot be drawn is a warning, not a lost run."""
    sources: list[Callable[[], Mapping[str, Any]]] = [lambda: pictures.of_training(folder)]
    if callable(drawing := getattr(built.module, "pictures", None)):
        sources.append(drawing)
    sources += [partial(callback.pictures, lightning, built.module) for callback in _drawing(lightning)]
    for draw in sources:
        try:
            for name, picture in draw().items():
                path = pictures.keep(folder / "pictures", name, picture)
                for logger in lightning.loggers:
                    if hasattr(logger, "log_image"):
                        logger.log_image(name, [str(path)])
        except Exception as cause:  # whatever a technique, a logger or matplotlib may raise
            rank_zero_warn(f"stage {built.stage.name}: a picture is missing: {type(cause).__name__}: {cause}")


def _drawing(lightning: Trainer) -> list[Draws]:
    return [callback for callback in lightning.callbacks if isinstance(callback, Draws)]  # type: ignore[attr-defined]


class _Meter(Lean):
    """How long training took, and how many samples were tested."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0
        self._samples = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.monotonic() - self._began

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        sizes = {
            len(part) for part in (batch if isinstance(batch, list | tuple) else [batch]) if hasattr(part, "__len__")
        }
        self._samples += max(sizes, default=0)

    def samples(self, trainer: Trainer) -> int:
        total = trainer.strategy.reduce(
            torch.tensor(self._samples, device=trainer.strategy.root_device), reduce_op="sum"
        )
        return int(total)


def main(arguments: Sequence[str]) -> None:
    """``python -m lab.stages RUN STAGE [--smoke] [--import=PACKAGE]``: train one stage of a run made for it."""
    folder, name, *flags = arguments
    for flag in flags:
        if flag.startswith("--import="):
            allow(flag.removeprefix("--import="))
    this = Run(Path(folder))
    plan = check(recipe.load(this.recipe))
    train(this, plan, name, smoke="--smoke" in flags)


if __name__ == "__main__":
    main(sys.argv[1:])
