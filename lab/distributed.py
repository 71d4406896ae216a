"""What techniques share across processes: statistics are reduced as sums and counts, once."""

from __future__ import annotations

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
