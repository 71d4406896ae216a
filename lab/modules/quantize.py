"""Quantization: a network that was trained goes on with weights and activations of few bits.

How is :class:`lab.callbacks.quantization.Quantization`'s, which goes along with any other technique as well
(``callbacks: {quantization: {...}}``); here it comes with supervised training (``qat``), or with none.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from lab.callbacks.quantization import Bits, Method, Percentile, Quantization
from lab.modules.supervised import Supervised
from lab.quantizer import Observer
from lab.ranges import Count, checked


class Quantize(Supervised):
    """Quantizes a network, in training or, by the other methods, without any.

    Args:
        method: ``static`` or ``dynamic``: the network is not trained; ``qat``: it is, with rounding that training sees.
        bits: of weights.
        activation_bits: of activations.
        ends: bits of the first and the last layer, if that is more.
        observer: which range the scales cover: ``minmax``, ``percentile`` or ``mse``.
        percentile: of the values that are within, for that observer.
        per_channel: whether each output channel of a weight has its own scale.
        bias_correction: whether biases make up for the shift of outputs' means by rounded weights, where the rounding
            is not trained.
        samples: of the training data, to calibrate with.
        ignore: patterns of the names of layers to leave alone.
        sensitivity: whether to measure what each rounding alone costs.
    """

    unsharded = Quantization.unsharded

    @checked
    def __init__(
        self,
        method: Method = "static",
        *,
        bits: Bits = 8,
        activation_bits: Bits = 8,
        ends: Bits = 8,
        observer: Observer = "mse",
        percentile: Percentile = 99.99,
        per_channel: bool = True,
        bias_correction: bool = True,
        samples: Count = 512,
        ignore: tuple[str, ...] = (),
        sensitivity: bool = True,
        **supervised: Any,
    ) -> None:
        super().__init__(**supervised)
        self.method = method
        self.quantization = Quantization(
            method, bits=bits, activation_bits=activation_bits, ends=ends, observer=observer, percentile=percentile,
            per_channel=per_channel, bias_correction=bias_correction, samples=samples, ignore=ignore,
            sensitivity=sensitivity,
        )  # fmt: skip

    def setup(self, stage: str) -> None:
        """Have nothing trained by a method that follows training."""
        super().setup(stage)
        if stage == "fit" and self.method != "qat":
            self.trainer.fit_loop.max_epochs = 0

    def configure_callbacks(self) -> list[Callback]:
        """What quantizes."""
        return [self.quantization]
