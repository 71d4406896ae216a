"""Weight sharing: the weights of a layer take few values, of which a code book keeps the list.

S. Han, H. Mao and W. Dally: Deep Compression, ICLR 2016, arXiv:1510.00149. k-means over a layer's weights, begun from
values evenly between the smallest and the largest, gives each weight a code and each code a value; then the values are
trained, with the sum of the gradients of the weights that have them. A file holds the codes, of log2 k bits each, and
the book.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LARGEST = 256
"""Values of a book, at most: a code is a byte or less."""
ROUNDS = 300
"""Of k-means, at most; in one dimension it settles long before."""
ZEROS = 0.01
"""The share of weights that are exactly zero from which on zero is a value of the book that stays."""
CODES, BOOK = "#codes", "#book"
"""What a file calls the codes and the book of a tensor, after its name."""


def clusters(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k-means of numbers.

    Args:
        values: ``[N]``.
        k: how many means, at most.

    Returns:
        means ``[k]``, ascending, and for each value the place of the nearest, ``[N]``; a mean without values stays
        where it was.
    """
    work = values.double()
    means = torch.linspace(float(work.min()), float(work.max()), k, dtype=work.dtype, device=work.device)
    codes = torch.zeros_like(work, dtype=torch.long)
    for _ in range(ROUNDS):
        nearest = torch.bucketize(work, (means[1:] + means[:-1]) / 2)
        if torch.equal(nearest, codes):
            break
        codes = nearest
        counts = torch.bincount(codes, minlength=k)
        sums = torch.bincount(codes, weights=work, minlength=k)
        means = torch.where(counts > 0, sums / counts.clamp_min(1), means).sort().values
    return means.to(values.dtype), codes


class Shared(nn.Module):
    """A weight's parametrization: each is the value of its code; where many are zero, code 0 is, and stays so.

    Args:
        weight: which it begins as near to as ``k`` values can be.
        k: how many values.
    """

    def __init__(self, weight: Tensor, k: int) -> None:
        super().__init__()
        flat = weight.detach().flatten()
        gone = flat == 0
        self.has_zero = float(gone.float().mean()) >= ZEROS
        codes = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
        if self.has_zero:
            book, found = clusters(flat[~gone], k - 1) if bool((~gone).any()) else (flat[:0], flat[:0].long())
            codes[~gone] = found + 1
        else:
            book, codes = clusters(flat, k)
        self.book = nn.Parameter(book)
        self.register_buffer("codes", codes.to(torch.uint8).view_as(weight))

    codes: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """The weights as their codes say, of the shape of ``weight``."""
        book = torch.cat([self.book.new_zeros(1), self.book]) if self.has_zero else self.book
        return book.index_select(0, self.codes.flatten().long()).view_as(weight)


def share(network: nn.Module, names: list[str], k: int) -> None:
    """Have the weights of layers share ``k`` values each, which learn in their place."""
    for name in names:
        layer = network.get_submodule(name)
        weight = layer.get_parameter("weight")
        weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", Shared(weight, k), unsafe=True)


@torch.no_grad()
def settle(network: nn.Module) -> None:
    """Make shared values plain weights; ``network.shared`` names those, for the file that is written of it."""
    names = []
    for name, layer in list(network.named_modules()):
        if parametrize.is_parametrized(layer, "weight") and any(
            isinstance(part, Shared) for part in layer.parametrizations["weight"]
        ):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            names.append(f"{name}.weight")
    network.shared = names  # type: ignore[assignment]


def packed(state: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Tensors for a file: those named as codes and book, where they have few enough values."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        book, codes = torch.unique(tensor.flatten(), return_inverse=True) if name in names else (None, None)
        if book is None or codes is None or len(book) > LARGEST:
            found[name] = tensor.contiguous()
            continue
        found[name + BOOK] = book
        found[name + CODES] = pack(codes, _bits(len(book)))
    return found


def unpacked(saved: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a file, codes and books as the weights that they are.

    Args:
        shapes: of the network's tensors.

    Raises:
        ValueError: codes without a book, or not as many as the network has weights.
    """
    found = {name: tensor for name, tensor in saved.items() if not name.endswith((CODES, BOOK))}
    for key, packed_codes in saved.items():
        if not key.endswith(CODES):
            continue
        name = key.removesuffix(CODES)
        book, shape = saved.get(name + BOOK), shapes.get(name)
        if book is None or shape is None or book.ndim != 1 or not len(book) or packed_codes.dtype != torch.uint8:
            raise ValueError(f"{key}: codes without a book, or of a tensor that the network has not")
        bits = _bits(len(book))
        if packed_codes.shape != (math.ceil(shape.numel() * bits / 8),):
            raise ValueError(f"{key}: not as many codes as {name} has weights")
        codes = unpack(packed_codes, bits, shape.numel())
        if int(codes.max()) >= len(book):
            raise ValueError(f"{key}: a code that is not in its book")
        found[name] = book[codes].view(shape)
    return found


def _bits(values: int) -> int:
    return max((values - 1).bit_length(), 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes, ``bits`` each, the lowest first."""
    places = torch.arange(bits, device=codes.device)
    stream = ((codes[:, None] >> places) & 1).flatten()
    stream = torch.cat([stream, stream.new_zeros(-len(stream) % 8)]).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first codes of bytes that :func:`pack` made."""
    found = ((stream.long()[:, None] >> torch.arange(8)) & 1).flatten()[: count * bits].view(count, bits)
    return (found << torch.arange(bits)).sum(1)
