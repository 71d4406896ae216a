"""What goes along with any technique's training: progress, checkpoints, the network's profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lab.batch import Labelled, SourceTarget
from lab.errors import UserError
from lab.tables import Table

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
class Tabulates(Protocol):
    """A callback with rows to show when the stage ends; a module shows the same by a method ``tables()``.

    Called as :class:`Draws` is, before it. Tables go to ``tables/`` in the stage's folder as CSV files, and to every
    logger with a ``log_table``.
    """

    def tables(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Table]:
        """The tables by name."""
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


def network_of(module: LightningModule) -> nn.Module:
    """The network that a module trains: its ``network``, or itself."""
    network = getattr(module, "network", None)
    return network if isinstance(network, nn.Module) else module


def training_batches(trainer: Trainer, module: LightningModule, samples: int) -> Iterator[Labelled]:
    """Samples of the training data, on the module's device: of all processes together about as many as asked.

    Of two domains they are the labelled one's.

    No random state is moved: the training that follows draws what it would have drawn.

    Raises:
        UserError: the training has no datamodule.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise UserError("training samples are needed, of a datamodule: give the stage `data:`")
    wanted = -(-samples // trainer.world_size)
    with torch.random.fork_rng(devices=()):
        for batch in data.train_dataloader():
            labelled = batch.source if isinstance(batch, SourceTarget) else batch
            moved = Labelled.of(trainer.strategy.batch_to_device(labelled, module.device))[:wanted]
            moved.inputs = trainer.precision_plugin.convert_input(moved.inputs)
            yield moved
            wanted -= len(moved)
            if wanted <= 0:
                return


EVERY_STEP = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip
"""The hooks that Lightning calls at every step of training."""


class Lean(Callback):
    """A callback without those hooks of every step that it doesn't define itself: Lightning passes over None."""

    watches_only: ClassVar[bool] = False
    """Whether training would be the same without it: then nothing of it is saved, and it decides no result."""
    times: ClassVar[bool] = False
    """Whether its results have the milliseconds of what is deployed, which then are the stage's."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for hook in EVERY_STEP:
            if getattr(cls, hook) is getattr(Callback, hook):
                setattr(cls, hook, None)
