"""One stage in this process: built, trained, selected, tested, kept; a training that was left goes on."""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lab import artifact, cache, fingerprint, pictures, report, tables, trainer
from lab.assemble import Built, build, source_of
from lab.batching import learning_rates, settled
from lab.callbacks import Draws, Finishes, Lean, Reports, Tabulates
from lab.callbacks.exact import KEY, Exact
from lab.check import component
from lab.document import Place
from lab.errors import UserError
from lab.plan import Component, Plan, Stage
from lab.run import Run

DEFAULT_CALLBACKS = ("progress", "checkpoints", "profile", "nan_guard")
"""The callbacks that every stage has unless its recipe says ``null``."""
STATE = Path("checkpoints", "last.ckpt")
"""What a stage's training goes on from, in its folder."""


@dataclass
class Prepared:
    """A stage that is built, and what decides its result, part by part; None where nobody can say."""

    built: Built
    parts: dict[str, str] | None

    @property
    def key(self) -> str | None:
        """One hash of all parts."""
        return fingerprint.key(self.parts) if self.parts is not None else None


def prepare(this: Run, plan: Plan, name: str) -> Prepared:
    """Build a stage, and see what decides its result."""
    with trainer.quiet():
        built = build(settled(plan.stages[name]), this)
    inputs = fingerprint.inputs_of(built.stage, lambda reference: source_of(reference, this))
    smoke = bool(this.manifest.get("smoke"))
    return Prepared(built, fingerprint.fingerprint(built.stage, built, inputs, smoke=smoke))


def train(this: Run, plan: Plan, prepared: Prepared, watching: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train, select, test and keep one stage in this process; a training that was left goes on.

    Args:
        watching: callbacks beside the recipe's.

    Returns:
        The stage's entry of ``results.json``.
    """
    built, stage = prepared.built, prepared.built.stage
    folder, smoke = this.stage(stage.name), bool(this.manifest.get("smoke"))
    with trainer.quiet():
        left = _left(folder)
        callbacks, loggers = _attachments(built, this, plan)
        meter = _Meter()
        together = [Exact(longer="continues" in this.manifest), *callbacks.values(), meter, *watching]
        arguments = {**getattr(built.data, "trainer_defaults", {}), **stage.trainer.plain()}
        lightning = trainer.make(arguments, folder, together, loggers, smoke=smoke)
        try:
            _describe(this, built, lightning, plan)
            seed_everything(stage.seed, workers=True, verbose=False)
            lightning.fit(built.module, datamodule=built.data, ckpt_path=left, weights_only=True)
            metrics = _logged(lightning)
            metrics |= getattr(callbacks.get("checkpoints"), "chosen_metrics", {})
            checkpoint = _select(built, callbacks.get("checkpoints"))
            for callback in lightning.callbacks:  # type: ignore[attr-defined]
                if isinstance(
                    callback, Finishes
                ):  # with the weights that are kept: whatever changes the network itself
                    callback.finish(lightning, built.module)
            if callable(finish := getattr(built.module, "finish", None)):
                finish()
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
                **_width(built, lightning, meter.seconds),
            }
            if lightning.is_global_zero:
                result |= _keep(built, lightning, folder)
                result |= judged(stage, result, this.results.get("stages", {}))
                if prepared.parts is not None:
                    result["fingerprint"] = {**prepared.parts, "key": prepared.key}
                results = this.results
                _tell(lightning.loggers, result, {**results, "stages": {**results["stages"], stage.name: result}})
                _tabulate(built, lightning, folder)
                _draw(built, lightning, folder)
                this.record("running", {stage.name: result})  # last: a run that is killed before tells it all again
                if prepared.key is not None:
                    cache.remember(this.folder.parent.parent, prepared.key, folder)
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
        "id": f"{this.id}-{stage.name}",
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
        found, name = fingerprint(), built.stage.name
        if manifest["data"].setdefault(name, found) != found:
            raise UserError("the data have changed since this run began: it cannot go on as it would have")
    manifest["callbacks"][built.stage.name] = [type(c).__qualname__ for c in lightning.callbacks]  # type: ignore[attr-defined]
    this.note(data=manifest["data"], callbacks=manifest["callbacks"])
    for logger in lightning.loggers:
        logger.log_hyperparams(plan.resolved(this.folder))


def clear(folder: Path) -> None:
    """Remove what a training that left no state has begun."""
    for name in ("checkpoints", "logs", "pictures", "tables"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "metrics.csv").unlink(missing_ok=True)


def _left(folder: Path) -> Path | None:
    """The state that a stage's training was left in.

    Raises:
        UserError: there is one, but it is damaged, or not for going on from.
    """
    path = folder / STATE
    if not path.exists():
        return None
    otherwise = "remove it to train the stage from its beginning"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as cause:
        raise UserError(f"{path} is damaged: {otherwise}") from cause
    if KEY not in saved:
        raise UserError(f"{path} has weights, but no state to go on from: {otherwise}")
    return path


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
    """Save the network, and what its data learnt; what the module, the callbacks and the file say about it."""
    reported: dict[str, Any] = {}
    if callable(results := getattr(built.module, "results", None)):
        reported |= results()
    for callback in lightning.callbacks:  # type: ignore[attr-defined]  # Lightning adds it outside the constructor
        if isinstance(callback, Reports):
            reported |= callback.results(lightning, built.module)
    if built.data is not None:
        artifact.save_learnt(folder, built.data)
    size = artifact.save(folder, built.network, built.description)
    return {"bytes": size, "file": artifact.WEIGHTS, **reported}


def judged(stage: Stage, result: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """A result's status by its gates, and these in words: ``missed`` and ``met``.

    Args:
        others: the results of the run's stages so far.
    """
    verdicts = [gate.judge(result, others) for gate in stage.gates]
    missed, met = ([said for passed, said in verdicts if passed is which] for which in (False, True))
    return {"missed": missed, "met": met, "status": "gated" if missed else "finished"}


def _tell(loggers: Sequence[Logger], result: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Give the loggers the stage's figures, and the scoreboard so far to those that show tables."""
    figures = {key: float(value) for key, value in result.items() if key in report.FIGURES and value is not None}
    figures |= {f"latency_ms/{size}": value for size, value in result.get("latency_ms", {}).items()}
    columns, rows = report.rows(results)
    for logger in loggers:
        logger.log_metrics(figures)
        if hasattr(logger, "log_table"):
            logger.log_table("scoreboard", columns=columns, data=rows)


def _tabulate(built: Built, lightning: Trainer, folder: Path) -> None:
    """Keep the stage's tables and give them to the loggers."""
    found: dict[str, tables.Table] = {}
    if callable(tabulating := getattr(built.module, "tables", None)):
        found |= tabulating()
    for callback in lightning.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Tabulates):
            found |= callback.tables(lightning, built.module)
    for name, table in found.items():
        tables.keep(folder / "tables", name, table)
        for logger in lightning.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(name, columns=list(table.columns), data=[list(row) for row in table.rows])


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
                    shown = getattr(logger, "log_image", None)
                    if path.suffix == ".gif":  # as an image, W&B keeps its first picture
                        shown = getattr(logger, "log_video", shown)
                    if shown is not None:
                        shown(name, [str(path)])
        except Exception as cause:  # whatever a technique, a logger or matplotlib may raise
            rank_zero_warn(f"stage {built.stage.name}: a picture is missing: {type(cause).__name__}: {cause}")


def _drawing(lightning: Trainer) -> list[Draws]:
    return [callback for callback in lightning.callbacks if isinstance(callback, Draws)]  # type: ignore[attr-defined]


def _width(built: Built, lightning: Trainer, seconds: float) -> dict[str, Any]:
    """On how many devices a stage was trained, of how many samples a step was made, and how many came a second."""
    stage, count = built.stage, lightning.world_size
    if stage.global_batch is None and count == 1:
        return {}
    found: dict[str, Any] = {"devices": count}
    if stage.global_batch is not None:
        batch = stage.global_batch.size
        found["global_batch_size"] = batch
        if stage.global_batch.rule is not None and (rates := learning_rates(stage)):
            found["learning_rate"] = rates[0] if len(rates) == 1 else rates
        if seconds:
            found["samples_per_second"] = round(batch * lightning.global_step / seconds)
    return found


class _Meter(Lean):
    """How long training took, and how many samples were tested."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None
        self._samples = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = self._so_far()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._so_far() if self._began is not None else self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def _so_far(self) -> float:
        now = time.monotonic()
        seconds, self._began = self.seconds + now - (now if self._began is None else self._began), now
        self.seconds = seconds
        return seconds

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
