"""Deep adaptation by maximum mean discrepancy: both domains' features have the same distribution as a kernel sees it.

M. Long, Y. Cao, J. Wang, M. I. Jordan: Learning Transferable Features with Deep Adaptation Networks, ICML 2015,
arXiv:1502.02791; the squared MMD after A. Gretton et al., JMLR 13, 2012, equation 5. With ``bandwidths`` b, features
s_i of the source and t_j of the target, and σ² the mean squared distance between two of all N + M samples::

    k(x, y) = mean over b of exp(−‖x − y‖² / (b σ²))
    MMD² = 1/N² Σ k(s_i, s_i') + 1/M² Σ k(t_j, t_j') − 2/(NM) Σ k(s_i, t_j)
    L = L_task + λ(p) · MMD²

λ(p) rises as it does for DANN (the paper's is constant), its ceiling is ``strength``. No gradient goes through σ². In
several processes all samples of the global batch are compared with all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Len
from torch import Tensor

from lab.distributed import gathered
from lab.modules.adaptation import WHOLE, Adaptation, View
from lab.modules.supervised import Terms
from lab.ranges import Positive, checked


def squared_mmd(source: Tensor, target: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """MMD² of ``[N, F]`` and ``[M, F]`` features: scalar ≥ 0, the biased estimate.

    Args:
        bandwidths: of the kernels, as multiples of the mean squared distance.
    """
    everything = torch.cat([source, target])
    norms = everything.square().sum(1)
    distances = (norms[:, None] + norms - 2 * everything @ everything.T).clamp(min=0)  # (N+M, N+M)
    count, size = len(everything), len(source)
    scale = distances.detach().sum() / max(count * (count - 1), 1)
    scale = torch.where(scale > 0, scale, 1.0)
    kernel = torch.stack([(-distances / (b * scale)).exp() for b in bandwidths]).mean(0)
    return kernel[:size, :size].mean() + kernel[size:, size:].mean() - 2 * kernel[:size, size:].mean()


class MMD(Adaptation):
    """Learns features whose distribution is the same in both domains, in the eyes of Gaussian kernels.

    Args:
        bandwidths: b in the equations above.
    """

    @classmethod
    def refuses(cls, arguments: Mapping[str, Any]) -> Mapping[str, str]:
        """Parts of a batch."""
        return {"accumulate_grad_batches": WHOLE}

    @checked
    def __init__(
        self,
        bandwidths: Annotated[tuple[Positive, ...], Len(1)] = (0.25, 0.5, 1.0, 2.0, 4.0),
        **adaptation: Any,
    ) -> None:
        super().__init__(**adaptation)
        self.bandwidths = bandwidths

    def alignment(self, source: View, target: View) -> Terms:
        """λ · MMD² of the features."""
        found = squared_mmd(gathered(source.features), gathered(target.features), self.bandwidths)
        return Terms(self.level * found, mmd=found)
