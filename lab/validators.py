"""How well a network does on samples without labels, judged by its answers alone; how far two domains are apart.

Of a network's probabilities p_n for N samples and K classes, with the entropy H(p) = −Σ_k p_k log p_k in nats::

    entropy                 1/N Σ_n H(p_n)                          low: the network is sure
    information             H(1/N Σ_n p_n) − 1/N Σ_n H(p_n)         high: sure, and not always of the same
    neighbourhood density   1/N Σ_n H(q_n),  q_nm = softmax_{m≠n}(p̂_n·p̂_m / τ)     high: neighbours alike

with p̂ = p/‖p‖. Entropy: P. Morerio, J. Cavazza, V. Murino, ICLR 2018, arXiv:1711.10288. Information maximisation: A.
Krause, P. Perona, R. Gomes, NIPS 2010; as a criterion K. Musgrave, S. Belongie, S.-N. Lim, arXiv:2208.07360. Soft
neighbourhood density: K. Saito et al., ICCV 2021, arXiv:2108.10860, τ = 0.05.

The proxy A-distance is 2 (1 − 2ε), ε the error of a linear classifier that tells the domains' features apart (S.
Ben-David et al., NIPS 2006): 0 where it can't, 2 where it always can.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024
"""Of how many samples the similarities to all others are held at once."""


def entropies(probabilities: Tensor) -> Tensor:
    """H(p), ``[..., K]`` probabilities to ``[...]`` nats."""
    parts: Tensor = torch.special.entr(probabilities)
    return parts.sum(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """The mean of H(p), in nats: scalar, of ``[N, K]``."""
    return entropies(probabilities).mean()


def information(probabilities: Tensor) -> Tensor:
    """H of the mean p minus the mean of H(p), in nats: scalar ≥ 0, of ``[N, K]``."""
    return entropies(probabilities.mean(0)) - entropy(probabilities)


def neighbourhood_density(probabilities: Tensor, temperature: float = 0.05) -> Tensor:
    """The mean entropy of each sample's softened similarities to all others, in nats: scalar ≥ 0, of ``[N, K]``.

    Args:
        temperature: τ > 0.
    """
    unit = torch.nn.functional.normalize(probabilities, dim=1)
    total = unit.new_zeros(())
    for first in range(0, len(unit), ROWS):
        rows = unit[first : first + ROWS]
        similar = rows @ unit.T / temperature  # (rows, N)
        own = torch.arange(first, first + len(rows), device=unit.device)
        similar[torch.arange(len(rows), device=unit.device), own] = -torch.inf
        total = total + entropies(similar.softmax(1)).sum()
    return total / len(unit)


def a_distance(source: Tensor, target: Tensor, seed: int = 0) -> float:
    """2 (1 − 2ε) of ``[N, F]`` and ``[M, F]`` features, ε held out: in [−2, 2], below 0 where it is worse than chance.

    A logistic regression on standardised features learns half of the samples of each domain, and is wrong on a part ε
    of the others; the larger domain counts as much as the smaller.

    Args:
        seed: of which half.

    Raises:
        ValueError: a domain has fewer than two samples.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(len(source), len(target)) < 2:
        raise ValueError(f"{len(source)} and {len(target)} samples: each domain needs one to learn and one to ask")
    generator = torch.Generator().manual_seed(seed)
    halves = [rows[torch.randperm(len(rows), generator=generator)].double().cpu() for rows in (source, target)]
    learnt, asked = ([rows[side::2] for rows in halves] for side in (0, 1))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    classifier.fit(torch.cat(learnt).numpy(), [0] * len(learnt[0]) + [1] * len(learnt[1]))
    wrong = [float((classifier.predict(rows.numpy()) != domain).mean()) for domain, rows in enumerate(asked)]
    return 2 * (1 - sum(wrong))


def projected(features: Tensor) -> Tensor:
    """``[N, F]`` features on their two principal components, ``[N, 2]``; the largest weight of each is > 0."""
    centred = features.double() - features.double().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    plane = centred @ (axes * largest.sign()).T
    return torch.nn.functional.pad(plane, (0, 2 - plane.shape[1])).to(features.dtype)
