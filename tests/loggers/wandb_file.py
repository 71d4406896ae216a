"""Reads back what W&B wrote: the records of an offline run's ``.wandb`` file."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER = 7  # ":W&B", magic, version
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """One W&B run: ``history`` has a dict per log call, without W&B's own keys (those that start with ``_``)."""

    run_id: str = ""
    group: str = ""
    job_type: str = ""
    title: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def runs_in(folder: Path) -> list[WandbRun]:
    """The runs of every ``.wandb`` file below a folder, oldest first."""
    return [read(path) for path in sorted(folder.rglob("*.wandb"), key=lambda p: p.stat().st_mtime)]


def read(path: Path, *, wait: float = 10.0) -> WandbRun:
    """The run in one ``.wandb`` file.

    Args:
        wait: seconds to wait for the run's end: W&B's own process writes it a little after ``finish()`` returned.
    """
    until = time.monotonic() + wait
    while (run := _read(path)).exit_code is None and time.monotonic() < until:
        time.sleep(0.01)
    return run


def _read(path: Path) -> WandbRun:
    run = WandbRun()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.group, run.job_type = record.run.run_id, record.run.run_group, record.run.job_type
            run.title, run.project, run.tags = record.run.display_name, record.run.project, list(record.run.tags)
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    found = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
    return {
        key: float(value) if value in ("NaN", "Infinity", "-Infinity") else value
        for key, value in found.items()
        if not key.startswith("_")
    }


def _records(content: bytes) -> Iterator[Any]:
    """Protobuf messages in LevelDB's log format: blocks of 32 KiB, records split over them, each part with a CRC."""
    assert content[:4] in (b"", b":W&B"), content[:HEADER]
    at, parts = HEADER, b""
    while at + HEADER <= len(content):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        crc, size, kind = struct.unpack("<IHB", content[at : at + HEADER])
        part = content[at + HEADER : at + HEADER + size]
        if len(part) < size:  # still being written
            return
        assert zlib.crc32(bytes([kind]) + part) == crc, f"damaged record at byte {at}"
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
        at += HEADER + size
