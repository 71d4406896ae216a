"""How much of the gap between two bounds each stage closes, over the runs of one recipe.

    python benchmarks/gap.py runs/adaptation [LOWER UPPER [METRIC]]

Of every finished run in the folder: (stage − lower) / (upper − lower) of its test metric, then the mean over the runs
with its 95 % interval (t). The same of what validators say: their correlations with the oracle.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab import Run
from lab.statistics import Estimate, estimate


def shown(found: Estimate, *, percent: bool = False) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    half = "" if found.half is None else f" ± {scale * found.half:.{digits}f}"
    return f"{scale * found.mean:.{digits}f}{half}"


def main(folder: Path, lower: str, upper: str, metric: str) -> None:
    runs = [Run(path) for path in sorted(folder.iterdir()) if (path / "results.json").is_file()]
    found = [run.results["stages"] for run in runs if run.results.get("status") == "finished"]
    if not found:
        raise SystemExit(f"{folder} has no finished run")
    stages = list(found[0])
    table = Table(
        "", metric, "of the gap, %", "information", "entropy", "snd", "A-distance", title=f"{len(found)} runs"
    )
    for stage in stages:
        values = [stages[stage]["metrics"][metric] for stages in found]
        low, high = ([stages[bound]["metrics"][metric] for stages in found] for bound in (lower, upper))
        closed = [(value - a) / (b - a) for value, a, b in zip(values, low, high, strict=True)]
        cells = [shown(estimate(values)), shown(estimate(closed), percent=True)]
        for name in ("information", "entropy", "snd"):
            followed = [stages[stage].get("validators", {}).get(name, {}).get("pearson") for stages in found]
            known = [value for value in followed if value is not None]
            cells.append(shown(estimate(known)) if known else "")
        apart = [stages[stage].get("a_distance", {}) for stages in found]
        after = [each["after"] for each in apart if "after" in each]
        cells.append(shown(estimate(after)) if after else "")
        table.add_row(stage, *cells)
    Console().print(table)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0]), *(given[1:3] or ("source_only", "on_target")), given[3] if len(given) > 3 else "test/accuracy")
