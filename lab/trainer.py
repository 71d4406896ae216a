"""Lightning's Trainer as a stage uses it: the recipe's arguments, lab's defaults, the stage's folder."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from typing_extensions import override

LOG_EVERY_N_STEPS = 25
SMOKE = {
    "max_epochs": 1, "min_epochs": None, "max_steps": -1, "limit_train_batches": 2, "limit_val_batches": 2,
    "limit_test_batches": 2, "num_sanity_val_steps": 0, "val_check_interval": None, "check_val_every_n_epoch": 1,
}  # fmt: skip
"""What ``--smoke`` makes of any stage: a few batches of everything."""

SHARDED = {"fsdp": False, "fsdp_cpu_offload": True}
"""The strategies that are :class:`lab.sharding.Sharded`, and whether the parts are kept in the CPU's memory."""

_CHATTER = (
    ".*number of training batches.*smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*does not have many workers.*",
    ".*Total length of `list` across ranks is zero.*",  # no validation
    ".*`srun` command is available.*",  # lab.nodes looks itself
    ".*isinstance.treespec, LeafSpec.* is deprecated.*",  # Lightning's own, with this torch
)


class NoProfiler(Profiler):
    """Measures nothing, at once: Lightning asks its own for a new context some fifty times a step."""

    _nothing = contextlib.nullcontext()

    @override
    def profile(self, action_name: str) -> Any:
        return self._nothing

    @override
    def start(self, action_name: str) -> None:
        """Nothing."""

    @override
    def stop(self, action_name: str) -> None:
        """Nothing."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its tips and advertisements; its warnings stay, but for those that lab answers itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    try:
        for logger in (*loggers, tips):
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _CHATTER:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def make(
    arguments: Mapping[str, Any],
    folder: Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    *,
    smoke: bool = False,
) -> Trainer:
    """The trainer of one stage.

    Args:
        arguments: the recipe's.
        folder: the stage's; checkpoints and whatever else callbacks write go there.
        smoke: a few batches of everything.
    """
    if not torch.cuda.is_available():  # else torch's optimizers look for a GPU anew at every step, a tenth of a ms
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    made = Trainer(
        **{
            "log_every_n_steps": LOG_EVERY_N_STEPS,
            "profiler": NoProfiler(),
            **translated(arguments),
            **(SMOKE if smoke else {}),
        },
        callbacks=list(callbacks),
        logger=list(loggers),
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    made.smoke = smoke  # type: ignore[attr-defined]  # for what counts in epochs that are not there then
    return made


def translated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What Lightning's Trainer takes, where a recipe's names mean something of lab's own: ``fsdp``."""
    if arguments.get("strategy") not in SHARDED:
        return dict(arguments)
    from lab.sharding import Sharded

    return {**arguments, "strategy": Sharded(offload=SHARDED[arguments["strategy"]])}


def processes(arguments: Mapping[str, Any]) -> tuple[int, bool]:
    """On how many processes a trainer with these arguments would train, and whether its strategy starts them itself."""
    with quiet():
        planned = Trainer(**translated(arguments), logger=False, enable_checkpointing=False)
    return planned.world_size, isinstance(planned.strategy.launcher, _MultiProcessingLauncher)
