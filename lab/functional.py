"""A network as a function of its weights, so that tasks can each have their own.

Batch normalisation never sees running statistics here: they would be a mixture of tasks, and of weights before and
after adaptation. It normalises by the batch that is asked about (``transductive``, as MAML's authors do: a query's
answer depends on the other queries of its task), or by the task's support set (``task``: J. Bronskill et al.: TaskNorm,
ICML 2020, arXiv:2003.03284, section 3.2, there MetaBN: each query is answered for itself).

Gradients by tasks' weights are those of ordinary automatic differentiation around a vectorised network: torch's
``vmap`` around its ``func.grad`` gives wrong second-order gradients of affine normalisation layers, without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

BatchNorm: TypeAlias = Literal["transductive", "task"]
Weights: TypeAlias = dict[str, Tensor]


class _Rows:
    """How many rows of the batch that is being computed are the support set; None: all are alike."""

    support: int | None = None


class _Statistics(nn.Module):
    """Batch normalisation by a batch's own statistics, or by those of its first rows."""

    def __init__(self, like: _BatchNorm, rows: _Rows) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.rows = like.weight, like.bias, like.eps, rows

    def forward(self, x: Tensor) -> Tensor:
        support = self.rows.support
        if support is None:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        over = (0, *range(2, x.ndim))
        variance, mean = torch.var_mean(x[:support], over, correction=0, keepdim=True)
        x = (x - mean) * (variance + self.eps).rsqrt()
        if self.weight is None:
            return x
        shape = (1, -1, *(1 for _ in over[1:]))
        return x * self.weight.view(shape) + self.bias.view(shape)


class _Whole(nn.Module):
    """Asks a network, or its features, through one call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor, part: str) -> Tensor:
        outputs: Tensor = self.network(inputs) if part == "forward" else getattr(self.network, part)(inputs)
        return outputs


class Functional:
    """A network's structure without its weights.

    Args:
        network: stays as it is.
        batch_norm: whose statistics batch normalisation takes.
    """

    def __init__(self, network: nn.Module, batch_norm: BatchNorm = "transductive") -> None:
        self.batch_norm = batch_norm
        self._rows = _Rows()
        self._whole = _Whole(copy.deepcopy(network).to("meta"))
        self.normalises = False
        for name, part in list(self._whole.named_modules()):
            if isinstance(part, _InstanceNorm):
                part.track_running_stats, part.running_mean, part.running_var = False, None, None
            elif isinstance(part, _BatchNorm):
                self.normalises = True
                parent, _, last = name.rpartition(".")
                setattr(self._whole.get_submodule(parent), last, _Statistics(part, self._rows))
        self.buffers = tuple(name.removeprefix("network.") for name, _ in self._whole.named_buffers())
        """The names of those that answers depend on."""

    def train(self, mode: bool = True) -> None:
        """Whether dropout drops."""
        if mode != self._whole.training:
            self._whole.train(mode)

    def __call__(self, weights: Mapping[str, Tensor], inputs: Tensor, part: str = "forward") -> Tensor:
        """The network's outputs for ``[B, ...]`` inputs.

        Args:
            weights: the network's parameters and buffers, by its own names.
            part: a method of the network to ask instead.
        """
        named = {f"network.{name}": tensor for name, tensor in weights.items()}
        return cast(Tensor, functional_call(self._whole, named, (inputs, part)))

    def queried(self, weights: Mapping[str, Tensor], support: Tensor, query: Tensor, part: str = "forward") -> Tensor:
        """Outputs for queries ``[Q, ...]``, of a task whose support set is ``[S, ...]``."""
        if not (self.normalises and self.batch_norm == "task"):
            return self(weights, query, part)
        self._rows.support = len(support)
        try:
            return self(weights, torch.cat([support, query]), part)[len(support) :]
        finally:
            self._rows.support = None
