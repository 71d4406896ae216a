"""lab from Python: what the commands do, as objects."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lab import recipe
from lab.check import check
from lab.plan import Plan
from lab.registry import allow
from lab.run import Run


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = (), *, imports: Iterable[str] = ()
) -> Plan:
    """A recipe, merged and statically checked.

    Args:
        source: a file, a bundled recipe's name, or a mapping.
        overrides: ``path=value`` each.
        imports: packages whose classes the recipe may name, as ``--import``.

    Raises:
        RecipeError: with every problem that was found.
    """
    for package in imports:
        allow(package)
    return check(recipe.load(source, overrides))


def fit(
    source: str | os.PathLike[str] | Mapping[str, Any] | Plan,
    overrides: Iterable[str] = (),
    *,
    out: str | os.PathLike[str] | None = None,
    smoke: bool = False,
    imports: Iterable[str] = (),
) -> Run:
    """Train every stage of a recipe.

    Args:
        source: a file, a bundled recipe's name, a mapping, or what :func:`load_recipe` gave.
        overrides: ``path=value`` each.
        out: where runs lie; ``runs`` in the working directory by default.
        smoke: a few batches of every stage.
        imports: packages whose classes the recipe may name, as ``--import``.

    Returns:
        The run; its ``results`` have every stage's metrics.

    Raises:
        RecipeError: the recipe is wrong; nothing was written.
        StageFailed: training raised; the run's folder has what there is.
    """
    from lab import stages

    imports = list(imports)
    plan = source if isinstance(source, Plan) else load_recipe(source, overrides, imports=imports)
    return stages.fit(plan, out=Path(out) if out is not None else None, smoke=smoke, imports=imports)
