"""Domain-adversarial training: features that tell the classes apart, and not the domains.

Y. Ganin et al.: Domain-Adversarial Training of Neural Networks, JMLR 17, 2016, arXiv:1505.07818. With the features f =
G_f(x), the source's labels y, the domain d (1: source, 0: target), a discriminator G_d with ``hidden`` layers, and the
gradient reversal layer R_λ(f) = f, ∂R_λ/∂f = −λ (equations 16 to 18)::

    L = L_task(G_y(f), y) + L_d(G_d(R_λ(f)), d)

The discriminator learns to tell the domains apart, at full rate; the features, by λ times the same gradient reversed,
that it can't. λ rises from 0 (:mod:`lab.modules.adaptation`), as it is of no use to deceive a discriminator that knows
nothing yet. L_d is the cross-entropy in nats, the mean over both domains' samples.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.distributed import mean_of_all
from lab.modules.adaptation import Adaptation, View
from lab.modules.supervised import Terms
from lab.ranges import Count, checked


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reversed_gradient(features: Tensor, strength: float) -> Tensor:
    """The same features, whose gradient is −``strength`` times what it would be."""
    found: Tensor = _Reversal.apply(features, strength)
    return found


def domain_losses(logits: Tensor, sources: int) -> Tensor:
    """Cross-entropy of ``[B]`` logits of being the source's, the first ``sources`` of which are: ``[B]`` nats."""
    domains = (torch.arange(len(logits), device=logits.device) < sources).to(logits)
    return F.binary_cross_entropy_with_logits(logits, domains, reduction="none")


class Discriminator(nn.Sequential):
    """``[B, F]`` to the logits ``[B]`` of being the source's.

    Args:
        width: F.
        hidden: units of each hidden layer.
    """

    def __init__(self, width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        for inputs, outputs in pairwise((width, *hidden)):
            self.extend([nn.Linear(inputs, outputs), nn.ReLU()])
        self.append(nn.Linear((width, *hidden)[-1], 1))

    def forward(self, features: Tensor) -> Tensor:
        """``[B, F]`` to ``[B]``."""
        for layer in self:
            features = layer(features)
        return features.squeeze(1)


class DANN(Adaptation):
    """Learns features that a discriminator, learning beside them, cannot tell the domains by.

    Args:
        hidden: units of the discriminator's hidden layers; with none it is linear.
    """

    @checked
    def __init__(self, hidden: tuple[Count, ...] = (100,), **adaptation: Any) -> None:
        super().__init__(**adaptation)
        self.discriminator = Discriminator(self.judged_width, hidden)

    @property
    def judged_width(self) -> int:
        """How many numbers the discriminator sees of a sample."""
        return self.width

    def judged(self, view: View) -> Tensor:
        """``[B, judged_width]``: what the discriminator sees, gradients not yet reversed."""
        return view.features

    def weights(self, source: View, target: View) -> Tensor | None:
        """``[2B]``, of mean 1 in each domain: how much each sample counts; None: all alike."""
        return None

    def alignment(self, source: View, target: View) -> Terms:
        """The discriminator's loss, its gradient reversed on the way to the features."""
        seen = torch.cat([self.judged(source), self.judged(target)])
        logits = self.discriminator(reversed_gradient(seen, self.level))  # (2B)
        losses, weights = domain_losses(logits, len(source.logits)), self.weights(source, target)
        loss = mean_of_all(losses if weights is None else weights * losses)
        of_source = torch.arange(len(logits), device=logits.device) < len(source.logits)
        return Terms(loss, domain=loss, domain_accuracy=((logits > 0) == of_source).float().mean())
