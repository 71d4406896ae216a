"""Which code runs: of each class its package, as the version that was installed or as a digest of its source.

Nothing is imported here: what counts has been, where it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

INSTALLED = {"site-packages", "dist-packages"}
"""What the folders of installed packages are called."""
DIGITS = 16
"""Hexadecimal digits of a package's digest that are told."""
_PYTHONS = sys.stdlib_module_names - {"__main__"}


def forget() -> None:
    """Read sources anew where they are asked for again."""
    _of_package.cache_clear()


def of(classes: Iterable[Any], besides: Iterable[str] = ()) -> str | None:
    """``package=version`` or ``package=digest`` of lab and of the packages of classes and their bases, by name.

    A package is its version where it was installed from an index. Anything else (a checkout, an editable install, a
    file that ``--import`` named) is its source, and that of such packages beside it that it imports.

    Args:
        besides: packages to leave out.

    Returns:
        None where a package has no source to read, as a notebook.
    """
    bases = {base for found in classes for base in getattr(found, "__mro__", (found,))}
    waiting, seen = sorted({"lab", *(_top(base.__module__) for base in bases)}), {*besides}
    told: dict[str, str] = {}
    while waiting:
        package = waiting.pop()
        if package in seen or package in _PYTHONS:
            continue
        seen.add(package)
        said, imported = _of_package(package)
        if said is None:
            return None
        told[package] = said
        waiting += imported
    return " ".join(f"{package}={said}" for package, said in sorted(told.items()))


@functools.cache
def _of_package(package: str) -> tuple[str | None, tuple[str, ...]]:
    """A package's version, or the digest of its source and the packages of this machine's own that it imports.

    Read once a process, or since :func:`forget`: what is edited later is not what runs.
    """
    places = _places(package)
    if version := _released(package, places):
        return version, ()
    files = {path.relative_to(place).as_posix(): path for place in places for path in _sources(place)}
    if not files:
        return None, ()
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:DIGITS], tuple(sorted(name for name in _imported(package) if _is_own(name)))


def _places(package: str) -> list[Path]:
    """The folders of a loaded package, or a module's file; none where there is no source."""
    module = sys.modules.get(package)
    file = getattr(module, "__file__", None)
    return [Path(place) for place in getattr(module, "__path__", ())] or ([Path(file)] if file else [])


def _sources(place: Path) -> Iterator[Path]:
    """The Python files of a package's folder, or the one of a module."""
    if place.is_file():
        yield place
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        found = (Path(folder, name) for name in files if name.endswith(".py"))
        yield from (path for path in found if path.is_file())  # editors leave links to nowhere


def _imported(package: str) -> set[str]:
    """The packages that what a package's loaded modules name comes from."""
    inside = [m for name, m in list(sys.modules.items()) if name == package or name.startswith(f"{package}.")]
    values = [value for module in inside for value in list(vars(module).values())]
    names = [v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None) for v in values]
    return {_top(name) for name in names if isinstance(name, str)}


def _is_own(package: str) -> bool:
    """Whether a package's files are this machine's own: neither installed nor Python's."""
    places = _places(package)
    return bool(places) and package not in _PYTHONS and not _installed(places)


def _installed(places: Iterable[Path]) -> bool:
    return any(INSTALLED & set(place.parts) for place in places)


def _released(package: str, places: Iterable[Path]) -> str | None:
    """The version of a package that came from an index; None where its version does not say what is in it."""
    if not _installed(places):
        return None
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(package)
        if not names:
            return None
        distribution = importlib.metadata.distribution(names[0])
    from_elsewhere = distribution.read_text("direct_url.json")  # a folder, an archive, a repository
    return None if from_elsewhere else distribution.version


def _top(module: str) -> str:
    return module.partition(".")[0]
