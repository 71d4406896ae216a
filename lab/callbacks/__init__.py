"""What goes along with any technique's training: progress, checkpoints, the network's profile."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer


@runtime_checkable
class Reports(Protocol):
    """A callback with something to say in the stage's ``results.json``.

    Any callback with this method takes part: once the selected weights are loaded and tested, lab calls it and merges
    the mapping that it returns (numbers, strings, lists and mappings of them) into the stage's results.
    """

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """The entries to add, by name."""
        ...
