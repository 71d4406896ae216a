"""Techniques, one a file; and what they stand on: LightningModule, without what a step of it costs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sized
from typing import Any

from lightning.pytorch import LightningModule


def counted(samples: Sized) -> Any:
    """How many samples there are, for Lightning's ``log(batch_size=...)`` with ``sync_dist``.

    Its mean of the processes' counts is a whole number where they are: 180 and 179 would make 179.
    """
    return float(len(samples))


class Technique(LightningModule):
    """A LightningModule whose bookkeeping takes microseconds less a step.

    Lightning notes the name of the hook that it calls some forty times a step, each time through
    ``nn.Module.__setattr__``, and reads the signature of ``training_step`` anew at every step.
    """

    unsharded: str | None = None
    """Why its weights cannot be shared out among processes (``strategy: fsdp``), if they can't; a callback's, too."""

    @classmethod
    def refuses(cls, arguments: Mapping[str, Any]) -> Mapping[str, str]:
        """Arguments of the Trainer that it cannot be trained with, and why; ``lab check`` says so.

        Args:
            arguments: its own, as a recipe says them.
        """
        return {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        step = cls.__dict__.get("training_step")
        if inspect.isfunction(step):
            step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
