"""A small text encoder: attention over the tokens of a text, then one vector for the whole.

A. Vaswani et al.: Attention Is All You Need, 2017, arXiv:1706.03762, the encoder of section 3.1, with normalisation
before each sublayer (Xiong et al. 2020, arXiv:2002.04745), GELU, and learned positions (Devlin et al. 2018,
arXiv:1810.04805). With h = ``heads`` and d = ``width`` / h, a head is softmax(QKᵀ / √d) V, equation (1).

Token id 0 is padding: it is neither attended to nor pooled, so that a text's result does not depend on how far its
batch was padded. With V = ``vocab_size``, L tokens at most, w = ``width`` and K outputs the network has
(V + L)w + depth (12w² + 13w) + 2w + wK + K parameters, with ``pool: cls`` w more.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.ranges import Count, Dropout, checked

PADDING = 0
"""The token id that stands for no token."""


class Transformer(nn.Module):
    """A pre-norm transformer encoder on token ids.

    Args:
        num_classes: outputs of the network (timm's word, for regression too).
        vocab_size: token ids are below it.
        input_shape: ``(L,)``, the most tokens of a text.
        width: size of a token's vector; a multiple of ``heads``.
        depth: layers.
        heads: attention heads of a layer.
        dropout: probability that a unit or an attention weight is dropped in training, in [0, 1).
        pool: a text's vector: the ``mean`` over its tokens, or that of a learned first token, ``cls``.

    Raises:
        ValueError: the inputs are no token ids; ``width`` is no multiple of ``heads``.
    """

    @checked
    def __init__(
        self,
        num_classes: Count,
        vocab_size: Count,
        input_shape: tuple[Count, ...],
        *,
        width: Count = 64,
        depth: Count = 2,
        heads: Count = 4,
        dropout: Dropout = 0.1,
        pool: Literal["mean", "cls"] = "mean",
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ValueError(f"transformer takes token ids (L,), the inputs have shape {input_shape}")
        if width % heads:
            raise ValueError(f"width {width} is no multiple of heads {heads}")
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.empty(input_shape[0], width))
        self.cls = nn.Parameter(torch.empty(1, width)) if pool == "cls" else None
        for table in self.tokens.weight[1:], self.positions, self.cls:
            if table is not None:
                nn.init.trunc_normal_(table.data, std=0.02)  # BERT's
        self.dropout = nn.Dropout(dropout)
        self.body = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, L]`` token ids to ``[B, width]`` features; zeros or the like for a text without tokens.

        Raises:
            ValueError: texts longer than the network has positions for.
        """
        if x.shape[1] > len(self.positions):
            raise ValueError(f"texts of {x.shape[1]} tokens; this transformer has {len(self.positions)} positions")
        real = x != PADDING  # (B, L)
        h = self.tokens(x) + self.positions[: x.shape[1]]  # (B, L, w)
        if self.cls is not None:
            h = torch.cat([self.cls.expand(len(x), 1, -1), h], dim=1)  # (B, 1 + L, w)
            real = F.pad(real, (1, 0), value=True)
        h = self.dropout(h)
        seen = real | ~real.any(1, keepdim=True)  # a softmax over nothing would be NaN: an empty text sees its padding
        for layer in self.body:
            h = layer(h, seen)
        h = self.norm(h)
        if self.cls is not None:
            first: Tensor = h[:, 0]
            return first
        weights = real.to(h.dtype).unsqueeze(2)  # (B, L, 1)
        mean: Tensor = (h * weights).sum(1) / weights.sum(1).clamp(min=1)  # (B, w)
        return mean

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L]`` token ids to ``[B, num_classes]`` logits."""
        logits: Tensor = self.head(self.features(x))  # (B, num_classes)
        return logits


class Layer(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """``[B, L, width]`` to the same; ``seen`` ``[B, L]`` says which tokens are attended to."""
        size, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(size, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, L, w/h)
        p = self.attention_dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :], dropout_p=p)
        x = x + self.dropout(self.out(heads.transpose(1, 2).reshape(size, length, width)))
        sum_: Tensor = x + self.perceptron(x)
        return sum_
