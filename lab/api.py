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
    fresh: bool = False,
    imports: Iterable[str] = (),
) -> Run:
    """Train every stage of a recipe.

    Args:
        source: a file, a bundled recipe's name, a mapping, or what :func:`load_recipe` gave.
        overrides: ``path=value`` each.
        out: where runs lie; ``runs`` in the working directory by default.
        smoke: a few batches of every stage.
        fresh: train every stage, also those that an earlier run has finished just so.
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
    return stages.fit(plan, out=Path(out) if out is not None else None, smoke=smoke, fresh=fresh, imports=imports)


def repeat(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    seeds: int | None = None,
    folds: int | None = None,
    out: str | os.PathLike[str] | None = None,
    smoke: bool = False,
    fresh: bool = False,
    jobs: int | None = None,
    imports: Iterable[str] = (),
) -> list[Run]:
    """Train every stage of a recipe with several seeds, on several folds, or with each seed on each fold.

    Args:
        source: a file, a bundled recipe's name, or a mapping.
        overrides: ``path=value`` each.
        seeds: how many: the recipe's ``seed``, the next one, …
        folds: in how many parts the data are split; each is once what is tested on.
        out: where runs lie; ``runs`` in the working directory by default.
        smoke: a few batches of every stage.
        fresh: train every stage, also those that an earlier run has finished just so.
        jobs: how many at once, a process each; None: one after the other in this process.
        imports: packages whose classes the recipe may name, as ``--import``.

    Returns:
        The runs, which share a group; one that failed has the status ``failed`` and doesn't stop the others.

    Raises:
        RecipeError: the recipe is wrong; nothing was written.
        UserError: ``seeds`` is less than 1, or ``folds`` less than 2, or ``jobs`` less than 1.
    """
    from lab import repetition

    imports = list(imports)
    for package in imports:
        allow(package)
    wanted = repetition.variants(source, overrides, seeds=seeds, folds=folds)
    where = Path(out) if out is not None else None
    return list(repetition.fit(wanted, out=where, smoke=smoke, fresh=fresh, jobs=jobs, imports=imports))
