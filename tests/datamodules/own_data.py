"""A run on data of the user's own, and what the tests of such data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lab import Run, fit
from lab.cli import main
from lab.datamodules.labelled import LabelledData

DIGITS = load_digits()
PIXELS = (DIGITS.images * 15).astype(np.uint8)  # [1797, 8, 8]


def write_images(folder: Path, rows: range, *, names: bool = True) -> None:
    """Digits as PNG files, in a folder for each class or in none."""
    for row in rows:
        parent = folder / f"digit{DIGITS.target[row]}" if names else folder
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[row]).save(parent / f"{row:04}.png")


def fitted(data: dict[str, Any], network: Any = "mlp", epochs: int = 2) -> Run:
    adam = {"name": "adam", "lr": 0.01}
    return fit(
        {
            "data": data,
            "module": {"name": "supervised", "network": network, "optimizer": adam},
            "trainer": {"max_epochs": epochs},
            "callbacks": {"progress": None, "profile": None},
        }
    )


def predicted(run: Run, *overrides: str) -> dict[str, list[Any]]:
    assert main(["predict", str(run.folder), *overrides, "--to", "out.parquet"]) == 0
    found: dict[str, list[Any]] = pyarrow.parquet.read_table("out.parquet").to_pydict()
    return found


def batches(data: LabelledData) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in data.train_dataloader()])


def covered_once(folds: list[LabelledData]) -> torch.Tensor:
    """How often each class is held out, after seeing that every sample is, once."""
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    whole = [torch.cat([part.inputs for part in (fold.train, fold.val, fold.test)]).flatten(1) for fold in folds]
    held = torch.cat([fold.test.inputs for fold in folds]).flatten(1)
    assert torch.equal(ordered(held), ordered(whole[0]))
    return torch.stack([fold.test.targets.bincount(minlength=fold.num_classes or 0) for fold in folds])


def ordered(rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(sorted(rows.tolist())))
