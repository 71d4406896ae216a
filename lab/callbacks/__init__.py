"""What goes along with any technique's training: progress, checkpoints, the network's profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@runtime_checkable
class Reports(Protocol):
    """A callback with something to say in the stage's ``results.json``.

    Any callback with this method takes part: once the selected weights are loaded and tested, lab calls it and merges
    the mapping that it returns (numbers, strings, lists and mappings of them) into the stage's results.
    """

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """The entries to add, by name."""
        ...


@runtime_checkable
class Finishes(Protocol):
    """A callback that changes the network itself when training has ended; a module does the same by ``finish()``.

    Called once, in every process, with the selected weights loaded, before the test: what is tested and saved is what
    it leaves.
    """

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Change the network."""
        ...


@runtime_checkable
class Draws(Protocol):
    """A callback with something to show when the stage ends; a module shows the same by a method ``pictures()``.

    Called once, after :class:`Reports`, on the first process, with the selected weights loaded and tested. What is
    drawn goes to ``pictures/`` in the stage's folder and to every logger with a ``log_image``. A picture that cannot
    be drawn is a warning, not a lost run. Draw on a ``matplotlib.figure.Figure``, never with pyplot: nothing is left
    open, and no display is needed.
    """

    def pictures(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Figure | bytes]:
        """The pictures by name: figures, or the bytes of a PNG or GIF file."""
        ...


EVERY_STEP = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip
"""The hooks that Lightning calls at every step of training."""


class Lean(Callback):
    """A callback without those hooks of every step that it doesn't define itself: Lightning passes over None."""

    watches_only: ClassVar[bool] = False
    """Whether training would be the same without it: then nothing of it is saved, and it decides no result."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for hook in EVERY_STEP:
            if getattr(cls, hook) is getattr(Callback, hook):
                setattr(cls, hook, None)
