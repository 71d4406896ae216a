"""Writes a stage's network as the file that is deployed; the stage's bytes and milliseconds are that file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from lab import deployment
from lab.callbacks import Lean, network_of, training_batches
from lab.callbacks.profile import latency
from lab.errors import UserError
from lab.ranges import Positive, checked

COMPARED = 256
"""Samples of the training data that the file is compared on."""


class Export(Lean):
    """Exports the network when its stage has ended, and compares the file with it; a file that differs ends the run.

    Args:
        format: ``onnx``, which runs in ONNX Runtime on the CPU, or ``torch_export``.
        tolerance: the largest difference, as a part of the largest output: 0.001 by default, and 0.1 for a quantized
            network, of which each number that lies between two steps may become either.
    """

    times = True

    @checked
    def __init__(self, format: Literal["onnx", "torch_export"] = "onnx", tolerance: Positive | None = None) -> None:
        self.format: deployment.Format = format
        self.tolerance = tolerance

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that what is needed is there, before anything is trained."""
        deployment.require(self.format)
        if getattr(trainer, "datamodule", None) is None:
            raise UserError("export: the file is compared on the stage's data: give it `data:`")

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """The file's name and ``bytes``, its ``latency_ms``, and how far its outputs are from the network's."""
        network = network_of(module)
        inputs = torch.cat([batch.inputs for batch in training_batches(trainer, module, COMPARED)])
        path = Path(trainer.default_root_dir) / f"network{deployment.SUFFIXES[self.format]}"
        size = deployment.export(network, inputs[:1], path, self.format)
        run = deployment.load(path)
        found = deployment.compare(network, run, torch.split(inputs, 64))
        found.refuse(path, deployment.tolerance(network, self.tolerance))
        return {
            "file": path.name,
            "bytes": size,
            "runtime": deployment.RUNTIMES[self.format],
            "latency_ms": latency(network, run, inputs[:1].cpu()),
            "export_difference": round(found.share, 8),
        }
