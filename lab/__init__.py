"""lab: one command and one recipe language for training techniques, alone and in chains, on PyTorch Lightning.

The same from Python, as objects instead of printed text::

    from lab import fit

    run = fit("distill", ["trainer.max_epochs=3"])
    run.results["stages"]["student"]["metrics"]["test/accuracy"]

Everything is imported on first use: ``import lab`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.api import fit as fit
    from lab.api import load_recipe as load_recipe
    from lab.api import repeat as repeat
    from lab.batch import Labelled as Labelled
    from lab.document import RecipeError as RecipeError
    from lab.errors import UserError as UserError
    from lab.run import Run as Run

_HOMES = {
    "fit": "lab.api",
    "load_recipe": "lab.api",
    "repeat": "lab.api",
    "Labelled": "lab.batch",
    "RecipeError": "lab.document",
    "UserError": "lab.errors",
    "Run": "lab.run",
}

__all__ = ["Labelled", "RecipeError", "Run", "UserError", "fit", "load_recipe", "repeat"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "registry"])
