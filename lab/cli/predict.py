"""Write a finished run's predictions as Parquet: one row a sample, of the run's test data or of any other.

lab predict latest
lab predict latest/student data='{name: arrays, path: new.npz}' --to new.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lab.cli import options as shared

HELP = "write a finished run's predictions, also on new data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab predict``."""
    shared.add_run(parser)
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="the Parquet file (default: predictions.parquet in the stage)"
    )


def run(options: argparse.Namespace) -> int:
    """Predict, write, print the file's path last."""
    from pyarrow import parquet

    from lab.errors import UserError
    from lab.files import replacing
    from lab.trainer import quiet

    this, stage, built, trainer = shared.opened(options)
    with quiet():
        parts = trainer.predict(built.module, datamodule=built.data)
    table = _table(parts or [])
    path = options.to or this.stage(stage or "") / "predictions.parquet"
    try:
        with replacing(path) as temporary:
            parquet.write_table(table, temporary)
    except OSError as cause:
        raise UserError(f"{path} cannot be written: {cause.strerror or cause}") from cause
    print(f"{table.num_rows:,} rows: {', '.join(table.column_names)}")
    print(path)
    return 0


def _table(parts: list[Any]) -> Any:
    """The batches' columns end to end; what is no mapping becomes the column ``prediction``, matrices become lists."""
    import pyarrow
    import torch

    named = [part if isinstance(part, dict) else {"prediction": part} for part in parts]
    columns = {}
    for name in named[0] if named else ():
        values = torch.cat([torch.as_tensor(part[name]).reshape(-1, *part[name].shape[1:]) for part in named]).cpu()
        columns[name] = pyarrow.array(values.tolist() if values.ndim > 1 else values.numpy())
    return pyarrow.table(columns)
