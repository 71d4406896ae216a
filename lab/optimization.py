"""Optimizers and schedulers as recipes inject them: the class with its arguments bound, waiting for its parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

OptimizerFactory: TypeAlias = Callable[[Iterable[Any]], Optimizer]
"""Of parameters, or of groups of them."""
SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]

STEPS = ("total_steps", "T_max")
"""What schedulers call the number of steps of the whole training; such a schedule moves at every step."""
EPOCH_STEPS = "epoch_steps"
"""What lab's own call the number of steps of an epoch."""


Length: TypeAlias = Callable[[], tuple[int, int]]
"""Gives the optimizer steps of the whole training, and of an epoch."""


def given_steps(factory: Callable[..., Any], arguments: Mapping[str, Any], length: Length) -> dict[str, int]:
    """The arguments for the length of training and of an epoch that a scheduler has and a recipe left out."""
    parameters = inspect.signature(factory).parameters
    missing = [name for name in (*STEPS, EPOCH_STEPS) if name in parameters and name not in arguments]
    if not missing:
        return {}
    total_steps, epoch_steps = length()
    return {name: epoch_steps if name == EPOCH_STEPS else total_steps for name in missing}


def scheduled(factory: SchedulerFactory, optimizer: Optimizer, length: Length, monitor: str | None) -> dict[str, Any]:
    """Lightning's description of a learning-rate schedule.

    Args:
        length: asked where the schedule needs it: a training without an end has none.
        monitor: what a plateau schedule watches.

    A schedule over the length of training (cosine, one-cycle) moves at every step, any other at every epoch, as in
    torch's own documentation.
    """
    bare = factory.func if isinstance(factory, functools.partial) else factory
    bound = factory.keywords if isinstance(factory, functools.partial) else {}
    scheduler = factory(optimizer, **given_steps(bare, bound, length))
    over_training = any(name in inspect.signature(bare).parameters for name in STEPS)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "step" if over_training else "epoch"}
    return config | ({"monitor": monitor} if isinstance(scheduler, ReduceLROnPlateau) and monitor else {})
