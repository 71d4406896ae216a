"""What tokens of a text are: for token ids ``[B, L]``."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lab.ranges import Fraction, Whole, checked
from lab.transforms import BatchTransform, Draw


class TokenDropout(BatchTransform):
    """Makes tokens unknown, so that no word decides alone ("word dropout").

    M. Iyyer et al.: Deep Unordered Composition Rivals Syntactic Methods for Text Classification, ACL 2015. Padding
    stays.

    Args:
        p: the part of the tokens.
        unknown: the id that they get; lab's own tokenizers' by default.
        padding: the id that is left alone.
    """

    @checked
    def __init__(self, p: Fraction = 0.1, unknown: Whole = 1, padding: Whole = 0) -> None:
        self.p = p
        self.unknown = unknown
        self.padding = padding

    @override
    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        dropped = (draw.uniform(*inputs.shape[1:]) < self.p) & (inputs != self.padding)
        return torch.where(dropped, self.unknown, inputs)
