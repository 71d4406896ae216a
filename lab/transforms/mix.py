"""Blends of two samples, targets included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lab.ranges import Fraction, Positive, checked
from lab.transforms import Draw, Mixing
from lab.transforms.geometry import rectangle


class Mixup(Mixing):
    """λx + (1 − λ)x′, and the targets alike, with λ from Beta(α, α) for every sample.

    H. Zhang, M. Cisse, Y. Dauphin, D. Lopez-Paz: mixup: Beyond Empirical Risk Minimization, ICLR 2018,
    arXiv:1710.09412.

    Args:
        alpha: α.
        p: the part of the samples that is blended.
    """

    @checked
    def __init__(self, alpha: Positive = 0.2, p: Fraction = 1.0) -> None:
        self.alpha = alpha
        self.p = p

    @override
    def __call__(self, inputs: Tensor, partners: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        kept = _beta(draw, self.alpha)
        share = kept.reshape(-1, *[1] * (inputs.ndim - 1))
        return share * inputs + (1 - share) * partners, kept


class CutMix(Mixing):
    """A rectangle of another image, 1 − λ of the area, and as much of its target; λ from Beta(α, α).

    S. Yun et al.: CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019,
    arXiv:1905.04899. The targets follow the pixels that the rectangle really covers.

    Args:
        alpha: α.
        p: the part of the samples that is blended.
    """

    @checked
    def __init__(self, alpha: Positive = 1.0, p: Fraction = 1.0) -> None:
        self.alpha = alpha
        self.p = p

    @override
    def __call__(self, inputs: Tensor, partners: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        side = (1 - _beta(draw, self.alpha)).sqrt()
        inside = rectangle(draw, (side, side), inputs)
        return torch.where(inside, partners, inputs), 1 - inside.float().mean((1, 2, 3))


def _beta(draw: Draw, alpha: float) -> Tensor:
    """``[B]`` from Beta(α, α), by its inverse distribution function."""
    from scipy.special import betaincinv

    shares: Any = betaincinv(alpha, alpha, draw.uniform().double().numpy())
    return torch.from_numpy(shares).float()
