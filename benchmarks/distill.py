"""Accuracy of distilled students and their controls over seeds: means, 95 % intervals, paired differences.

python benchmarks/distill.py [SEEDS]
"""

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy import stats

from lab import fit

PAIRS = [
    ("student", "control"),
    ("student", "control_all_labels"),
    ("student_all_labels", "control_all_labels"),
    ("student_200_labels", "control_200_labels"),
]


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval (Student's t)."""
    mean = sum(values) / len(values)
    return mean, float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def main(seeds: int) -> None:
    accuracies: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            run = fit(Path(__file__).with_suffix(".yaml"), [f"seed={seed}"], out=folder)
            for stage, result in run.results["stages"].items():
                accuracies.setdefault(stage, []).append(result["metrics"]["test/accuracy"])
    console = Console(width=100)
    table = Table("stage", "test accuracy", "by seed", title=f"mnist5k, {seeds} seeds", title_justify="left")
    for stage, values in accuracies.items():
        mean, half = interval(values)
        table.add_row(stage, f"{mean:.4f} ± {half:.4f}", " ".join(f"{value:.3f}" for value in values))
    console.print(table)
    differences = Table("difference, paired by seed", "points", title_justify="left")
    for one, other in PAIRS:
        mean, half = interval([100 * (a - b) for a, b in zip(accuracies[one], accuracies[other], strict=True)])
        differences.add_row(f"{one} − {other}", f"{mean:+.2f} ± {half:.2f}")
    console.print(differences)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
