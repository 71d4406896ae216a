"""Deep CORAL: both domains' features have the same covariances.

B. Sun and K. Saenko: Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV 2016 workshops,
arXiv:1607.01719. With the covariances C_s and C_t (over n − 1) of F features::

    L = L_task + λ(p) · 1/(4F²) ‖C_s − C_t‖²_F                  equation 1

λ(p) rises as it does for DANN (the paper's is constant), its ceiling is ``strength``. In several processes the
covariances are those of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lab.distributed import gathered
from lab.modules.adaptation import WHOLE, Adaptation, View
from lab.modules.supervised import Terms


def covariance(features: Tensor) -> Tensor:
    """``[N, F]`` to ``[F, F]``, over N − 1; zeros for a single sample."""
    centred = features - features.mean(0)
    return centred.T @ centred / max(len(features) - 1, 1)


def coral_loss(source: Tensor, target: Tensor) -> Tensor:
    """‖C_s − C_t‖²_F / (4F²) of ``[N, F]`` and ``[M, F]`` features: scalar ≥ 0."""
    difference = covariance(source) - covariance(target)
    return difference.square().sum() / (4 * source.shape[1] ** 2)


class CORAL(Adaptation):
    """Learns features whose covariances are the same in both domains."""

    @classmethod
    def refuses(cls, arguments: Mapping[str, Any]) -> Mapping[str, str]:
        """Parts of a batch."""
        return {"accumulate_grad_batches": WHOLE}

    def alignment(self, source: View, target: View) -> Terms:
        """λ · the distance of the covariances."""
        found = coral_loss(gathered(source.features), gathered(target.features))
        return Terms(self.level * found, coral=found)
