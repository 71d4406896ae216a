"""Adaptive batch normalisation: a network trained on the source, normalised by the target's own statistics.

Y. Li, N. Wang, J. Shi, J. Liu, X. Hou: Revisiting Batch Normalization for Practical Domain Adaptation, 2016,
arXiv:1603.04779. Training is on the source alone. Then, layer by layer from the input, each batch normalisation gets
the mean and the variance (over n − 1, as torch's running variance) of what reaches it from all of the target's
training inputs, the layers before it having theirs already. A pass for each layer makes these exact: the batch size
doesn't enter. (The paper estimates them online, in one.)

Validation is with the target's statistics too; they are put aside while training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lab.distributed import summed
from lab.modes import evaluating
from lab.modules.adaptation import Adaptation, View
from lab.modules.supervised import Terms
from lab.ranges import checked


class AdaBN(Adaptation):
    """Learns on the source, and takes the target's statistics for its own where it normalises batches.

    Raises:
        ValueError: the network has no batch normalisation with running statistics.
    """

    @checked
    def __init__(self, **adaptation: Any) -> None:
        super().__init__(strength=0.0, gamma=1.0, entropy_weight=0.0, batch_norm="separate", **adaptation)
        if not self.source_statistics.layers(self.network):
            raise ValueError(
                f"{type(self.network).__name__} has no batch normalisation, whose statistics adabn adapts: "
                "convnet, resnet and most of timm's have"
            )

    def alignment(self, source: View, target: View) -> Terms:
        """Nothing: it is training on the source."""
        return Terms(source.logits.new_zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The source's half of a batch: the target's would change the statistics that it is trained with."""
        terms = self.loss(batch.source)
        self._watch(terms)
        return terms.loss

    def on_validation_epoch_start(self) -> None:
        """Put the source's statistics aside, and take the target's."""
        super().on_validation_epoch_start()
        self._take()

    def on_validation_epoch_end(self) -> None:
        """Put the source's back."""
        super().on_validation_epoch_end()
        for kept, running in self.source_statistics.pairs(self.network):
            running.copy_(kept)

    def finish(self) -> None:
        """Take the target's statistics, with the weights that are kept."""
        with self._on_device():
            self._take()
        super().finish()

    def _take(self) -> None:
        for kept, running in self.source_statistics.pairs(self.network):
            kept.copy_(running)
        self.adapt()

    @torch.no_grad()
    def adapt(self) -> None:
        """Give each batch normalisation, in the order in which they are reached, the target's mean and variance."""
        with evaluating(self.network), self.trainer.precision_plugin.forward_context():
            for part in self._in_order():
                mean, variance = self._moments(part)
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.copy_(mean)
                part.running_var.copy_(variance)

    def _in_order(self) -> list[_BatchNorm]:
        """The batch normalisations as a batch reaches them."""
        reached: list[_BatchNorm] = []
        with _heard(self.source_statistics.layers(self.network), lambda part, _: reached.append(part)):
            self.answers(self._moved(next(iter(self._data.target_inputs()))))
        return list(dict.fromkeys(reached))

    def _moments(self, part: _BatchNorm) -> tuple[Tensor, Tensor]:
        """Mean and variance, ``[C]`` each, of what reaches a batch normalisation from the target's training inputs."""
        sums = torch.zeros(2, part.num_features, dtype=torch.float64)
        count = 0

        def add(_: _BatchNorm, inputs: Tensor) -> None:
            nonlocal count
            rows = inputs.double().transpose(1, -1).reshape(-1, part.num_features).cpu()
            sums.add_(torch.stack([rows.sum(0), rows.square().sum(0)]))
            count += len(rows)

        with _heard([part], add):
            for batch in self._data.target_inputs():
                self.answers(self._moved(batch))
        total, number = summed(sums.to(self.device), count)
        mean = total[0] / number
        variance = (total[1] / number - mean.square()).clamp(min=0) * number / max(number - 1, 1)
        return mean, variance


@contextmanager
def _heard(parts: Iterable[_BatchNorm], hear: Callable[[_BatchNorm, Tensor], None]) -> Iterator[None]:
    """Has what reaches parts of a network heard while it runs."""
    handles = [part.register_forward_pre_hook(lambda part, inputs: hear(part, inputs[0])) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
