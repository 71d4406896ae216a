"""How fast batches come, without a network: lab's loaders beside Dataset + DataLoader on MNIST's images.

    python benchmarks/loading.py [ROUNDS]

Shuffled epochs of 64 images, one thread, no workers; both give float32 images in [0, 1] and their classes. The last
rows add augmentation, by torchvision's transforms sample by sample in the Dataset, by lab's on whole batches. The
figures are medians over the rounds; the ratios are of the same round.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from lab.datamodules.mnist5k import MNIST5k
from lab.transforms.geometry import Affine, Crop, Flip

BATCH, EPOCHS = 64, 3


class Images(Dataset):
    """One image at a time, as tutorials write it."""

    def __init__(self, images: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index].float().div(255)
        return self.transform(image) if self.transform else image, self.targets[index]


def ready(**arguments: Any) -> MNIST5k:
    data = MNIST5k(batch_size=BATCH, **arguments)
    data.prepare_data()
    data.setup()
    return data


def samples_a_second(loader: Iterable[Any]) -> float:
    count, began = 0, time.perf_counter()
    for _ in range(EPOCHS):
        for inputs, _ in loader:
            count += len(inputs)
    return count / (time.perf_counter() - began)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    plain = ready()
    images, targets = plain.train.inputs, plain.train.targets
    changed = v2.Compose([v2.RandomCrop(28, 2), v2.RandomHorizontalFlip(), v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1))])
    augmented = ready(transforms=(Crop(2), Flip(), Affine(10, 0.1, (0.9, 1.1))))
    tensors = TensorDataset(images.float() / 255, targets)
    peers = {
        "Dataset + DataLoader": (DataLoader(Images(images, targets), BATCH, shuffle=True), plain),
        "TensorDataset + DataLoader": (DataLoader(tensors, BATCH, shuffle=True), plain),
        "Dataset + DataLoader, crop, flip, affine": (
            DataLoader(Images(images, targets, changed), BATCH, shuffle=True), augmented,
        ),
    }  # fmt: skip
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for round_ in range(rounds + 1):  # the first one warms up
        for name, (peer, data) in peers.items():
            pair = samples_a_second(peer), samples_a_second(data.train_dataloader())
            if round_:
                speeds[name].append(pair)
    table = Table("peer", "peer, samples/s", "lab, samples/s", "ratio", title=f"{rounds} rounds", title_justify="left")
    for name, pairs in speeds.items():
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(own / other for other, own in pairs)
        table.add_row(name, f"{theirs:,.0f}", f"{ours:,.0f}", f"{ratio:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
