"""Docstrings: real English text that every installation has, for a first look at text classification.

The first paragraphs of docstrings in eight packages that lab stands on, 1,000 of each; which package is a text from?
The packages' own names are taken out of the texts. Other versions of the packages have other texts.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lab.datamodules.cache import cached
from lab.datamodules.tables import Table
from lab.datamodules.text import Text
from lab.ranges import checked

PACKAGES = {
    "matplotlib": "matplotlib", "networkx": "networkx", "numpy": "numpy", "pandas": "pandas", "scipy": "scipy",
    "sklearn": "scikit-learn", "sympy": "sympy", "torch": "torch",
}  # fmt: skip
"""The classes: what is imported, and the distribution that has it."""
EACH = 1000
WORDS = range(6, 80)
"""How many words a text may have."""


class Docstrings(Text):
    """8,000 paragraphs of eight packages: 5,600 to train on, 800 to validate, 1,600 to test.

    For the arguments see :class:`~lab.datamodules.text.Text`.
    """

    @checked
    def __init__(self, **text: Any) -> None:
        super().__init__(path="docstrings", text="text", target="package", **text)

    def prepare_data(self) -> None:
        """Read the packages' source and cache the texts, once for all processes and runs."""
        _paragraphs()

    @property
    def tables(self) -> dict[str, Table]:
        """The one table, not split."""
        stored = _paragraphs()
        content = bytes(stored["content"].numpy())
        ends = stored["ends"].tolist()
        texts = [content[begin:end].decode() for begin, end in zip([0, *ends], ends, strict=False)]
        names = [name for name in PACKAGES for _ in range(EACH)]
        return {"train": Table(pa.table({"text": texts, "package": names}), "docstrings")}


def _paragraphs() -> dict[str, Tensor]:
    """``content``, UTF-8 bytes of all texts, package by package, and ``ends`` ``[8 · EACH]``, where each ends."""
    versions = [importlib.metadata.version(distribution) for distribution in PACKAGES.values()]
    key = hashlib.sha256(" ".join(versions).encode()).hexdigest()[:12]
    return cached(f"docstrings-{key}", _read)


def _read() -> dict[str, Tensor]:
    texts = [text.encode() for package in PACKAGES for text in _of(package)]
    return {
        "content": torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8),
        "ends": torch.tensor([len(text) for text in texts]).cumsum(0),
    }


def _of(package: str) -> list[str]:
    """``EACH`` different paragraphs of a package, in an order that has nothing to do with where they stand.

    Raises:
        ValueError: there are fewer.
    """
    specification = importlib.util.find_spec(package)
    assert specification is not None
    folder = Path((specification.submodule_search_locations or [""])[0])
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py"), key=lambda path: _shuffled(path.relative_to(folder).as_posix())):
        for text in _in(path):
            found.setdefault(text.lower(), text)
        if len(found) > 2 * EACH:
            break
    if len(found) < EACH:
        raise ValueError(f"{package} has {len(found)} docstrings of {WORDS.start} words or more, {EACH} are needed")
    return sorted(found.values(), key=_shuffled)[:EACH]


def _in(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in others' strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            paragraph = re.split(r"\n\s*\n", (ast.get_docstring(node) or "").strip())[0]
            text = " ".join(re.sub(_NAMES, " ", paragraph).split())
            if len(text.split()) in WORDS:
                yield text


_NAMES = re.compile(rf"\b({'|'.join((*PACKAGES, *PACKAGES.values()))})\b", re.IGNORECASE)


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
