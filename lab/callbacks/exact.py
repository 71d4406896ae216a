"""What makes a training resumable: the moments between two steps at which it can be left and taken up again.

Such a moment is before every step, and once more after the last: the step before is over, with its validation, and the
next batch is not yet drawn. A state that was saved then is put back at the same place of the loop, after all hooks of a
fresh start have run, so that whatever they did is undone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lab import state, stopping
from lab.callbacks import Lean
from lab.replay import Replayed
from lab.stopping import Stopped

KEY = "lab"
"""Where a checkpoint has what this adds to it."""
AGREE_EVERY = 0.5
"""Seconds between two moments at which several processes ask each other whether to save or to stop."""

LENGTHS = ("total_steps", "T_max", "warmup_steps", "_schedule_phases")
"""The attributes in which torch's and lab's schedules keep what follows from the length of the training."""

Moment: TypeAlias = Literal["step", "end"]


@runtime_checkable
class Keeps(Protocol):
    """A callback that writes states when it is told to."""

    def due(self) -> bool:
        """Whether it is time to write one."""
        ...

    def keep(self, trainer: Trainer) -> None:
        """Write one; all processes take part."""
        ...


@runtime_checkable
class Guards(Protocol):
    """A callback that has a say in whether a state is worth keeping."""

    def check(self, trainer: Trainer) -> None:
        """Raise if it is not."""
        ...


class Exact(Lean):
    """Saves and restores everything that a training depends on, and stops it when the process is asked to.

    Beside Lightning's own (weights, optimizers, schedulers, counters, callbacks) a checkpoint then has, for every
    process: the random generators, attributes that changed, sums of metrics, frozen parameters and modes, the
    metrics so far; and what loggers with ``state_dict`` and ``load_state_dict`` say. Loaders that have these two go on
    by them, others by :class:`~lab.replay.Replayed`.

    Args:
        longer: a training that was stopped early goes on, if its limits allow; else only what comes after its last
            step is done again.
    """

    def __init__(self, *, longer: bool = False) -> None:
        self.longer = longer
        self._keepers: list[Keeps] = []
        self._guards: list[Guards] = []
        self._lengths: list[dict[str, Any]] = []
        self._moment: Moment | None = None
        self._kept = False  # whether the state at the end is on disk
        self._loaded: dict[str, Any] | None = None
        self._attributes: state.Attributes | None = None
        self._unchecked: state.Attributes | None = None
        self._changed_by_check: list[tuple[str, str]] = []
        self._steps = 0
        self._agree_at = 1  # steps
        self._agreed = 0, 0.0  # steps, and the time

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}  # not its attributes: it is not part of what it saves

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning adds it outside the constructor
        self._keepers = [callback for callback in callbacks if isinstance(callback, Keeps)]
        self._guards = [callback for callback in callbacks if isinstance(callback, Guards)]
        loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        _make_resumable(trainer)
        run = loop.run
        loop.run = lambda: self._run(trainer, run)  # type: ignore[method-assign]
        _before(loop, "on_advance_start", lambda: self._epoch(trainer))
        _before(epoch_loop, "advance", lambda: self._step(trainer))
        _before(loop, "on_run_end", lambda: self._end(trainer))
        if stopping.listens():  # else Lightning does
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # asked here, less often

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What schedules know of the training's length, before they are told that of the one that was left."""
        schedules = [vars(config.scheduler) for config in trainer.lr_scheduler_configs]
        self._lengths = [{name: known[name] for name in LENGTHS if name in known} for known in schedules]

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unchecked = state.Attributes(state.owners(trainer))

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training that is gone on with has no such check: what it changed is part of the state."""
        if self._unchecked is not None:
            self._changed_by_check = [(name, key) for name, key, _ in self._unchecked.differing()]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agreed = 0, time.monotonic()
        stopping.be_patient(True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.be_patient(False)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        stopping.be_patient(False)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.world_size == 1 and stopping.overdue():
            raise Stopped(stopping.asked() or 0)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint if KEY in checkpoint else None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._moment is None or self._attributes is None:
            return  # in the middle of something: weights, not a state to go on from
        own = {
            "random": state.randomness(),
            "attributes": self._attributes.changed(),
            "metrics": state.metrics(pl_module),
            "logged": state.logged(trainer.fit_loop.epoch_loop._results),
            "gradients": _gradients(pl_module),
            "exhausted": list(_exhausted(trainer.fit_loop)),
        }
        connector = trainer._logger_connector
        checkpoint[KEY] = {
            "moment": self._moment,
            "processes": _gathered(trainer, own),
            "frozen": state.frozen(pl_module),
            "should_stop": trainer.should_stop,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "metrics": {name: dict(getattr(connector, name)) for name in _METRICS},
            "loggers": {type(one).__qualname__: one.state_dict() for one in _resumable(trainer.loggers)},
        }

    def _epoch(self, trainer: Trainer) -> None:
        """Before an epoch: all hooks of a fresh start have run."""
        if self._attributes is None:
            self._attributes = state.Attributes(state.owners(trainer))
            self._attributes.count(self._changed_by_check)
        if self._loaded is not None and self._loaded[KEY]["moment"] == "end":
            self._restore(trainer, self._loaded)
            trainer.should_stop = False  # what ended it then is over: it is to go on
            for config, lengths in zip(trainer.lr_scheduler_configs, self._lengths, strict=True):
                vars(config.scheduler).update(lengths)

    def _step(self, trainer: Trainer) -> None:
        """Before a batch is drawn."""
        if self._loaded is not None:
            self._restore(trainer, self._loaded)
        elif self._steps and not _accumulating(trainer):
            self._look(trainer)
        self._steps += 1

    def _end(self, trainer: Trainer) -> None:
        """After the last step and its validation, before anyone is told that training has ended."""
        if not self._kept:
            self._keep(trainer, "end", self._keepers)
        number, *_ = self._together(trainer, [float(stopping.asked() or 0)])
        if number:
            raise Stopped(int(number), saved=bool(self._keepers))

    def _run(self, trainer: Trainer, run: Callable[[], None]) -> None:
        """Train; where training had ended when it was left, only what its end brings is done again."""
        loop = trainer.fit_loop
        ended = False
        if self._loaded is not None and self._loaded[KEY]["moment"] == "end":
            loop.setup_data()
            ended = loop.done or (self._loaded[KEY]["should_stop"] and not self.longer)
        if not ended or self._loaded is None:
            run()
            return
        loop.on_run_start()
        self._attributes = state.Attributes(state.owners(trainer))
        self._restore(trainer, self._loaded)
        self._kept = True
        loop.on_run_end()

    def _look(self, trainer: Trainer) -> None:
        """Save or stop, if any process wants to."""
        if trainer.world_size > 1 and self._steps < self._agree_at:
            return
        wanted = [float(stopping.asked() or 0), *(float(keeper.due()) for keeper in self._keepers)]
        number, *due = self._together(trainer, wanted)
        chosen = [keeper for keeper, wants in zip(self._keepers, due, strict=True) if wants or number]
        if chosen:
            self._keep(trainer, "step", chosen)
        if number:
            raise Stopped(int(number), saved=bool(chosen))

    def _together(self, trainer: Trainer, wanted: list[float]) -> list[float]:
        """The greatest that any process wants; on several processes at moments that they all know beforehand."""
        if trainer.world_size == 1:
            return wanted
        steps, since = self._agreed
        took = (time.monotonic() - since) / max(self._steps - steps, 1)
        pause = max(1.0, AGREE_EVERY // max(took, 1e-6)) if trainer.is_global_zero else 0.0
        told = torch.tensor([*wanted, pause], dtype=torch.float64, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        *wanted, pause = told.tolist()
        self._agree_at, self._agreed = self._steps + int(pause), (self._steps, time.monotonic())
        return wanted

    def _keep(self, trainer: Trainer, moment: Moment, keepers: Sequence[Keeps]) -> None:
        for guard in self._guards:
            guard.check(trainer)
        self._moment = moment
        try:
            for keeper in keepers:
                keeper.keep(trainer)
        finally:
            self._moment = None

    def _restore(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Everything as it was at this moment of the training that was left."""
        self._loaded = None
        saved, module, loop = checkpoint[KEY], trainer.lightning_module, trainer.fit_loop
        weights = checkpoint.get("current_model_state", checkpoint["state_dict"])  # the former beside averaged ones
        trainer.strategy.load_model_state_dict({"state_dict": weights}, strict=module.strict_loading)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for config, schedule in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
            config.scheduler.load_state_dict(schedule)
        loop.load_state_dict(checkpoint["loops"]["fit_loop"])
        own = saved["processes"][trainer.global_rank % len(saved["processes"])]
        if saved["moment"] == "step":
            _reposition(loop)
            _exhausted(loop)[:] = own["exhausted"]
        loop._combined_loader_states_to_load = []
        _not_restarting(loop)
        trainer.should_stop = saved["should_stop"]
        trainer.accumulate_grad_batches = saved["accumulate_grad_batches"]  # a callback may change it with the epoch
        for name, values in saved["metrics"].items():
            getattr(trainer._logger_connector, name).update(values)
        for logger in _resumable(trainer.loggers):
            if (said := saved["loggers"].get(type(logger).__qualname__)) is not None:
                logger.load_state_dict(said)
        state.set_frozen(module, saved["frozen"])
        elsewhere = len(saved["processes"]) != trainer.world_size
        if elsewhere:
            rank_zero_warn(
                f"the training was left with {len(saved['processes'])} processes and goes on with "
                f"{trainer.world_size}: what is drawn at random from now on is other than it would have been"
            )
        assert self._attributes is not None
        self._attributes.restore(own["attributes"])
        state.set_metrics(module, own["metrics"])
        state.set_logged(loop.epoch_loop._results, own["logged"], trainer, elsewhere=elsewhere)
        _set_gradients(module, own["gradients"])
        state.set_randomness(own["random"])


_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def _before(loop: _Loop, name: str, first: Callable[[], None]) -> None:
    """Have something called before a method of a loop, each time."""
    method = getattr(loop, name)

    def both(*arguments: Any) -> Any:
        first()
        return method(*arguments)

    setattr(loop, name, both)


def _make_resumable(trainer: Trainer) -> None:
    """Have training loaders that don't know how to go on replaced by such that do, before they are first asked."""
    loop, strategy = trainer.fit_loop, trainer.strategy
    setup_data, process = loop.setup_data, strategy.process_dataloader
    training = False

    def setup() -> None:
        nonlocal training
        training = True
        try:
            setup_data()
        finally:
            training = False

    def ahead() -> bool:
        fetcher = loop._data_fetcher
        return isinstance(fetcher, _PrefetchDataFetcher) and fetcher.length is None

    def processed(loader: object) -> object:
        loader = process(loader)
        return Replayed(loader, ahead) if training and not _resumable([loader]) else loader

    loop.setup_data = setup  # type: ignore[method-assign]
    strategy.process_dataloader = processed  # type: ignore[method-assign,assignment]


def _resumable(things: Iterable[Any]) -> list[Any]:
    """Those that say what their state is, and take it again."""
    return [one for one in things if all(callable(getattr(one, f"{verb}state_dict", None)) for verb in ("", "load_"))]


def _accumulating(trainer: Trainer) -> bool:
    """Whether the gradients so far belong to a step that isn't over."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return trainer.lightning_module.automatic_optimization and batches % trainer.accumulate_grad_batches != 0


def _gradients(module: LightningModule) -> dict[str, Any]:
    """Those that a manual optimization may still want; an automatic one begins with none."""
    if module.automatic_optimization:
        return {}
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _set_gradients(module: LightningModule, saved: Mapping[str, Any]) -> None:
    if not module.automatic_optimization:
        for name, parameter in module.named_parameters():
            parameter.grad = saved[name].to(parameter.device) if name in saved else None


def _gathered(trainer: Trainer, own: dict[str, Any]) -> list[Any]:
    """Every process's, on all of them."""
    if trainer.world_size == 1:
        return [own]
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def _reposition(loop: _FitLoop) -> None:
    """Let the next batch be the one that was to come; Lightning does it only where nobody asked for the data before."""
    assert loop._combined_loader is not None
    assert loop._data_fetcher is not None
    loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
    iter(loop._data_fetcher)
    loop._data_fetcher.fetched += loop.epoch_loop.batch_progress.current.ready


def _exhausted(loop: _FitLoop) -> list[bool]:
    """Which of several loaders that are read in turns until all have ended has done so in this epoch."""
    assert loop._combined_loader is not None
    flags: list[bool] = getattr(loop._combined_loader._iterator, "_consumed", [])
    return flags


def _not_restarting(loop: _Loop) -> None:
    """The loops have their places: nothing is left for Lightning to work out."""
    loop.on_iteration_done()
    for part in vars(loop).values():
        if isinstance(part, _Loop):
            _not_restarting(part)
