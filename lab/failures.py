"""What ended a stage, in one line for people: the error, where it was raised, and what may help."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import torch

from lab.errors import UserError

LIBRARY = re.compile(r"[/\\](torch|lightning|lightning_fabric|pytorch_lightning|torchmetrics|lab)[/\\]|^<")
"""Files whose place says little about what is wrong with a plugin."""
HINTS = {
    "memory ran out": "a smaller data.batch_size with trainer.accumulate_grad_batches, or another trainer.precision, "
    "needs less",
    "a process that reads data died": "as when memory runs out, or when the samples crash it: fewer data.num_workers, "
    "or 0 to see where",
}


def said(cause: BaseException) -> str:
    """An error in one line: those that are written for people speak for themselves, others have type and place."""
    message = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(cause, ValueError | UserError) or getattr(cause, "filename", None):
        return message
    if (what := _known(cause)) is not None:
        return f"{what}: {HINTS[what]} ({message})"
    message = message if message == type(cause).__name__ else f"{type(cause).__name__}: {message}"
    own = [frame for frame in traceback.extract_tb(cause.__traceback__) if not _is_library(frame.filename)]
    return f"{message} ({Path(own[-1].filename).name}:{own[-1].lineno}, in {own[-1].name})" if own else message


def _known(cause: BaseException) -> str | None:
    message = str(cause)
    if isinstance(cause, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message:
        return "memory ran out"
    if isinstance(cause, RuntimeError) and message.startswith("DataLoader worker"):
        return "a process that reads data died"
    return None


def _is_library(file: str) -> bool:
    standard = Path(sysconfig.get_path("stdlib"))
    in_standard = Path(file).is_relative_to(standard) and "site-packages" not in file
    return in_standard or LIBRARY.search(file) is not None
