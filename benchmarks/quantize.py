"""What 8 bits gain: latency of the deployed integers beside float32, in one run, and how far their answers are apart.

    python benchmarks/quantize.py [SECONDS]

timm's ResNet-18 at 3×224×224, batches of 8, two threads: as modules, compiled by torch, and as ONNX files in ONNX
Runtime, in float32 and with static 8 bits (and 7, for processors that cannot multiply bytes at once). All take turns;
medians. The images are crops of scikit-learn's two photos; those that calibrate are not those that are compared.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from lab import deployment, quantization
from lab.networks.timm import Timm

BATCH, SIDE = 8, 224


def crops(count: int, seed: int) -> Tensor:
    """``[count, 3, 224, 224]``, squares of the photos."""
    generator = torch.Generator().manual_seed(seed)
    photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(torch.randint(160, min(photo.shape[1:]), (), generator=generator))
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in photo.shape[1:])
        square = photo[None, :, top : top + side, left : left + side]
        found.append(F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True))
    return torch.cat(found)


@torch.no_grad()
def dense() -> nn.Module:
    """A network whose batch norms know the photos."""
    torch.manual_seed(0)
    network = Timm(1000, 3, "resnet18").train()
    for batch in crops(64, 1).split(16):
        network(batch)
    return network.eval()


@torch.no_grad()
def rounded(network: nn.Module, bits: int) -> nn.Module:
    """A copy with weights of some bits and activations of 8."""
    found, inputs = copy.deepcopy(network), crops(32, 2)
    plan = quantization.plan(found, inputs[:2], set(), bits=bits, activation_bits=8, ends=bits)
    quantization.insert(found, plan)
    quantization.calibrate(found, lambda: inputs.split(8))
    quantization.settle(found)
    return found


def main(seconds: float) -> None:
    torch.set_num_threads(2)
    network, inputs, fast = dense(), crops(32, 3), deployment.integers_are_fast()
    networks = {"float32": network, "8 bits": rounded(network, 8), "7 bits": rounded(network, 7)}
    runners: dict[str, deployment.Runner] = {"torch, float32": torch.inference_mode()(network)}
    runners["torch compiled, float32"] = torch.inference_mode()(torch.compile(network))
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, made in networks.items():
            path = Path(folder, f"{name}.onnx")
            sizes[key := f"ONNX Runtime, {name}"] = deployment.export(made, inputs[:1], path, "onnx")
            runners[key] = deployment.load(path)
        taken = deployment.times(runners, inputs[:BATCH], seconds=seconds)
    head = ("ms", "of torch", "of ONNX float32", "bytes", "differs by", "decides alike")
    table = Table("", *head, title=f"ResNet-18, {BATCH} × 3 × {SIDE} × {SIDE}")
    for name, run in runners.items():
        difference = deployment.compare(network, run, inputs.split(BATCH))
        gains = (taken[other] / taken[name] for other in ("torch, float32", "ONNX Runtime, float32"))
        size = f"{sizes[name]:,}" if name in sizes else ""
        of_largest = f"{difference.share:.2%}"
        table.add_row(
            name, f"{taken[name]:.1f}", *(f"{gain:.2f} ×" for gain in gains), size, of_largest,
            f"{difference.agreement:.0%}",
        )  # fmt: skip
    Console(width=120).print(table)
    if not fast:
        print("This CPU has no VNNI: its milliseconds say nothing about what 8 bits gain where there is one.")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
