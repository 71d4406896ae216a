"""What every test stands on: a folder of its own to work in, one thread, no W&B account, no names of other tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lab import registry
from lab.registry import KINDS

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background jobs, whatever they start included
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("COLUMNS", "160")
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture(autouse=True)
def own_names() -> Iterator[None]:
    """What a test registers or allows by ``--import`` is gone after it."""
    before = {kind: dict(kind._registered) for kind in KINDS.values()}
    allowed = set(registry._imported)
    yield
    registry._imported.intersection_update(allowed)
    for kind, names in before.items():
        kind._registered.clear()
        kind._registered.update(names)
