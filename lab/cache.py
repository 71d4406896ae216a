"""Finished stages that can be used again: found by what decided them, taken over by hard links.

``OUT/.stages/KEY.json`` names a finished stage by its fingerprint's key. It is a hint, no promise: whoever finds one
looks whether the stage is still there and whole. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import inside, read_json, write_json
from lab.run import ENDED, Run, folders

FOLDER = ".stages"
ARTIFACT = ("network.json", "network.safetensors")
COPIED = ("metrics.csv", "results.json")
"""What may be written to later, where all else is replaced: a link would change both stages."""
LEFT_OUT = ("wandb", "logs", "error.txt")
"""What is not a stage's result."""


def remember(out: Path, key: str, stage_folder: Path) -> None:
    """Note that a finished stage has a fingerprint's key; the latest of several is the one that is found.

    Where nothing can be written, it is a warning: the stage is finished all the same.
    """
    try:
        entry = _entry(out, key)
        entry.parent.mkdir(exist_ok=True)
        write_json(entry, {"stage": stage_folder.resolve().relative_to(out.resolve()).as_posix()})
    except (OSError, ValueError) as cause:
        warnings.warn(f"{stage_folder} will not be found again: {cause}", stacklevel=2)


def find(out: Path, key: str) -> Path | None:
    """The folder of a finished stage with this key; None where there is none that is whole.

    Its run is readable, its results say that it has finished with this key, and what it kept is there. An entry whose
    stage is not is removed.
    """
    entry = _entry(out, key)
    try:
        folder = inside(out, Path(read_json(entry)["stage"]))
        if _is_whole(folder, key):
            return folder
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, UserError):  # whatever a damaged file leads to
        pass
    entry.unlink(missing_ok=True)
    return None


def link(source: Path, target: Path) -> None:
    """Make ``target`` a copy of a finished stage's folder that takes no room: its files are hard links.

    Where the file system cannot link, files are copied. Links to what is outside the stage are left out, and so is what
    isn't its result: W&B's folder, the traceback of an earlier failure, temporary files.

    Args:
        target: not there yet, or an empty folder.

    Raises:
        OSError: a file is gone or cannot be written; ``target`` is as it was.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for path in _results(source):
            copy = temporary / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _link(path.resolve(), copy, copied=path.parent == source and path.name in COPIED)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def tidy(out: Path) -> None:
    """Let every key lead to a stage that is whole, and forget those that none has any more."""
    known: dict[str, Path] = {}
    for folder in sorted(folders(out), key=lambda folder: folder.name):
        for stage, key in _keys(folder):
            known[key] = folder / stage
    for entry in (out / FOLDER).glob("*.json"):
        key = entry.stem
        if _KEY.fullmatch(key) and find(out, key) is None and key in known and _is_whole(known[key], key):
            remember(out, key, known[key])


_KEY = re.compile("[0-9a-f]{64}")


def _entry(out: Path, key: str) -> Path:
    if not _KEY.fullmatch(key):
        raise ValueError(f"a key is a SHA-256 in hexadecimal, got {key!r}")
    return out / FOLDER / f"{key}.json"


def _is_whole(folder: Path, key: str) -> bool:
    """Whether a folder is a finished stage with this key, of a run that is readable, with all that it kept."""
    try:
        run = Run(folder.parent)
        said: dict[str, Any] = run.results["stages"][folder.name]
        own = read_json(folder / "results.json")
        kept = [folder / name for name in ARTIFACT]
        if said.get("checkpoint") is not None:
            kept.append(inside(run.folder, said["checkpoint"]))
        measured = inside(folder, said.get("file", ARTIFACT[1]))
        return (
            bool(run.manifest)
            and all(each["status"] in ENDED and each["fingerprint"]["key"] == key for each in (said, own))
            and all(path.is_file() for path in kept)
            and measured.stat().st_size == said["bytes"]
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):  # whatever damaged files lead to
        return False


def _keys(run: Path) -> Iterator[tuple[str, str]]:
    """A run's stages that have a key, and their keys; none where it is damaged."""
    try:
        stages = Run(run).results["stages"]
        yield from [(name, said["fingerprint"]["key"]) for name, said in stages.items() if said.get("fingerprint")]
    except (KeyError, TypeError, AttributeError, UserError):
        return


def _results(source: Path) -> Iterator[Path]:
    """The files that are a stage's result; a link that stays within the stage is the file that it leads to."""
    whole = source.resolve(strict=True)
    for folder, below, files in os.walk(source):
        below[:] = [name for name in below if not name.startswith(".") and name not in LEFT_OUT]
        for name in files:
            path = Path(folder, name)
            own = not name.startswith(".") and name not in LEFT_OUT
            if own and path.is_file() and path.resolve().is_relative_to(whole):
                yield path


def _link(source: Path, target: Path, *, copied: bool) -> None:
    if not copied:
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:  # another device, a file system without links, no right to
            pass
        else:
            return
    shutil.copy2(source, target)
