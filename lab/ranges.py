"""Ranges of arguments: said once, in the annotation; checked in recipes before a run, and in Python at construction.

Paths of data that a run reads are such a range: what is missing is an error before a run's folder is made.

``temperature: Positive`` is all that a class says. ``lab check`` reads the annotation; ``@checked`` on ``__init__``
makes the constructor raise the same error as a ``ValueError`` (pydantic's ``ValidationError``) when called from
Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, ConfigDict, validate_call

from lab.files import located
from lab.registry import nearest

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]
Dropout = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]


checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))


def _there(path: Path) -> Path:
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} is not there, nor is the folder {path.parent}")
    hint = nearest(path.name, [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")])
    raise FileNotFoundError(f"{path} is not there{hint if len(hint) < LONG else ''}")


def _file(path: Path) -> Path:
    if _there(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    return path


def _folder(path: Path) -> Path:
    if not _there(path).is_dir():
        raise NotADirectoryError(f"{path} is a file, not a folder")
    return path


def _there_or_name(said: str | Path) -> Path | str:
    found = located(said, Path(), or_name=True) if isinstance(said, str) else said
    return _there(found) if isinstance(found, Path) else found


LONG = 200
"""How many characters of a folder's names an error shows at most; of longer ones it shows none."""
ExistingFile = Annotated[Path, AfterValidator(_file)]
"""A file that is there before anything is built or written."""
ExistingFolder = Annotated[Path, AfterValidator(_folder)]
"""A folder that is."""
ExistingPath = Annotated[Path, AfterValidator(_there)]
"""Either of them."""
PathOrName = Annotated[str | Path, AfterValidator(_there_or_name)]
"""A file or folder that is there, or a name, such as a data set's on a hub: see :func:`lab.files.located`."""
