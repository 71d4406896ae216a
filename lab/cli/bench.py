"""Time finished networks side by side, in one process: each as modules, and as the files that are deployed.

lab bench latest/tuned latest/small
lab bench latest --formats torch,onnx --batch-sizes 1,8,64 --json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from lab.cli import options as shared

HELP = "time finished networks, and the files that they are deployed as"
FORMATS = ("torch", "onnx", "torch_export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab bench``."""
    parser.add_argument("references", metavar="RUN[/STAGE]", nargs="+", help="a run's folder, its id, or `latest`")
    parser.add_argument("--formats", default="torch,onnx", metavar="A,B", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--batch-sizes", default="1,64", metavar="A,B", help="(default: 1,64)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each is timed at least (default: 1)")
    shared.add_import(parser)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Open, export, time, print one line for each network and format."""
    import json

    from lab import deployment
    from lab.errors import UserError

    formats, sizes = options.formats.split(","), options.batch_sizes.split(",")
    if wrong := [name for name in formats if name not in FORMATS]:
        raise UserError(f"--formats: no '{wrong[0]}'; there are: {', '.join(FORMATS)}")
    if wrong := [size for size in sizes if not size.isdecimal() or not int(size)]:
        raise UserError(f"--batch-sizes: '{wrong[0]}' is no number of samples")
    with tempfile.TemporaryDirectory() as folder:
        runners: dict[str, deployment.Runner] = {}
        rows: list[dict[str, Any]] = []
        shape: Any = None
        for number, reference in enumerate(options.references):
            network, example, name = _opened(options, reference)
            if shape is not None and example.shape != shape.shape:
                raise UserError(
                    f"{name} takes inputs of {(*example.shape[1:],)}, and those before {(*shape.shape[1:],)}"
                )
            shape = example
            for form in formats:
                runners[key := f"{name} {form}"], size = _runner(network, example, form, Path(folder, str(number)))
                rows.append({"network": name, "format": form, "bytes": size, "key": key})
        for size in map(int, sizes):
            batch = shape.repeat(size, *[1] * (shape.ndim - 1))
            taken = deployment.times(runners, batch, seconds=options.seconds)
            for row in rows:
                row[f"ms@{size}"] = taken[row["key"]]
                row[f"samples/s@{size}"] = round(size / taken[row["key"]] * 1e3, 1)
    for row in rows:
        del row["key"]
    if not deployment.integers_are_fast():
        shared.console(stderr=True).print("this CPU has no VNNI: weights of 8 bits may be slower than those of 7")
    if options.json:
        print(json.dumps(rows))
    else:
        _print(rows)
    return 0


def _opened(options: argparse.Namespace, reference: str) -> tuple[Any, Any, str]:
    """A network in evaluation mode, one input of its data, and its name."""
    from lab.cli.export import held_out
    from lab.errors import UserError

    options.reference, options.overrides = reference, []
    this, stage, built, _ = shared.opened(options)
    if built.data is None:
        raise UserError(f"{reference} has no data to take an input from")
    network = built.network.cpu().eval()
    return network, next(held_out(built.data, network))[:1], f"{this.id}/{stage}"


def _runner(network: Any, example: Any, form: str, stem: Path) -> tuple[Any, int]:
    import torch

    from lab import deployment

    if form == "torch":
        return torch.inference_mode()(network), sum(t.numel() * t.element_size() for t in network.state_dict().values())
    path = stem.with_suffix(deployment.SUFFIXES[form])  # type: ignore[index]
    size = deployment.export(network, example, path, form)  # type: ignore[arg-type]
    return deployment.load(path), size


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("network", "format") else "right")
    for row in rows:
        table.add_row(*(Text(f"{value:,}" if isinstance(value, int | float) else value) for value in row.values()))
    shared.console().print(table)
