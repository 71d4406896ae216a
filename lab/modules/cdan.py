"""Conditional adversarial adaptation: the discriminator sees the features together with what the network answers.

M. Long, Z. Cao, J. Wang, M. I. Jordan: Conditional Adversarial Domain Adaptation, NeurIPS 2018, arXiv:1705.10667. With
features f [F] and class probabilities g = softmax of the logits [K], the discriminator of :mod:`lab.modules.dann` sees

    T(f, g) = f ⊗ g ∈ R^{F·K}                               the multilinear map
    T(f, g) = 1/√d (R_f f) ⊙ (R_g g) ∈ R^d                  ``projection``: d, R fixed, of standard normal numbers

and with ``entropy_conditioning`` (CDAN+E) every sample counts w = 1 + e^{−H(g)} in the discriminator's loss, scaled to
a mean of 1 in each domain: what the network is sure of is aligned first. No gradient goes through g, as in the
authors' code, nor through w, where they let one through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lab.distributed import summed
from lab.modules.adaptation import View
from lab.modules.dann import DANN
from lab.ranges import Count, checked
from lab.validators import entropies


def multilinear(features: Tensor, probabilities: Tensor) -> Tensor:
    """f ⊗ g, ``[B, F]`` and ``[B, K]`` to ``[B, F·K]``."""
    return (features[:, :, None] * probabilities[:, None, :]).flatten(1)


def sureness(probabilities: Tensor) -> Tensor:
    """1 + e^{−H(g)}, ``[B, K]`` to ``[B]`` in [1, 2], scaled to a mean of 1 over all processes' samples."""
    weights = 1 + (-entropies(probabilities)).exp()
    total, count = summed(weights.sum(), len(weights))
    return weights * count / total


class CDAN(DANN):
    """Learns features that a discriminator cannot tell the domains by even if it knows the network's answers.

    Args:
        entropy_conditioning: whether samples count by how sure the network is of them, beside those of their batch.
        projection: d of the randomized map, for networks whose F·K is large (the paper's bound is 4096); the whole map
            where it is None.
        seed: of the randomized map; the recipe's.
    """

    features_map: Tensor | None
    answers_map: Tensor | None

    @classmethod
    def refuses(cls, arguments: Mapping[str, Any]) -> Mapping[str, str]:
        """Parts of a batch, where samples count beside those of their batch."""
        whole = "with entropy conditioning a sample's weight is that among a whole batch, which parts of it have not"
        return {"accumulate_grad_batches": whole} if arguments.get("entropy_conditioning") else {}

    @checked
    def __init__(
        self, entropy_conditioning: bool = False, projection: Count | None = None, seed: int = 0, **dann: Any
    ) -> None:
        self.projection = projection
        super().__init__(**dann)
        self.entropy_conditioning = entropy_conditioning
        maps: tuple[Tensor | None, Tensor | None] = None, None
        if projection is not None:
            generator = torch.Generator().manual_seed(seed)
            maps = (
                torch.randn(self.width, projection, generator=generator),
                torch.randn(self.classes, projection, generator=generator),
            )
        self.register_buffer("features_map", maps[0])
        self.register_buffer("answers_map", maps[1])

    @property
    def judged_width(self) -> int:
        """F·K, or d."""
        return self.projection or self.width * self.classes

    def judged(self, view: View) -> Tensor:
        """T(f, g), ``[B, judged_width]``."""
        probabilities = view.logits.detach().softmax(1)
        if self.features_map is None or self.answers_map is None:
            return multilinear(view.features, probabilities)
        randomized: Tensor = (view.features @ self.features_map) * (probabilities @ self.answers_map)
        return randomized / math.sqrt(randomized.shape[1])

    def weights(self, source: View, target: View) -> Tensor | None:
        """w of both domains, ``[2B]``, where samples count by it."""
        if not self.entropy_conditioning:
            return None
        return torch.cat([sureness(view.logits.detach().softmax(1)) for view in (source, target)])
