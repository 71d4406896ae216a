"""Anyone's data: NumPy arrays in an ``.npz`` file.

    np.savez_compressed("cells.npz", inputs=images, targets=classes)

``inputs`` are ``[N, C, H, W]`` or ``[N, H, W]`` images, or ``[N, F]`` vectors; uint8 is taken as pixels and divided by
255, everything else as it is. ``targets`` are ``[N]`` whole numbers 0 … C-1 (classes), or ``[N]`` or ``[N, K]``
floating point (regression); -1 and NaN stand for "not known". A file without ``targets`` is one where none is known.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.batch import UNLABELLED, Labelled
from lab.datamodules.own import OwnData
from lab.ranges import ExistingFile, checked


class Arrays(OwnData):
    """The arrays ``inputs`` and ``targets`` of an ``.npz`` file.

    Training, validation and test get their parts of the labelled samples; samples without a label are for training.
    Prediction is for *every* sample of the file, in the file's order, labelled or not: row i of what ``lab predict``
    writes belongs to ``inputs[i]``. ``val_fraction: 0`` and ``test_fraction: 1`` test on every labelled sample.

    Args:
        path: the file. It is read without pickle: nothing in it is executed.

    Raises:
        FileNotFoundError: it isn't there.
        ValueError: it isn't such a file; the message says what it holds.
    """

    @checked
    def __init__(self, path: ExistingFile, **labelled: Any) -> None:
        super().__init__(**labelled)
        self.path = path

    def load(self) -> Labelled:
        """The file's samples."""
        arrays = _read(self.path)
        if "inputs" not in arrays:
            raise ValueError(f"{self.path} needs an array 'inputs', and 'targets' if they are known; {_holds(arrays)}")
        inputs = _inputs(arrays["inputs"], self.path)
        if "targets" not in arrays:
            return Labelled(inputs, torch.full((len(inputs),), UNLABELLED))
        targets = _targets(arrays["targets"], self.path)
        if len(inputs) != len(targets):
            raise ValueError(f"{self.path}: inputs and targets differ in length; {_holds(arrays)}")
        return Labelled(inputs, targets)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of the file."""
    try:
        with path.open("rb") as content:  # np.load leaves a file open that it cannot read
            file = np.load(content, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError(f"it holds one array, {file.dtype} {file.shape}, without a name")
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as cause:
        raise ValueError(
            f"{path} is no .npz file of plain arrays, as np.savez('{path.name}', inputs=..., targets=...) writes it: "
            f"{cause}"
        ) from cause


def _inputs(array: NDArray[Any], path: Path) -> Tensor:
    if array.dtype.kind not in "buif" or array.ndim < 2 or not array.size:
        raise ValueError(
            f"{path}: inputs must be numbers, [N, C, H, W] or [N, H, W] images or [N, F] vectors, "
            f"got {array.dtype} {array.shape}"
        )
    inputs = torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32))
    if not inputs.isfinite().all():
        raise ValueError(f"{path}: {int((~inputs.isfinite()).sum())} values of inputs are not finite numbers")
    return inputs.unsqueeze(1) if inputs.ndim == 3 else inputs


def _targets(array: NDArray[Any], path: Path) -> Tensor:
    if array.dtype.kind == "f" and array.ndim in (1, 2):
        targets = torch.from_numpy(array.astype(np.float32))
        if targets.isinf().any():
            raise ValueError(f"{path}: {int(targets.isinf().sum())} values of targets are infinite")
        return targets
    if array.dtype.kind in "bui" and array.ndim == 1:
        classes = torch.from_numpy(array.astype(np.int64))
        if (classes < UNLABELLED).any():
            raise ValueError(
                f"{path}: targets must be classes from 0 on ({UNLABELLED}: not known), got {classes.min()}"
            )
        return classes
    raise ValueError(
        f"{path}: targets must be [N] whole numbers (classes), or [N] or [N, K] floating point (regression), "
        f"got {array.dtype} {array.shape}"
    )


def _holds(arrays: dict[str, NDArray[Any]]) -> str:
    held = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
    return f"it holds {held or 'nothing'}"
