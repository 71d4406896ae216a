"""The same recipe several times: with other seeds, on other folds of the data. Ordinary runs that share a group."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import recipe, run
from lab.check import check
from lab.errors import UserError
from lab.plan import Plan
from lab.run import Run

if TYPE_CHECKING:
    from lab.fresh import Fresh

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Variant:
    """One of several runs of a recipe: what it is called among them, and its plan."""

    label: str
    plan: Plan


def variants(
    source: Any, overrides: Iterable[str] = (), *, seeds: int | None = None, folds: int | None = None
) -> list[Variant]:
    """The plans of every seed on every fold, all checked.

    Args:
        source: a file, a bundled recipe's name, or a mapping.
        overrides: ``path=value`` each.
        seeds: how many; the recipe's ``seed`` (each stage's own, where it has one), the next one, …
        folds: in how many parts ``data.folds`` splits the data; each is once what is tested on.

    Raises:
        RecipeError: with every problem that was found.
        UserError: ``seeds`` is less than 1, or ``folds`` less than 2, or a seed would be 2³² or more.
    """
    if seeds is not None and seeds < 1:
        raise UserError(f"seeds must be 1 at least, got {seeds}")
    if folds is not None and folds < 2:
        raise UserError(f"folds must be 2 at least, got {folds}")
    overrides = list(overrides)
    parts = [[f"data.folds={folds}", f"data.fold={fold}"] for fold in range(folds)] if folds else [[]]
    plans = [check(recipe.load(source, [*overrides, *part])) for part in parts]
    return [
        Variant(_label(plan, i if seeds else None, fold if folds else None), _shifted(plan, i))
        for i in range(seeds or 1)
        for fold, plan in enumerate(plans)
    ]


def fit(
    wanted: Sequence[Variant],
    *,
    out: Path | None = None,
    smoke: bool = False,
    fresh: bool = False,
    jobs: int | None = None,
    command: Sequence[str] = (),
    imports: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Iterator[Run]:
    """Train the variants in one group; yields each run when it has ended, in their order, also one that failed.

    Args:
        fresh: take over no stage that an earlier run has.
        jobs: how many at once, a process each; None: one after the other in this process.
        tell: is given a line before each run, and one about each failure.

    Raises:
        RecipeError: an argument has the wrong type or range, or contradicts the data: in one run as in all.
        UserError: ``jobs`` is less than 1.
        Interrupted: Ctrl-C.
    """
    from lab import stages

    group = f"group-{secrets.token_hex(3)}"
    if jobs is not None:
        made = partial(run.create, out=out, command=command, imports=imports, group=group)
        yield from _at_once(wanted, jobs, made, {"smoke": smoke, "fresh": fresh}, tell)
        return
    for number, variant in enumerate(wanted, 1):
        tell(f"run {number} of {len(wanted)}: {variant.label}")
        try:
            yield stages.fit(
                variant.plan, out=out, smoke=smoke, fresh=fresh, command=command, imports=imports, group=group
            )
        except stages.StageFailed as failure:
            tell(f"{variant.label} failed: {failure}")
            yield failure.run


def _at_once(
    wanted: Sequence[Variant],
    jobs: int,
    made: Callable[[Plan], Run],
    noted: dict[str, bool],
    tell: Callable[[str], None],
) -> Iterator[Run]:
    """Train the variants in so many processes."""
    from lab.jobs import asked, spread, told, workers
    from lab.types import check_types

    for variant in wanted:
        check_types(variant.plan)

    def one(worker: Fresh, number: int) -> tuple[int, Run]:
        variant = wanted[number]
        tell(f"run {number + 1} of {len(wanted)}: {variant.label}")
        this = made(variant.plan)
        this.note(**noted)
        if last := told(this, worker, asked(this, this.manifest["imports"])):
            tell(f"{variant.label} failed: {last}")
        return number, this

    ended: dict[int, Run] = {}
    following = 0
    with workers("lab.jobs", jobs) as found:
        for number, this in spread(found, range(len(wanted)), one):
            ended[number] = this
            while following in ended:
                yield ended.pop(following)
                following += 1


def _label(plan: Plan, shift: int | None, fold: int | None) -> str:
    seed = next(iter(plan.stages.values())).seed
    parts = {"seed": None if shift is None else seed + shift, "fold": fold}
    return ", ".join(f"{word} {value}" for word, value in parts.items() if value is not None)


def _shifted(plan: Plan, shift: int) -> Plan:
    """The plan with every stage's seed moved on: stages with seeds of their own keep them apart."""
    if (largest := max(stage.seed for stage in plan.stages.values()) + shift) > MAX_SEED:
        raise UserError(f"a seed is {MAX_SEED} at most; the last of these runs would have {largest}")
    return replace(plan, stages={name: replace(stage, seed=stage.seed + shift) for name, stage in plan.stages.items()})
