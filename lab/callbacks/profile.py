"""What a network costs: parameters, multiplications, milliseconds."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lab.batch import Labelled
from lab.callbacks import Lean, network_of
from lab.modes import evaluating

WARM_UP = 0.03
"""Seconds that a network runs before it is timed."""

TIMED = 0.3
"""Seconds that it is timed for; up to ten times as long until it has run often enough."""

RUNS = 10
"""Often enough that one stall of a busy machine is not the median."""


def profile(network: nn.Module, example: Tensor) -> dict[str, Any]:
    """A network's size, work and speed in eval mode, without gradients.

    Zeros are counted in the weights as the forward pass uses them, parametrizations (masks, say) applied. MACs are
    those of convolutions, matrix products, attention and recurrent layers, as torch's FlopCounterMode counts them (its
    flops, halved); elementwise work is not in them. Latency is wall-clock time on this machine, with the process's
    threads: compare it with what was measured beside it.

    Args:
        network: it is left as it was: modes, gradients and random state.
        example: ``[1, ...]``, one input; moved to the network's device and precision.

    Returns:
        ``parameters``; ``nonzero_parameters``; ``macs`` for one sample; ``latency_ms``, the medians ``batch_1`` and
        ``batch_64``, in milliseconds.
    """
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)
    if weight is not None:
        example = example.to(weight.device, weight.dtype if example.is_floating_point() else None)
    return {
        **_size(network),
        "macs": multiplications(network, example),
        "latency_ms": latency(network, network, example),
    }


def latency(network: nn.Module, run: Callable[[Tensor], Tensor], example: Tensor) -> dict[str, float]:
    """Milliseconds of a network, or of what else computes it, for one sample and for 64.

    Args:
        network: in evaluation mode meanwhile.
        run: what is timed.
        example: ``[1, ...]``, one input.
    """
    batch = example.repeat(64, *[1] * (example.ndim - 1))
    with _asking(network):
        return {"batch_1": _milliseconds(run, example), "batch_64": _milliseconds(run, batch)}


class Profile(Lean):
    """Adds the network's ``profile`` to the stage's results, for an input like the first one of its data.

    A network that can't be run on one input, or data without inputs and targets, leaves its size alone.
    """

    watches_only = True

    def __init__(self) -> None:
        self._example: Tensor | None = None

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """The profile of ``module.network``, or of the module itself."""
        network = network_of(module)
        if self._example is None:
            return _size(network)
        try:
            measured = profile(network, self._example)
        except Exception:  # whatever a network may ask of its input
            return _size(network)
        if any(getattr(callback, "times", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            del measured["latency_ms"]
        return measured

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._remember(batch)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._remember(batch)

    on_test_batch_start = on_validation_batch_start

    def _remember(self, batch: Any) -> None:
        if self._example is None:
            with contextlib.suppress(TypeError):
                self._example = Labelled.of(batch).inputs[:1].detach().clone()


def _size(network: nn.Module) -> dict[str, int]:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with _asking(network):
        zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in _used(network))
    return {"parameters": parameters, "nonzero_parameters": parameters - zeros}


def _used(network: nn.Module) -> Iterator[Tensor]:
    """The parameters, those that are parametrized as the forward pass sees them."""
    behind: set[Tensor] = set()
    for module in network.modules():
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
                behind.update(chain.parameters())
                yield getattr(module, name)
    yield from (parameter for parameter in network.parameters() if parameter not in behind)


@contextlib.contextmanager
def _asking(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, without gradients, and no random state moved."""
    gpus = {parameter.device for parameter in network.parameters() if parameter.is_cuda}
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(gpus):
        yield


def multiplications(network: nn.Module, example: Tensor) -> int:
    """The MACs of a forward pass, in eval mode.

    Args:
        example: ``[B, ...]``, on the network's device.
    """
    attention_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter knows neither the fused layer nor all fused kernels
    recurrent = {torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops, torch.ops.aten._cudnn_rnn: _cudnn_flops}
    try:
        counter = FlopCounterMode(display=False, custom_mapping=recurrent)
        with _asking(network), sdpa_kernel(SDPBackend.MATH), counter:
            network(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(attention_fused)
    return int(counter.get_total_flops()) // 2


def _recurrent_flops(steps: Sequence[int], *weights: Sequence[int], **_: Any) -> int:
    """One layer in one direction, by shapes: ``[T, B, I]``, then the matrices of the input and of the state."""
    return 2 * steps[0] * steps[1] * sum(math.prod(weight) for weight in weights[:2])


def _cudnn_flops(steps: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """All layers and directions at once."""
    return 2 * steps[0] * steps[1] * sum(math.prod(weight) for weight in weights if len(weight) == 2)


@torch.inference_mode()
def _milliseconds(run: Callable[[Tensor], Tensor], batch: Tensor) -> float:
    """The median time of a forward pass."""
    began = _now(batch)
    while True:
        run(batch)
        if _now(batch) - began > WARM_UP:
            break
    times: list[float] = []
    began = now = _now(batch)
    while not times or ((now - began < TIMED or len(times) < RUNS) and now - began < 10 * TIMED):
        run(batch)
        before, now = now, _now(batch)
        times.append(now - before)
    return round(statistics.median(times) * 1e3, 4)


def _now(batch: Tensor) -> float:
    """Seconds, when the device has finished what it was asked."""
    if batch.device.type != "cpu":
        torch.accelerator.synchronize(batch.device)
    return time.perf_counter()
