"""Running means and deviations, over everything that all processes have seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lab.distributed import summed

SMALLEST = 1e-8


class Running(nn.Module):
    """Mean and variance of samples so far: buffers, so that weights and what they were trained on are kept together.

    Batches are joined as T. Chan, G. Golub and R. LeVeque have it, Algorithms for Computing the Sample Variance, 1983.
    Until the first batch, mean 0 and variance 1.

    Args:
        shape: of one sample.
        clip: how many deviations from the mean a normalised value is at most.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))

    @torch.no_grad()
    def update(self, samples: Tensor) -> None:
        """Take in ``[B, *shape]`` samples of every process."""
        samples = samples.double()
        total, count = summed(samples.sum(0), len(samples))
        mean = total / max(count, 1)
        squares, _ = summed((samples - mean).square().sum(0), len(samples))
        if not count:
            return
        every = self.count + count
        apart = mean - self.mean
        before = self.variance * self.count
        self.variance.copy_((before + squares + apart.square() * self.count * count / every) / every)
        self.mean.add_(apart * count / every)
        self.count.copy_(every)

    def normalized(self, values: Tensor) -> Tensor:
        """``[..., *shape]`` values of mean 0 and deviation 1, clipped."""
        mean, deviation = self.mean, (self.variance + SMALLEST).sqrt()
        return ((values - mean.to(values.dtype)) / deviation.to(values.dtype)).clamp(-self.clip, self.clip)

    def scaled(self, values: Tensor) -> Tensor:
        """Values of deviation 1, their mean kept, clipped."""
        return (values / (self.variance + SMALLEST).sqrt().to(values.dtype)).clamp(-self.clip, self.clip)
