"""Data sets that take long to read, kept as one safetensors file each.

The folder is ``$LAB_CACHE``, else ``$XDG_CACHE_HOME/lab``, else ``~/.cache/lab``. A cache only saves time: a damaged
file is written anew, and where nothing can be written the data are read from their source every time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Where cached data lie.

    Raises:
        RuntimeError: no variable says so, and the user has no home.
    """
    if own := os.environ.get("LAB_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "lab"
    return Path.home() / ".cache" / "lab"


def cached(name: str, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in the cache under ``name``; built, and left there, where they are missing or damaged."""
    try:
        path = folder() / f"{name}.safetensors"
    except RuntimeError as cause:
        logger.warning("%s is not cached, and will be read as slowly next time: %s", name, cause)
        return build()
    tensors = _read(path)
    if tensors is None:
        tensors = build()
        try:
            _write(path, tensors)
        except OSError as cause:
            logger.warning("%s is not cached, and will be read as slowly next time: %s", name, cause)
    return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' names, types, shapes and bytes, in hexadecimal."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a whole file; None for one that is missing, cut short or changed."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            whole = (file.metadata() or {}).get("sha256") == digest(tensors)
    except (OSError, SafetensorError):
        return None
    return tensors if whole else None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """The file under its name in one step: another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(tensors, {"sha256": digest(tensors)}))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
