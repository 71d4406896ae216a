"""Write a finished stage's network as a file that runs elsewhere, and compare the file with it on held-out data.

lab export latest --format onnx
lab export latest/small --format onnx --to digits.onnx
lab export latest --format safetensors
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.cli import options as shared

HELP = "write a finished network as ONNX, torch.export or safetensors"
SAMPLES = 1000
"""Of the held-out data, that the file is compared on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab export``."""
    shared.add_run(parser)
    parser.add_argument(
        "--format", choices=("safetensors", "onnx", "torch_export"), default="onnx", help="of the file (default: onnx)"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="the file (default: beside the stage's network)")
    parser.add_argument(
        "--tolerance", type=float, metavar="X",
        help="largest difference, as a part of the largest output (default: 0.001, and 0.1 of a quantized network)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Export, compare, print the file's path last."""
    from lab import deployment
    from lab.errors import UserError
    from lab.trainer import quiet

    deployment.require(options.format)
    this, stage, built, _ = shared.opened(options)
    path = options.to or this.stage(stage) / f"exported{deployment.SUFFIXES[options.format]}"
    network = built.network.cpu()
    if built.data is None and options.format != "safetensors":
        raise UserError(f"{stage} has no data to export and compare with: give some, data=…")
    with quiet():
        inputs = list(held_out(built.data, network)) if built.data is not None else []
        facts = {"lab": json.dumps({"run": this.id, "stage": stage, **built.builder.facts}, default=str)}
        try:
            size = deployment.export(network, inputs[0][:1] if inputs else None, path, options.format, facts)
        except OSError as cause:
            raise UserError(f"{path} cannot be written: {cause.strerror or cause}") from cause
        if options.format != "safetensors":
            found = deployment.compare(network, deployment.load(path), inputs)
            found.refuse(path, deployment.tolerance(network, options.tolerance))
            print(f"{found.agreement:.2%} of decisions alike; differs by {found.share:.2g} of the largest output")
    print(f"{size:,} bytes")
    print(path)
    return 0


def held_out(data: Any, network: Any) -> Iterator[Any]:
    """Inputs of the test data, or of the validation data where there is none to test, of the network's type."""
    from lab.batch import Labelled

    data.prepare_data()
    data.setup("test")
    tests = getattr(data, "has_test", True)
    weight = next(network.parameters())
    left = SAMPLES
    for batch in data.test_dataloader() if tests else data.val_dataloader():
        inputs = Labelled.of(batch).inputs[:left]
        yield inputs.to(weight.dtype) if inputs.is_floating_point() else inputs
        left -= len(inputs)
        if left <= 0:
            return
