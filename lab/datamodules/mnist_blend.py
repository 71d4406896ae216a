"""MNIST and its photo-blended colours: the MNIST → MNIST-M shift, made of images that lab's dependencies bring.

Y. Ganin et al.: Domain-Adversarial Training of Neural Networks, JMLR 17, 2016, arXiv:1505.07818, section 5.2.4 and
appendix B: a digit d is blended with a patch p of a photo, in every channel, as |p − d|. The paper takes BSDS500's
photos and 60,000 digits; here they are scikit-learn's two and 5,000.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lab.batch import Labelled
from lab.datamodules.domains import Domains
from lab.datamodules.loader import seeded
from lab.datamodules.mnist5k import SIDE, MNIST5k
from lab.ranges import Count, Fraction, checked
from lab.transforms import Transform


def blended(digits: Tensor, patches: Tensor) -> Tensor:
    """|patch − digit| of ``[N, 1, H, W]`` and ``[N, C, H, W]`` uint8 pixels: ``[N, C, H, W]`` uint8."""
    return (patches.short() - digits.short()).abs().to(torch.uint8)


def patches_of(photos: list[Tensor], count: int, side: int, generator: torch.Generator) -> Tensor:
    """``[count, C, side, side]`` patches of photos ``[C, H, W]``, each photo and each place in it equally likely."""
    found = []
    for number in torch.randint(len(photos), (count,), generator=generator).tolist():
        _, height, width = photos[number].shape
        top, left = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in (height, width))
        found.append(photos[number][:, top : top + side, left : left + side])
    return torch.stack(found)


class MNISTBlend(Domains):
    """From black-and-white digits to the same kind in colour, blended with photos; both ``(3, 28, 28)`` in [0, 1].

    Digit k of the target is digit k of the source, blended: as in the paper, the training images of the two show the
    same 3,500 digits, and none of them is among the 500 to validate and the 1,000 to test on.

    Args:
        train_on: what training and validation batches have: ``both`` domains, without the target's labels; or
            labelled samples of the ``source``, or of the ``target``.
        batch_size: training samples of each domain a batch and process.
        eval_batch_size: the same for validation and test.
        val_fraction: part of the samples to validate on.
        test_fraction: part of the samples to test on.
        transforms: what happens to training inputs of either domain, in this order, anew in every epoch.
        seed: of the orders of training and its augmentation.
        split_seed: of the splits.
        patch_seed: of the patches.
        drop_last: leave a last, smaller training batch out.
    """

    @checked
    def __init__(
        self,
        train_on: Literal["both", "source", "target"] = "both",
        *,
        batch_size: Count = 64,
        eval_batch_size: Count = 512,
        val_fraction: Fraction = 0.1,
        test_fraction: Fraction = 0.2,
        transforms: tuple[Transform, ...] = (),
        seed: int = 0,
        split_seed: int = 0,
        patch_seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        shared: dict[str, Any] = {
            "batch_size": batch_size, "eval_batch_size": eval_batch_size, "val_fraction": val_fraction,
            "test_fraction": test_fraction, "transforms": transforms, "seed": seed, "split_seed": split_seed,
            "drop_last": drop_last,
        }  # fmt: skip
        super().__init__(source=InColour(**shared), target=Blended(patch_seed, **shared), train_on=train_on)


class InColour(MNIST5k):
    """MNIST5k's digits with three equal channels."""

    def load(self) -> Labelled:
        """Each channel the same."""
        digits = super().load()
        return Labelled(digits.inputs.expand(-1, 3, -1, -1).contiguous(), digits.targets)


class Blended(MNIST5k):
    """MNIST5k's digits, blended with photos.

    Args:
        patch_seed: of the patches.
    """

    @checked
    def __init__(self, patch_seed: int = 0, **labelled: Any) -> None:
        super().__init__(**labelled)
        self.patch_seed = patch_seed

    def load(self) -> Labelled:
        """A patch for each digit, of scikit-learn's photos of a temple and a flower."""
        from sklearn.datasets import load_sample_images

        photos = [torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in load_sample_images().images]
        digits = super().load()
        patches = patches_of(photos, len(digits), SIDE, seeded("patches", self.patch_seed))
        return Labelled(blended(digits.inputs, patches), digits.targets)
