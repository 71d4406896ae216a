"""What rounds numbers to a grid, and how the grid is chosen: whole numbers of few bits times a scale.

A number x becomes q = clamp(round(x / s) + z) and counts as (q − z)·s. In training, gradients pass the rounding
unchanged, and the scales learn (S. Esser et al.: Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lab.distributed import largest, summed

Observer = Literal["minmax", "percentile", "mse"]
BINS = 2048
"""Parts of a range whose values are counted."""
CANDIDATES = 80
"""Ranges that are compared for the least squared error: from the whole to an eightieth of it."""


class Grid:
    """The whole numbers of some bits.

    Args:
        bits: how many.
        signed: from −(2ᵇ⁻¹ − 1) to 2ᵇ⁻¹ − 1, as weights are; else from 0 to 2ᵇ − 1.
    """

    def __init__(self, bits: int, *, signed: bool) -> None:
        self.bits = bits
        self.signed = signed
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.low = -self.high if signed else 0


def rounded(values: Tensor) -> Tensor:
    """Whole numbers, half to even, with the gradient of ``values``."""
    return values.round().detach() + (values - values.detach())


def whole(values: Tensor, scale: Tensor, zero: Tensor | float, grid: Grid) -> Tensor:
    """The whole numbers that values become: clamp(round(x / s) + z), with a gradient within the bounds alone."""
    return rounded((values / scale).clamp(grid.low - zero, grid.high - zero)) + zero


class Quantizer(nn.Module):
    """Rounds what passes to a grid.

    Args:
        bits: of the grid.
        signed: a grid around zero, with z = 0.
        channels: as many scales, one for each index of ``axis``; 0: one for all.
        axis: of the tensors that pass.
        dynamic: each tensor has the scale and the zero of its own range.
        learned: the scale is a parameter: s = s₀·2ᵗ, of which t learns, from 0. So a step of any optimizer changes a
            small scale little, and weight decay draws it to where calibration left it.
    """

    scale: Tensor
    """``[channels]`` or ``[]``; zero before calibration."""
    zero: Tensor
    """z, a whole number, ``[]``."""

    def __init__(
        self, bits: int, *, signed: bool = False, channels: int = 0, axis: int = 0, dynamic: bool = False,
        learned: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid = Grid(bits, signed=signed)
        self.axis = axis
        self.dynamic = dynamic
        self.enabled = True
        self.seen: Seen | None = None
        """Where calibration counts what passes, which is not rounded meanwhile."""
        shape = (channels,) if channels else ()
        if not dynamic:
            self.register_buffer("scale", torch.zeros(shape))
            self.register_buffer("zero", torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(shape)) if learned else None

    def forward(self, values: Tensor) -> Tensor:
        """The values on the grid, of the shape and type of ``values``."""
        if self.seen is not None:
            self.seen.look(values)
            return values
        if not self.enabled:
            return values
        if self.dynamic:
            scale, zero = grid_of(values.detach().amin().float(), values.detach().amax().float(), self.grid)
        else:
            scale, zero = self._scale(values), self.zero
        shape = [1] * values.ndim
        if scale.ndim:
            shape[self.axis] = -1
            scale = scale.view(shape)
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return ((whole(wide, scale, zero, self.grid) - zero) * scale).to(values.dtype)

    def _scale(self, values: Tensor) -> Tensor:
        if self.shift is None:
            return self.scale
        numbers = values.numel() / (self.scale.numel() if self.grid.signed else len(values))
        weight = 1 / math.sqrt(max(numbers, 1) * self.grid.high)  # the gradient's, of LSQ
        shift = self.shift.detach() + (self.shift - self.shift.detach()) * weight
        return self.scale * torch.exp2(shift)

    @torch.no_grad()
    def settle(self) -> None:
        """Make a learned scale a plain one."""
        if self.shift is not None:
            self.scale = self.scale * torch.exp2(self.shift)
            self.shift = None


def grid_of(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero such that a grid reaches from ``low`` to ``high``, zero among them exactly."""
    if grid.signed:
        scale = torch.maximum(low.abs(), high.abs()) / grid.high
        return torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros((), device=scale.device)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (grid.high - grid.low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (grid.low - low / scale).round().clamp(grid.low, grid.high)


def weight_range(weight: Tensor, quantizer: Quantizer, observer: Observer, percentile: float) -> Tensor:
    """The scales of a weight.

    Args:
        observer: the largest magnitude (``minmax``); that of a percentage of the weights; or that with the least
            squared error.

    Returns:
        ``[channels]`` or ``[]``, as the quantizer's.
    """
    rows = weight.detach().float()
    rows = rows.transpose(0, quantizer.axis).flatten(1) if quantizer.scale.ndim else rows.flatten()[None]
    magnitudes = rows.abs()
    largest_of = magnitudes.amax(1)
    if observer == "percentile":
        place = max(math.ceil(percentile / 100 * rows.shape[1]), 1)
        largest_of = magnitudes.kthvalue(place, dim=1).values
    scale, _ = grid_of(-largest_of, largest_of, quantizer.grid)
    if observer == "mse":
        least, best = torch.full_like(scale, math.inf), scale
        for part in range(1, CANDIDATES + 1):
            tried = scale * part / CANDIDATES
            wrong = whole(rows, tried[:, None], 0, quantizer.grid).mul_(tried[:, None]).sub_(rows).square_().sum(1)
            best = torch.where(wrong < least, tried, best)
            least = torch.minimum(wrong, least)
        scale = best
    return scale.view_as(quantizer.scale)


class Seen:
    """What passed a quantizer: the range; if it is counted, in a second pass also how often each part of it.

    Args:
        counting: whether there is a second pass.
    """

    def __init__(self, *, counting: bool) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.counting = counting
        self.counts: Tensor | None = None

    def look(self, values: Tensor) -> None:
        """Note values of any shape."""
        values = values.detach().float()
        if self.counts is None:
            low, high = values.amin(), values.amax()
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
            return
        low, high = self._range
        width = (high - low).clamp_min(1e-30) / BINS
        bins = ((values.flatten() - low) / width).long().clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)

    def agree(self) -> bool:
        """End the first pass: take the range that all processes saw. False: this one saw none."""
        if self.low is None or self.high is None:
            return False
        self.high, self.low = largest(self.high), -largest(-self.low)
        if self.counting:
            self.counts = torch.zeros(BINS, dtype=torch.long, device=self.low.device)
        return True

    @property
    def _range(self) -> tuple[Tensor, Tensor]:
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def chosen(self, observer: Observer, percentile: float, grid: Grid) -> tuple[Tensor, Tensor]:
        """The range to quantize, of what all processes saw."""
        lowest, highest = self._range
        if self.counts is None:
            return lowest, highest
        counts = summed(self.counts, 0)[0].double()
        edges = lowest + (highest - lowest) * torch.arange(BINS + 1, device=counts.device) / BINS
        centres = (edges[1:] + edges[:-1]).double() / 2
        if observer == "percentile":
            below, outside = counts.cumsum(0), (1 - percentile / 100) * counts.sum()
            first = int((below <= outside).sum())
            last = int((counts.sum() - below > outside).sum())
            return edges[min(first, BINS - 1)], edges[min(last, BINS - 1) + 1]
        least, best = math.inf, (lowest, highest)
        for part in range(1, CANDIDATES + 1):
            low, high = lowest * part / CANDIDATES, highest * part / CANDIDATES
            scale, zero = grid_of(low, high, grid)
            error = float((((whole(centres, scale, zero, grid) - zero) * scale - centres) ** 2 * counts).sum())
            if error < least:
                least, best = error, (low, high)
        return best
