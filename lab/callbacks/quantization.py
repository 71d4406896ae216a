"""Quantization, beside any technique: what it trains goes on with weights and activations of few bits.

The network computes what its integers would (:mod:`lab.quantization`), in training as in tests; what is saved holds the
integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lab import quantization, sparsity
from lab.callbacks import Lean, network_of, training_batches
from lab.errors import UserError
from lab.modes import evaluating
from lab.quantizer import Observer
from lab.ranges import Count, checked
from lab.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["static", "dynamic", "qat"]
Bits = Annotated[int, Ge(quantization.FEWEST), Le(quantization.MOST)]
Percentile = Annotated[float, Gt(50), Le(100)]
ASKED = 64
"""Samples of which the sensitivity to each rounding is measured."""


class Quantization(Lean):
    """Quantizes the network that is trained: from the beginning of training (``qat``), or when it has ended.

    Args:
        method: ``qat``: training sees the rounding, and its scales learn; ``static``: after training, with scales of
            the activations that training samples have; ``dynamic``: after training, linear layers alone, with scales
            of each batch of activations.
        bits: of weights.
        activation_bits: of activations.
        ends: bits of the first and the last layer, if that is more: there rounding costs most.
        observer: which range the scales cover: all (``minmax``), all but the outermost values (``percentile``), or the
            one with the least squared error (``mse``).
        percentile: of the values that are within, for that observer.
        per_channel: whether each output channel of a weight has its own scale.
        bias_correction: whether biases make up for the shift of outputs' means by rounded weights, where the rounding
            is not trained.
        samples: of the training data, to calibrate with.
        ignore: patterns of the names of layers to leave alone.
        sensitivity: whether to measure what each rounding alone costs.
    """

    unsharded = "scales are of whole layers"

    @checked
    def __init__(
        self,
        method: Method = "qat",
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
    ) -> None:
        self.method = method
        self.bits, self.activation_bits, self.ends = bits, activation_bits, ends
        self.observer, self.percentile, self.per_channel = observer, percentile, per_channel
        self.bias_correction = bias_correction
        self.samples, self.ignore, self.sensitivity = samples, ignore, sensitivity
        self._exact: list[str] = []
        """Weights that can't be rounded."""
        self._reported: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that there is what quantization needs; have training go on with a network that rounds."""
        if stage != "fit":
            return
        network = network_of(pl_module)
        try:
            sparsity.ignored(network, self.ignore)
        except ValueError as cause:
            raise UserError(f"quantization: {cause}") from cause
        if getattr(network, "quantization", None):
            raise UserError("quantization: the network is quantized already; begin from the stage before")
        beside = [type(c).__name__ for c in trainer.callbacks if type(c).__name__ in ("Pruning", "Sharing")]  # type: ignore[attr-defined]
        if beside:
            raise UserError(
                f"quantization: {beside[0].lower()} changes the same weights; put one into a stage after the other"
            )
        if self.method != "dynamic" and getattr(trainer, "datamodule", None) is None:
            raise UserError("quantization: calibration looks at training samples: give the stage `data:`")
        if self.method == "qat":
            self._insert(trainer, pl_module, learned=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate what trains, unless a training that was left goes on."""
        found = [part for _, part in quantization.quantizers(network_of(pl_module)) if not part.dynamic]
        if self.method == "qat" and not all(bool((part.scale > 0).all()) for part in found):
            self._calibrate(trainer, pl_module)

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Quantize a network that was trained without; measure what each rounding costs; make rounded weights plain."""
        network = network_of(module)
        if self.method != "qat":
            self._insert(trainer, module, learned=False)
            self._calibrate(trainer, module)
        plan: Mapping[str, Any] = network.quantization  # type: ignore[assignment]
        self._reported = {
            "quantized_layers": len(plan["weights"]),
            "quantized_activations": len(plan["outputs"]) + len(plan["inputs"]),
            "exact_weights": self._exact,
        }
        if self._exact:
            named = ", ".join(self._exact[: quantization.NAMED])
            rank_zero_warn(f"quantization: these are of no linear or convolutional layer, and stay exact: {named}")
        if self.sensitivity and getattr(trainer, "datamodule", None) is not None:
            inputs = torch.cat(list(self._inputs(trainer, module, ASKED)))
            with evaluating(network):
                costs = quantization.sensitivity(network, inputs)
            self._reported["sensitivity_db"] = {name: round(cost, 2) for name, cost in costs.items()}
        quantization.settle(network)

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """How much is quantized; by what is rounded, the signal to noise of the outputs if that alone is, in dB."""
        return self._reported

    def tables(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Table]:
        """The costs of each rounding alone, the costliest first."""
        costs = self._reported.get("sensitivity_db", {})
        network = network_of(module)
        plan: Mapping[str, Any] = network.quantization  # type: ignore[assignment]
        bits = {name: part.grid.bits for name, part in quantization.quantizers(network)}
        bits |= {f"{name} weight": number for name, number in plan["weights"].items()}
        rows = [(name, bits[name], cost) for name, cost in sorted(costs.items(), key=lambda pair: pair[1])]
        return {"sensitivity": Table(("rounded", "bits", "signal_to_noise_db"), rows)} if rows else {}

    def pictures(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Figure]:
        """The costs of each rounding alone, as bars."""
        costs = self._reported.get("sensitivity_db")
        return {"sensitivity": _bars(costs)} if costs else {}

    def _insert(self, trainer: Trainer, module: LightningModule, *, learned: bool) -> None:
        network = network_of(module)
        left = sparsity.ignored(network, self.ignore)
        example = next(iter(self._inputs(trainer, module, 2)))
        try:
            with evaluating(network):
                found = quantization.plan(
                    network, example, left, bits=self.bits, activation_bits=self.activation_bits, ends=self.ends,
                    per_channel=self.per_channel, dynamic=self.method == "dynamic",
                )  # fmt: skip
            self._exact = quantization.exact(network, found["weights"], left)
            quantization.insert(network, found, learned=learned)
        except ValueError as cause:
            raise UserError(f"quantization: {cause}") from cause

    def _calibrate(self, trainer: Trainer, module: LightningModule) -> None:
        network = network_of(module)
        try:
            with evaluating(network), torch.no_grad():
                quantization.calibrate(
                    network, lambda: self._inputs(trainer, module, self.samples), self.observer, self.percentile
                )
                if self.bias_correction and self.method != "qat":
                    quantization.correct(network, self._inputs(trainer, module, self.samples))
        except ValueError as cause:
            raise UserError(f"quantization: {cause}") from cause

    def _inputs(self, trainer: Trainer, module: LightningModule, count: int) -> Iterable[Tensor]:
        weight = next(network_of(module).parameters())
        for batch in training_batches(trainer, module, count):
            inputs = batch.inputs.to(weight.device)
            yield inputs.to(weight.dtype) if inputs.is_floating_point() else inputs


def _bars(costs: Mapping[str, float]) -> Figure:
    """Signal to noise by what is rounded, the costliest first."""
    from matplotlib.figure import Figure

    shown = sorted(costs.items(), key=lambda pair: pair[1])[:40]
    figure = Figure(figsize=(7, 1 + 0.22 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if name.endswith(" weight") else "tab:orange" for name, _ in shown]
    axes.barh([name for name, _ in shown], [cost for _, cost in shown], color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("signal to noise of the outputs with this alone rounded (dB; less is worse)")
    axes.set_title("weights blue, activations orange", fontsize=9)
    return figure
