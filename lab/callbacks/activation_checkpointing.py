"""Activations that are computed again instead of kept: less memory for about a third more work, and the same weights.

T. Chen, B. Xu, C. Zhang, C. Guestrin: Training Deep Nets with Sublinear Memory Cost, 2016, arXiv:1604.06174. Of a block
only the inputs are kept for the backward pass, which computes the block once more; with n blocks of one size, n inputs
and one block's activations are kept instead of n blocks'.

The second time a block finds everything as it was the first time: its inputs, random state, modes, buffers, and what
was put in place of a ``forward``. What it changes then is forgotten: running statistics have seen each batch once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lab.blocks import blocks_of
from lab.callbacks import Lean, network_of
from lab.callbacks.execution import Compile
from lab.domain_norm import SourceStatistics
from lab.errors import UserError
from lab.ranges import checked

_LISTED = 12
"""How many modules an error names."""


class _Moment:
    """What decides, beside inputs and random state, what modules compute."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.modes = [module.training for module in modules]
        self.forwards = [vars(module).get("forward") for module in modules]
        self.buffers = [dict(module._buffers) for module in modules]

    def copied(self) -> _Moment:
        """The same with buffers that nobody else changes."""
        self.buffers = [{n: b if b is None else b.clone() for n, b in own.items()} for own in self.buffers]
        return self

    def put(self) -> None:
        """Have the modules as they were."""
        for module, mode, forward, buffers in zip(self.modules, self.modes, self.forwards, self.buffers, strict=True):
            module.training = mode
            module._buffers.update(buffers)
            if forward is not None:
                vars(module)["forward"] = forward
            else:
                vars(module).pop("forward", None)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Has the modules be as they were for a while, whatever they do meanwhile."""
        now = _Moment(self.modules)
        kept = self.buffers
        self.copied().put()
        self.buffers = kept
        try:
            yield
        finally:
            now.put()


class _Recomputed:
    """Stands in place of a block's ``forward``; a copy of the block has a copy of its own.

    Args:
        beside: modules outside the block that its parts change.
    """

    def __init__(self, block: nn.Module, beside: Sequence[nn.Module]) -> None:
        self.block = block
        self.beside = beside

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        forward = type(self.block).forward
        if not (self.block.training and torch.is_grad_enabled()):
            return forward(self.block, *inputs, **named)
        if torch.compiler.is_compiling():  # a compiled block is a function of its buffers
            return checkpoint(forward, self.block, *inputs, use_reentrant=False, **named)
        before = _Moment([*self.block.modules(), *self.beside]).copied()
        return checkpoint(
            forward, self.block, *inputs, use_reentrant=False, **named,
            context_fn=lambda: (contextlib.nullcontext(), before.again()),
        )  # fmt: skip


class ActivationCheckpointing(Lean):
    """Has the blocks of the module's network computed again in the backward pass, instead of their activations kept.

    Weights and buffers come out as they would without; names of weights don't change, and what is tested, exported and
    saved is the network itself. In evaluation, and where gradients are off, blocks are computed as ever.

    Args:
        blocks: patterns of the names of the modules that are computed again, of nested ones the outermost; where it is
            left out, what the network is a sequence of (:func:`lab.blocks.blocks_of`).
    """

    unsaved: ClassVar[tuple[str, ...]] = ("_blocks",)

    @checked
    def __init__(self, blocks: tuple[str, ...] | None = None) -> None:
        self.patterns = blocks
        self._blocks: list[nn.Module] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if callable(getattr(pl_module, "compile_step", None)):
            raise UserError(
                f"activation_checkpointing: {type(pl_module).__name__} computes a step as a function of weights, which "
                "has no backward pass to compute blocks again in; `execution: loop` takes least memory"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning adds it outside the constructor
        if any(isinstance(c, Compile) and c.arguments["backend"] == "eager" for c in callbacks):
            raise UserError(
                "activation_checkpointing: compile's backend eager would have running statistics see each batch twice; "
                "`aot_eager` or `inductor` doesn't"
            )
        network = network_of(pl_module)
        beside = [part for part in pl_module.modules() if isinstance(part, SourceStatistics)]
        self._blocks = [network.get_submodule(name) for name in self._names(network)]
        for block in self._blocks:
            block.forward = _Recomputed(block, beside)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            for block in self._blocks:
                vars(block).pop("forward", None)

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """How many blocks were computed again."""
        return {"recomputed_blocks": len(self._blocks)}

    def _names(self, network: nn.Module) -> list[str]:
        """The names of the blocks.

        Raises:
            UserError: there are none, or a pattern that nothing matches.
        """
        whose = type(network).__name__
        known = [name for name, _ in network.named_modules() if name]
        if self.patterns is None:
            if not (found := blocks_of(network)):
                raise UserError(
                    f"activation_checkpointing: {whose} is no sequence of blocks: name parts of it, "
                    f"such as `blocks: [{known[0] if known else '...'}]`"
                )
            return found
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
                raise UserError(
                    f"activation_checkpointing: no part of {whose} has a name like '{pattern}' "
                    f"(there are: {', '.join(known[:_LISTED])}{more})"
                )
        chosen = [name for name in known if any(fnmatchcase(name, pattern) for pattern in self.patterns)]
        return [name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)]
