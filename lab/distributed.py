"""What techniques share across processes: statistics are reduced as sums and counts, once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp


def distributed() -> bool:
    """Whether there are several processes."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def summed(total: Tensor, count: int) -> tuple[Tensor, int]:
    """A sum and the number of its parts, of all processes together.

    Args:
        total: any shape; changed in place.
    """
    if not distributed():
        return total, count
    number = torch.tensor(count, device=total.device)
    torch.distributed.all_reduce(total, op=ReduceOp.SUM)
    torch.distributed.all_reduce(number, op=ReduceOp.SUM)
    return total, int(number)


def largest(value: Tensor) -> Tensor:
    """The largest of all processes, element by element; changed in place."""
    if distributed():
        torch.distributed.all_reduce(value, op=ReduceOp.MAX)
    return value


def mean_of_all(values: Tensor) -> Tensor:
    """Scalar whose gradient, averaged over processes as DDP does, is that of the mean over all processes' values.

    Args:
        values: ``[B]``; B may differ from process to process.
    """
    if not distributed():
        return values.mean()
    count = torch.tensor(len(values), device=values.device)
    torch.distributed.all_reduce(count, op=ReduceOp.SUM)
    return values.sum() * torch.distributed.get_world_size() / count


def gathered(rows: Tensor) -> Tensor:
    """``[B, ...]`` rows of all processes end to end, rank by rank; their gradients go back to where they came from.

    B may differ from process to process. What follows must be the same in every process: each one's gradient is then
    that of all, and DDP's average of them that of one process.
    """
    if not distributed():
        return rows
    everything: Tensor = _Gathered.apply(rows)
    return everything


class _Gathered(torch.autograd.Function):
    """Rows of all processes; backward, the sum of what all processes say of a process's own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        sizes = [torch.tensor(0, device=rows.device) for _ in range(world)]
        torch.distributed.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
        counts = [int(size) for size in sizes]
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient, op=ReduceOp.SUM)
        return gradient[ctx.own]
