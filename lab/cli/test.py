"""Test a finished run's network again, also on other data.

lab test latest
lab test runs/distill/20260101-120000-abcdef/student data.split_seed=1
"""

from __future__ import annotations

import argparse

from lab.cli import options as shared

HELP = "test a finished run, also on other data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab test``."""
    shared.add_run(parser)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the test metrics."""
    return evaluate(options, "test")


def evaluate(options: argparse.Namespace, split: str) -> int:
    """Run ``trainer.test`` or ``trainer.validate`` and print what it gives."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from lab.errors import UserError
    from lab.trainer import quiet

    this, stage, built, trainer = shared.opened(options)
    step = f"{'validation' if split == 'validate' else split}_step"
    if not is_overridden(step, built.module):
        raise UserError(f"{this.id}/{stage}: {type(built.module).__name__} has no {step}")
    with quiet():
        found = getattr(trainer, split)(built.module, datamodule=built.data, verbose=False)
    metrics = {name: value for part in found for name, value in part.items()}
    if options.json:
        import json

        print(json.dumps({"run": this.id, "stage": stage, "metrics": metrics}))
        return 0
    from rich.table import Table

    from lab.report import text

    console = shared.console()
    console.print(text(f"{this.id}/{stage}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(text(name), f"{value:.4f}")
    console.print(table)
    return 0
