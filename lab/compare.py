"""Several runs side by side: seeds aggregated, differences tested, what differs in the recipes.

A row of the comparison is a stage of a group of runs (:mod:`lab.groups`).
Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from lab import recipe, report, statistics
from lab.errors import UserError
from lab.groups import Group, Member, Pick, Seed, find, gather, leaves, members
from lab.registry import nearest
from lab.run import RunNotFound
from lab.statistics import Estimate, Test

ABSENT = "–"
"""What a recipe says of a key that it hasn't."""
FIGURES = (
    "parameters", "nonzero_parameters", "macs", "bytes", "latency_ms.batch_1", "latency_ms.batch_64", "train_seconds",
)  # fmt: skip
"""The numbers of a stage that a comparison shows beside its metrics, as means."""


@dataclass
class Row:
    """A stage of a group.

    Args:
        name: what tells it from the other rows.
        members: the runs in which it has finished.
        values: by metric and seed; finite numbers only.
    """

    name: str
    group: Group
    stage: str
    members: list[Member]
    values: dict[str, dict[Seed, float]]
    figures: dict[str, float]

    def estimate(self, metric: str) -> Estimate | None:
        """A metric's mean over the runs and its interval; None where no run has it."""
        values = self.values.get(metric)
        return statistics.estimate([*values.values()]) if values else None


@dataclass(frozen=True)
class Difference:
    """One row against another in one metric; ``p`` is Holm's over the comparisons in this metric."""

    row: Row
    baseline: Row
    metric: str
    test: Test
    p: float | None


@dataclass
class Comparison:
    """What :func:`compare` found.

    Args:
        columns: what the lists in ``recipe`` are in the order of: groups, or the stages of the only one.
        recipe: the keys that differ, each with every column's value.
        provenance: what else differs between the runs, of code, environment and data, each with the values of every
            group's runs.
        notes: what limits the figures, a sentence each.
    """

    groups: list[Group]
    rows: list[Row]
    metrics: list[str]
    differences: list[Difference]
    columns: list[str]
    recipe: dict[str, list[Any]]
    provenance: dict[str, list[list[str]]]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "rows": [
                {
                    "name": row.name, "group": row.group.label, "stage": row.stage,
                    "runs": [member.run.id for member in row.members],
                    "seeds": [member.seed[0] for member in row.members],
                    "metrics": {
                        metric: {**_plain(found), "values": [*row.values[metric].values()]}
                        for metric in self.metrics if (found := row.estimate(metric))
                    },
                    **row.figures,
                }
                for row in self.rows
            ],
            "differences": [
                {
                    "row": d.row.name, "baseline": d.baseline.name, "metric": d.metric, "test": d.test.kind,
                    **_plain(d.test.difference), "p": d.test.p, "p_holm": d.p,
                }
                for d in self.differences
            ],
            "recipe": {key: dict(zip(self.columns, values, strict=True)) for key, values in self.recipe.items()},
            "provenance": {
                what: {group.label: found for group, found in zip(self.groups, values, strict=True)}
                for what, values in self.provenance.items()
            },
            "notes": self.notes,
        }  # fmt: skip


def compare(
    picks: Iterable[Pick], *, metrics: Sequence[str] = (), baseline: str | None = None, every_pair: bool = False
) -> Comparison:
    """Aggregate runs over seeds and test the rows' differences.

    Args:
        picks: as :func:`find` gives them; a run that is named twice counts once.
        metrics: instead of all of the test's; ``accuracy`` means ``test/accuracy``.
        baseline: the row, by name or as a run, that every other is compared with. By default it is, with several
            groups, the first group's stage of the same name, and else the first row.
        every_pair: compare every row with every row before it.

    Raises:
        UserError: a run is damaged, nothing has finished, or a metric or the baseline is unknown.
    """
    groups = gather(members(picks))
    notes: list[str] = []
    rows = [row for group in groups for row in _rows(group, len(groups) > 1, notes)]
    if not rows:
        raise UserError(f"no stage has finished in {', '.join(m.run.id for group in groups for m in group.members)}")
    chosen = _chosen(rows, metrics)
    for row in rows:
        for metric in chosen:
            if row.values.get(metric) and (lost := len(row.members) - len(row.values[metric])):
                notes.append(f"{row.name}: {metric} is no finite number in {lost} of {len(row.members)} runs")
    if any(member.seed[1] is not None for group in groups for member in group.members):
        notes.append("folds share training data: intervals are narrower and p smaller than with independent data")
    pairs = _pairs(groups, rows, baseline, every_pair)
    columns, differing = _differing(groups)
    tests = _differences(pairs, chosen)
    return Comparison(groups, rows, chosen, tests, columns, differing, _provenance(groups), notes)


def _rows(group: Group, several: bool, notes: list[str]) -> Iterator[Row]:
    """The group's stages that have finished somewhere; notes say where they haven't."""
    for stage in group.stages:
        name = f"{group.label}/{stage}" if several and stage != recipe.ONLY_STAGE else group.label if several else stage
        stages = {member.run.id: member.results["stages"].get(stage, {}) for member in group.members}
        done = [m for m in group.members if isinstance(stages[m.run.id].get("metrics"), dict)]
        if lost := len(group.members) - len(done):
            notes.append(f"{name}: not finished in {lost} of {len(group.members)} runs")
        if not done:
            continue
        results = [(member, stages[member.run.id]) for member in done]
        values: dict[str, dict[Seed, float]] = {}
        for member, result in results:
            for metric, value in result["metrics"].items():
                at = values.setdefault(metric, {})
                if isinstance(value, int | float) and math.isfinite(value):
                    at[member.seed] = float(value)
        figures = {
            key: sum(found) / len(found) if len(set(found)) > 1 else found[0]
            for key in FIGURES
            if (found := [x for _, r in results if isinstance(x := report.value(r, key), int | float)])
        }
        yield Row(name, group, stage, done, values, figures)


def _chosen(rows: Sequence[Row], asked: Sequence[str]) -> list[str]:
    """The metrics to show.

    Raises:
        UserError: no row has one that was asked for.
    """
    known = list(dict.fromkeys(metric for row in rows for metric in row.values))
    if not asked:
        return report.metrics({row.name: {"metrics": row.values} for row in rows})
    chosen = []
    for name in asked:
        found = next((full for full in (name, f"test/{name}", f"val/{name}") if full in known), None)
        if found is None:
            raise UserError(f"no stage has a metric '{name}'{nearest(name, known)}")
        chosen.append(found)
    return list(dict.fromkeys(chosen))


def _pairs(
    groups: Sequence[Group], rows: Sequence[Row], baseline: str | None, every_pair: bool
) -> list[tuple[Row, Row]]:
    """What is compared with what."""
    if every_pair:
        return [(later, earlier) for earlier, later in combinations(rows, 2)]
    if baseline is not None:
        base = _baseline(rows, baseline)
        return [(row, base) for row in rows if row is not base]
    if len(groups) == 1:
        return [(row, rows[0]) for row in rows[1:]]
    first = {row.stage: row for row in rows if row.group is rows[0].group}
    return [(row, first.get(row.stage, rows[0])) for row in rows if row.group is not rows[0].group]


def _baseline(rows: Sequence[Row], name: str) -> Row:
    matching = [row for row in rows if row.name == name]
    matching = matching or [row for row in rows if name in (row.stage, row.group.label)]
    if not matching:
        try:
            picks = [(pick.run.id, pick.stage) for pick in find(name)]
        except RunNotFound:
            picks = []
        matching = [
            row for row in rows if any(m.run.id == i and s in (None, row.stage) for m in row.members for i, s in picks)
        ]
    if len(matching) != 1:
        among = nearest(name, [row.name for row in matching or rows])
        raise UserError(
            f"the baseline '{name}' is {'several rows' if matching else 'no row'} of this comparison{among}"
        )
    return matching[0]


def _differences(pairs: Sequence[tuple[Row, Row]], metrics: Sequence[str]) -> list[Difference]:
    """The tests of every pair, metric by metric, with Holm's correction over the pairs."""
    found = []
    for metric in metrics:
        tests = [
            (row, base, statistics.compare(row.values[metric], base.values[metric]))
            for row, base in pairs
            if row.values.get(metric) and base.values.get(metric)
        ]
        corrected = iter(statistics.holm([test.p for _, _, test in tests if test.p is not None]))
        found += [
            Difference(row, base, metric, test, None if test.p is None else next(corrected))
            for row, base, test in tests
        ]
    return found


def _differing(groups: Sequence[Group]) -> tuple[list[str], dict[str, list[Any]]]:
    """The keys in which groups differ, or the stages of the only one; what all stages share is said once."""
    recipes = [group.members[0].recipe for group in groups]
    if len(groups) == 1:
        columns = list(groups[0].stages)
        aligned = {"": [dict(leaves(recipes[0][stage])) for stage in columns]}
    else:
        columns = [group.label for group in groups]
        if all(len(group.stages) == 1 for group in groups):
            aligned = {"": [dict(leaves(said[group.stages[0]])) for said, group in zip(recipes, groups, strict=True)]}
        else:
            common = [stage for stage in groups[0].stages if all(stage in group.stages for group in groups)]
            aligned = {stage: [dict(leaves(said[stage])) for said in recipes] for stage in common}
    found: dict[str, list[Any]] = {}
    for path in dict.fromkeys(path for said in aligned.values() for column in said for path in column):
        values = {stage: [column.get(path, ABSENT) for column in said] for stage, said in aligned.items()}
        first, *others = values.values()
        alike = all(other == first for other in others)
        for stage, row in [("", first)] if alike else values.items():
            if any(value != row[0] for value in row):
                found[".".join((*([stage] if stage else []), *path))] = row
    lists = [", ".join(group.stages) for group in groups]
    return columns, {**({"stages": lists} if len(set(lists)) > 1 else {}), **found}


def _provenance(groups: Sequence[Group]) -> dict[str, list[list[str]]]:
    """What else differs between the runs, in the order code, environment, data: what each group's have, each once."""
    found: dict[str, list[list[str]]] = {}
    facts = [[_facts(member) for member in group.members] for group in groups]
    names = dict.fromkeys(name for group in facts for said in group for name in said)
    for name in sorted(names, key=lambda name: _ORDER.get(name.partition(" ")[0], 2)):
        # what a run does not tell of (a stage that it has not, data of a fold) is no difference
        values = [list(dict.fromkeys(said[name] for said in group if name in said)) for group in facts]
        if len({value for group in values for value in group}) > 1:
            found[name] = values
    return found


_ORDER = {"git": 0, "code": 1, "data": 3}
"""Where facts are told, by their first word; all of the environment stands between."""


def _facts(member: Member) -> dict[str, str]:
    """What decides a run's figures beside its recipe."""
    manifest = member.manifest
    git = _mapping(manifest.get("git"))
    changed = f"+{str(git.get('diff_sha256'))[:6]}" if git.get("dirty") else ""
    facts = {"git commit": f"{str(git.get('commit') or 'none')[:7]}{changed}"}
    for stage in member.stages:
        sources = _mapping(member.results["stages"].get(stage, {}).get("fingerprint")).get("code")
        facts |= {f"code of {package}": digest for package, _, digest in (s.partition("=") for s in _words(sources))}
    for package, version in _mapping(manifest.get("versions")).items():
        facts[package] = str(version or "none")
    for plugin, version in _mapping(manifest.get("plugins")).items():
        facts[f"plugin {plugin}"] = str(version or "none")
    hardware = _mapping(manifest.get("hardware"))
    facts |= {key: report.said(hardware[key]) or "none" for key in ("processor", "cpus", "gpus") if key in hardware}
    if member.seed[1] is None:
        data = _mapping(manifest.get("data"))
        facts |= {f"data of {stage}": str(data[stage])[:12] for stage in member.stages if stage in data}
    return facts


def _words(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain(found: Estimate) -> dict[str, Any]:
    return {"n": found.n, "mean": found.mean, "interval": list(found.interval) if found.interval else None}
