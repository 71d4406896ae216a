"""FSDP: a network's weights, gradients and optimizer states shared out among processes, gathered a block at a time.

To Lightning ``fsdp`` is torch's first FullyShardedDataParallel, which is deprecated, wraps modules and runs on GPUs
alone. Here it is the second (``torch.distributed.fsdp.fully_shard``): every parameter is cut along its first dimension,
names and classes stay, and it runs wherever there is a process group.

Between two steps a process has its part. In training a block's parameters are gathered when it is called, and again for
its backward pass. While it is validated, tested and saved, the network is whole in every process: processes may then
see unequal numbers of batches, and whatever looks at a network finds an ordinary one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from typing_extensions import override

from lab.blocks import blocks_of
from lab.errors import UserError

HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
"""Where a module keeps what is called along with it, of what FSDP registers."""
OTHER_FORWARD = "features"
"""The method of a network that techniques call instead of ``forward``, which calls it too."""


class Sharded(DDPStrategy):
    """Processes as of DDP, each with its part of the weights.

    Args:
        offload: keep the parts in the CPU's memory, and have the optimizer step there.
    """

    def __init__(self, offload: bool = False) -> None:
        super().__init__()
        self.offload = offload
        self._parts: list[nn.Module] = []

    @override
    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        module = self.lightning_module
        assert module is not None
        assert self.accelerator is not None
        if isinstance(why := getattr(module, "unsharded", None), str):
            raise UserError(f"{type(module).__name__} cannot be trained with fsdp: {why}")
        self.accelerator.setup(trainer)
        if self._layer_sync:
            self.model = self._layer_sync.apply(module)
        self.precision_plugin.convert_module(module)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        self._parts = shard(module, mesh, CPUOffloadPolicy() if self.offload else OffloadPolicy())
        self.model_to_device()  # what is not shared out
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def on_validation_start(self) -> None:
        """Make the network whole for a while: a process with fewer batches than another would not take part."""
        for part in self._parts:
            for block in _blocks_of(part):
                block.set_reshard_after_forward(False, recurse=False)
                block.unshard()
            _share_buffers(part)

    @override
    def on_validation_end(self) -> None:
        for part in self._parts:
            for block in _blocks_of(part):
                block.set_reshard_after_forward(True, recurse=False)
                block.reshard()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, in the first process; all take part."""
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, in the first process; all take part."""
        state = (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        return self._whole(state)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        like = self.lightning_module.state_dict()
        state = {name: _as(value, like.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _as(value, parameters[number]) for name, value in known.items()}
                for number, known in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._parts = []  # other processes may be gone: nothing is gathered any more
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        for part in self._parts:
            gather(part)
        self._parts = []
        super().teardown()

    def _whole(self, tree: Any) -> dict[str, Any]:
        def whole(value: Any) -> Any:
            return value.full_tensor().cpu().clone() if isinstance(value, DTensor) else value  # without the padding

        found: dict[str, Any] = tree_map(whole, tree)
        return found if self.is_global_zero else {}


def shard(module: LightningModule, mesh: DeviceMesh, offload: OffloadPolicy) -> list[nn.Module]:
    """Share out the parameters of a module's parts among processes; returns those that have any.

    Raises:
        UserError: the module has parameters outside of its parts.
    """
    if own := [name for name, _ in module.named_parameters(recurse=False)]:
        raise UserError(f"{type(module).__name__}.{own[0]} is in no part of the module: fsdp cannot share it out")
    parts = [part for part in module.children() if next(part.parameters(), None) is not None]
    for part in parts:
        for block in blocks(part):
            fully_shard(block, mesh=mesh, offload_policy=offload)
        # Also what is in no block: between two calls `parameters()` are the parts, for whoever makes an optimizer then.
        fully_shard(part, mesh=mesh, offload_policy=offload, reshard_after_forward=True)
        if callable(getattr(part, OTHER_FORWARD, None)):
            _Features(part)
    return parts


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered together: what the network is a sequence of, and its head, which may be asked alone.

    Those that share a parameter with others are left out: it is gathered with all the rest.
    """
    head = getattr(network, "head", None)
    found = [network.get_submodule(name) for name in blocks_of(network)]
    inside = {part for block in found for part in block.modules()}
    if isinstance(head, nn.Module) and head not in inside:
        found.append(head)
        inside |= set(head.modules())
    rest = (part for part in network.modules() if part not in inside)
    holders = (*(block.parameters() for block in found), *(part.parameters(recurse=False) for part in rest))
    places = Counter(parameter for parameters in holders for parameter in set(parameters))
    for block in found:
        if (own := list(block.parameters())) and all(places[parameter] == 1 for parameter in own):
            yield block


class _Features:
    """A network's ``features``, which gathers weights as ``forward`` does where it is called by itself."""

    def __init__(self, part: nn.Module) -> None:
        self._within = self._alone = getattr(part, OTHER_FORWARD)
        register_fsdp_forward_method(part, OTHER_FORWARD)
        self._alone = getattr(part, OTHER_FORWARD)
        self._depth = 0
        self._hooks = (
            part.register_forward_pre_hook(lambda *_: self._go(1), prepend=True),
            part.register_forward_hook(lambda *_: self._go(-1), always_call=True),
        )
        setattr(part, OTHER_FORWARD, self)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return (self._within if self._depth else self._alone)(*inputs, **named)

    def remove(self) -> None:
        """Have the hooks forgotten that tell where it is called."""
        for hook in self._hooks:
            hook.remove()

    def _go(self, deeper: int) -> None:
        self._depth += deeper


def gather(part: nn.Module) -> None:
    """Make a part that :func:`shard` shared out an ordinary one again, whole in every process; all take part."""
    for block in _blocks_of(part):
        block.reshard()
    whole: dict[DTensor, nn.Parameter] = {}  # modules may share one
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    found = parameter.full_tensor().detach().clone()  # without the padding
                    whole[parameter] = nn.Parameter(found, requires_grad=parameter.requires_grad)
                module.register_parameter(name, whole[parameter])
        for hooks in HOOKS:
            known = getattr(module, hooks)
            for key in [key for key, hook in known.items() if _fsdps(hook)]:
                del known[key]
        if isinstance(module, FSDPModule):
            if isinstance(features := vars(module).pop(OTHER_FORWARD, None), _Features):
                features.remove()
            module.__class__ = type(module).__mro__[2]
    _share_buffers(part)


def _share_buffers(part: nn.Module) -> None:
    """Have every process's buffers be the first one's, as DDP has them."""
    for buffer in part.buffers():
        torch.distributed.broadcast(buffer, 0)


def _blocks_of(part: nn.Module) -> list[FSDPModule]:
    return [module for module in part.modules() if isinstance(module, FSDPModule)]


def _fsdps(hook: Any) -> bool:
    """Whether FSDP registered a hook."""
    while isinstance(hook, functools.partial) or hasattr(hook, "hook"):
        hook = hook.func if isinstance(hook, functools.partial) else hook.hook
    owner = type(hook.__self__).__module__ if hasattr(hook, "__self__") else getattr(hook, "__module__", "")
    return str(owner).startswith("torch.distributed.fsdp")


def _as(value: Any, like: Any) -> Any:
    """A whole tensor as a parameter of the same shape is shared out."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
