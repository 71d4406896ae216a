"""Runs found and put together: those of one recipe that differ only in seed or fold are a group.

Read from the runs' files; nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lab import recipe, run
from lab.registry import nearest
from lab.run import Run, RunNotFound

Seed: TypeAlias = tuple[int, int | None]
"""What pairs two runs: the seed, and the fold where there is one."""


@dataclass(frozen=True)
class Pick:
    """A run that is to be compared, or one stage of it."""

    run: Run
    stage: str | None = None


@dataclass(frozen=True)
class Member:
    """A run as its files have it."""

    run: Run
    manifest: Mapping[str, Any]
    results: Mapping[str, Any]
    recipe: Mapping[str, Mapping[str, Any]]
    stages: tuple[str, ...]

    @property
    def seed(self) -> Seed:
        """The first stage's seed, and its data's fold."""
        data = next(iter(self.recipe.values()), {}).get("data")
        fold = data.get("fold") if isinstance(data, dict) and data.get("folds") else None
        return self.manifest["seed"], fold


@dataclass
class Group:
    """Runs that differ only in seed or fold."""

    label: str
    members: list[Member]

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that are compared, in the order in which they were trained."""
        return tuple(dict.fromkeys(stage for member in self.members for stage in member.stages))


def find(reference: str) -> list[Pick]:
    """The runs that an argument of ``lab compare`` means.

    Args:
        reference: a run (path, id, ``latest``), ``RUN/stage``, a group's id, a folder of runs, a recipe's name whose
            runs are in ``runs``, or ``FOLDER/GROUP`` for runs that are elsewhere.

    Raises:
        RunNotFound: it is none of these.
    """
    path = Path(reference)
    try:
        found, stage = run.locate(reference)
        return [Pick(found, stage)]
    except RunNotFound as unknown:
        for folder in (path, run.RUNS / reference):
            inside = sorted(folder.glob("*/manifest.json")) if os.path.isdir(folder) else []  # noqa: PTH112  # never raises
            if inside:
                return [Pick(Run(manifest.parent)) for manifest in inside]
        grouped = _grouped(path.parent if len(path.parts) > 1 else None)
        if path.name in grouped:
            return [Pick(one) for one in grouped[path.name]]
        if len(path.parts) > 1 or os.path.isdir(path):  # noqa: PTH112
            raise
        recipes = {folder.parent.name for folder in run.folders()}
        known = {*grouped, *recipes, *(folder.name for folder in run.folders())}
        message = f"{reference} is no run, group or recipe with runs in {run.RUNS}/{nearest(reference, known)}"
        raise RunNotFound(message) from unknown


def reference(this: Run) -> str:
    """What :func:`find` finds the run's whole group by."""
    group = str(this.manifest["group"])
    folder = this.folder.parent
    return group if folder.parent == run.RUNS else (folder / group).as_posix()


def _grouped(folder: Path | None) -> dict[str, list[Run]]:
    """The runs of a folder, or all below ``runs``, by group; damaged ones are left out."""
    found: dict[str, list[Run]] = {}
    for path in sorted(p.parent for p in folder.glob("*/manifest.json")) if folder else sorted(run.folders()):
        try:
            found.setdefault(str(Run(path).manifest.get("group")), []).append(Run(path))
        except RunNotFound:
            continue
    return found


def members(picks: Iterable[Pick]) -> list[Member]:
    """Each run once, with the stages that were asked for; all of them where a pick names none.

    Raises:
        RunNotFound: a run is damaged.
        RecipeError: its recipe is.
    """
    wanted: dict[Path, set[str | None]] = {}
    for pick in picks:
        wanted.setdefault(pick.run.folder.resolve(), set()).add(pick.stage)
    return [_member(Run(folder), stages) for folder, stages in wanted.items()]


def _member(this: Run, wanted: set[str | None]) -> Member:
    manifest, results = this.manifest, this.results
    stages = results.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(found, dict) for found in stages.values()):
        raise RunNotFound(f"{this.folder / 'results.json'} is damaged: expected a mapping of stages")
    if not isinstance(manifest.get("seed"), int):
        raise RunNotFound(f"{this.folder / 'manifest.json'} is damaged: expected a whole number as seed")
    said = {name: node.plain() for name, node in recipe.load(this.recipe).stages.items()}
    return Member(this, manifest, results, said, tuple(s for s in said if None in wanted or s in wanted))


def gather(members: Iterable[Member]) -> list[Group]:
    """Runs whose recipes differ only in seed or fold together; a seed that is there already begins another group."""
    found: dict[str, list[list[Member]]] = {}
    for member in members:
        shared = member.manifest.get("group") != member.run.id
        seedless = {stage: {".".join(k): v for k, v in leaves(said)} for stage, said in member.recipe.items()}
        alike = found.setdefault(
            json.dumps([member.manifest.get("group") if shared else None, seedless, member.stages], default=str), []
        )
        free = next((group for group in alike if member.seed not in [one.seed for one in group]), None)
        if free is None:
            alike.append([member])
        else:
            free.append(member)
    gathered = [sorted(group, key=lambda m: m.seed) for alike in found.values() for group in alike]
    return [Group(label, group) for label, group in zip(_labels([g[0] for g in gathered]), gathered, strict=True)]


def _labels(members: Sequence[Member]) -> list[str]:
    """A name for each group, by one of its runs: the recipe's, where that is not enough its group's or its run's id."""
    recipes = [str(member.manifest.get("recipe")) for member in members]
    grouped = [f"{name} {m.manifest.get('group')}" for name, m in zip(recipes, members, strict=True)]
    single = [f"{name} {m.run.id.rpartition('-')[2]}" for name, m in zip(recipes, members, strict=True)]
    labels = []
    for name, of_group, of_run, member in zip(recipes, grouped, single, members, strict=True):
        shared = member.manifest.get("group") != member.run.id
        longer = of_group if shared and grouped.count(of_group) == 1 else of_run
        labels.append(name if recipes.count(name) == 1 else longer)
    return labels


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A stage's leaves by path, without what seeds and folds are told apart by."""
    if path in (("seed",), ("data", "fold")):
        return
    children: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        children = [(str(i), child) for i, child in enumerate(value)]
    if not children:
        yield path, value
    for key, child in children:
        yield from leaves(child, (*path, key))
