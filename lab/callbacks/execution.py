"""How a network is executed: compiled, in another memory format. What it computes stays the same."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lab.callbacks import Lean, network_of
from lab.ranges import checked


class Compile(Lean):
    """Compiles the module's network with ``torch.compile``, in place: names of weights don't change.

    A module with a method ``compile_step`` is told the options instead, and compiles the whole of its training step;
    not in a run with ``--smoke``, whose few steps are shorter than compiling.

    Args:
        mode: what is optimized for.
        dynamic: whether code for any batch size is made; None: once a second size is seen.
        fullgraph: whether what cannot be compiled is an error.
        backend: ``inductor``, or ``aot_eager`` where there is no compiler.
    """

    @checked
    def __init__(
        self,
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default",
        dynamic: bool | None = None,
        fullgraph: bool = False,
        backend: Literal["inductor", "aot_eager", "eager", "cudagraphs"] = "inductor",
    ) -> None:
        self.arguments: dict[str, Any] = {"dynamic": dynamic, "fullgraph": fullgraph, "backend": backend}
        if backend == "inductor":
            self.arguments["mode"] = mode

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not callable(compile_step := getattr(pl_module, "compile_step", None)):
            network_of(pl_module).compile(**self.arguments)
        elif not getattr(trainer, "smoke", False):
            compile_step(self.arguments)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # what is tested and measured is the network as it is saved
            network_of(pl_module)._compiled_call_impl = None
            if callable(compile_step := getattr(pl_module, "compile_step", None)):
                compile_step(None)


class ChannelsLast(Lean):
    """Keeps the weights of convolutions, and so all maps, as height × width × channels in memory.

    Faster on GPUs with tensor cores and on many CPUs.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        network_of(pl_module).to(memory_format=torch.channels_last)
