"""Clearing runs away: those that did not finish, those that were only a look, and old ones, but none that is needed.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from lab import cache
from lab.errors import UserError
from lab.run import ENDED, LOCK, RUNS, Run, RunNotFound, folders

UNFINISHED = ("failed", "interrupted", "stopped")
DAY = 86_400.0
BEGINNING = 60.0
"""Seconds in which a folder may look damaged because its files are being made."""
REMOVED = ".removed-"
"""What the folder of a run that is being deleted begins with."""


@dataclass(frozen=True)
class Candidate:
    """A run that may go.

    Args:
        why: its status, ``smoke`` or ``damaged``.
        size: bytes that are free without it, when all candidates before it are gone too.
    """

    folder: Path
    why: str
    size: int = 0


def select(out: Path, *, recipe: str | None = None, older_than: float | None = None) -> list[Candidate]:
    """The runs below ``out`` that can go.

    Never one that a process writes to, nor one that a run that stays took a network from.

    Args:
        recipe: only this recipe's.
        older_than: days; finished runs that ended before go too.
    """
    own = [folder for folder in sorted(folders(out), key=lambda folder: folder.name) if _is_own(out, folder)]
    chosen = {
        folder: why
        for folder in own
        if (recipe is None or folder.parent.name == recipe) and (why := _why(folder, older_than)) is not None
    }
    everywhere = {folder.resolve(): folder for folder in (*folders(RUNS), *own)}
    while True:
        gone = {folder.resolve() for folder in chosen}
        words = {word for path, folder in everywhere.items() if path not in gone for word in _needs(folder)}
        needed = [folder for folder in chosen if words & {folder.name, folder.name.rpartition("-")[2]}]
        if not needed:
            break
        for folder in needed:
            del chosen[folder]
    return list(_weighed([Candidate(folder, why) for folder, why in chosen.items()]))


def remove(out: Path, chosen: Iterable[Candidate]) -> list[Candidate]:
    """Delete runs: out of sight at once, then file by file; what an earlier removal left is deleted too.

    Returns:
        Those that are gone: a run that a process has begun to write to stays.

    Raises:
        UserError: a folder cannot be deleted.
    """
    gone = []
    for candidate in chosen:
        try:
            with Run(candidate.folder).lock():
                hidden = out / f"{REMOVED}{candidate.folder.name}-{secrets.token_hex(3)}"
                candidate.folder.rename(hidden)
                gone.append(candidate)
                shutil.rmtree(hidden)
            if not any(candidate.folder.parent.iterdir()):
                candidate.folder.parent.rmdir()
        except OSError as cause:
            raise UserError(f"{candidate.folder} cannot be removed: {cause}") from cause
        except UserError:  # it is being resumed
            continue
    for left in out.glob(f"{REMOVED}*"):
        if not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    cache.tidy(out)
    return gone


def _is_own(out: Path, folder: Path) -> bool:
    """Whether a folder lies below ``out`` itself, not behind a link; a lock that is a link is nobody's."""
    linked = any(path.is_symlink() for path in (folder.parent, folder, folder / LOCK))
    return not linked and folder.resolve().parent.parent == out.resolve()


def _why(folder: Path, older_than: float | None) -> str | None:
    """Why a run may go; None where it stays."""
    run = Run(folder)
    try:
        return None if run.busy else _reason(run, older_than)
    except OSError:  # who knows what is done to it
        return None


def _reason(run: Run, older_than: float | None) -> str | None:
    try:
        manifest, results = run.manifest, run.results
        status, whole = results["status"], all(isinstance(stage, dict) for stage in results["stages"].values())
    except (RunNotFound, KeyError, AttributeError):
        whole = False
    if not whole:
        return "damaged" if _untouched(run.folder) > BEGINNING else None
    if status == "running":  # and nobody runs it, unless the file system has no locks: then it writes now and then
        return "left" if _untouched(run.folder) > DAY else None
    age = _age(results.get("ended") or manifest.get("started"))
    if status in UNFINISHED or (status in ENDED and older_than is not None and age > older_than * DAY):
        return str(status)
    return "smoke" if manifest.get("smoke") is True else None


def _age(moment: Any) -> float:
    """Seconds since a moment; none where nobody knows."""
    try:
        return time.time() - datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return 0.0


def _untouched(folder: Path) -> float:
    """Seconds since anything in a folder was written."""
    return time.time() - max(os.lstat(path).st_mtime for path in _files(folder))


def _needs(folder: Path) -> set[str]:
    """The words of the references to other runs that a run was made with: a run's folder or id is among them."""
    try:
        manifest = Run(folder).manifest
    except RunNotFound:
        return set()
    parents, origins = manifest.get("parents"), manifest.get("origins")
    said = [*(parents if isinstance(parents, list) else []), *(origins.values() if isinstance(origins, dict) else [])]
    return {word for text in said for word in PurePosixPath(str(text)).parts}


def _weighed(chosen: Sequence[Candidate]) -> Iterator[Candidate]:
    """The candidates with what each frees: a file that has another name somewhere frees nothing."""
    seen: dict[tuple[int, int], int] = {}
    for candidate in chosen:
        size = 0
        for path in _files(candidate.folder):
            found = os.lstat(path)
            names = seen[found.st_dev, found.st_ino] = seen.get((found.st_dev, found.st_ino), 0) + 1
            size += found.st_size if names == found.st_nlink else 0
        yield replace(candidate, size=size)


def _files(folder: Path) -> Iterator[Path]:
    for inside, _, files in os.walk(folder):
        yield from (Path(inside, name) for name in files)
