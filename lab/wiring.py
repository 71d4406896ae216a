"""How tensors flow between a network's parts, seen by running it once: where numbers can be rounded, and what follows.

No graph is compiled: the network stays the modules that it is, and any network that runs can be seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lab.modes import evaluating

PASSING = (
    "MaxPool1d", "MaxPool2d", "MaxPool3d", "AdaptiveMaxPool2d", "Flatten", "Unflatten", "Dropout", "Dropout2d",
    "Identity", "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze",
    "max_pool1d", "max_pool2d", "boolean_dispatch", "dropout",
)  # fmt: skip
"""What gives out only values that came in: what is on a grid stays on it."""
RECTIFYING = ("ReLU", "ReLU6", "relu", "relu_", "relu6")
"""What rounding takes over: a grid that begins at zero rectifies."""


@dataclass(frozen=True)
class Node:
    """A tensor of the pass, and what made it.

    Args:
        kind: the class of the module, or the name of the function, that made it; ``""`` for an input.
        layer: the name of that module; None for a function or an input.
        at: the name of the module whose output it is, a function's also where it is the last of a larger module.
        inputs: the places of the tensors that it was made of.
    """

    kind: str
    layer: str | None
    at: str | None
    inputs: tuple[int, ...]


class Wiring:
    """The tensors of one pass, in order.

    Args:
        network: run in evaluation mode; left as it was.
        example: ``[B, ...]``, an input.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        watch = _Watch(network)
        with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=()), watch:
            network(example)
        self.nodes: list[Node] = watch.nodes
        self.calls: Counter[str] = watch.calls
        """How often each module was called."""
        self.consumers: list[list[int]] = [[] for _ in self.nodes]
        for place, node in enumerate(self.nodes):
            for source in dict.fromkeys(node.inputs):
                self.consumers[source].append(place)

    def of(self, layer: str) -> Iterator[int]:
        """The places of what a layer made."""
        return (place for place, node in enumerate(self.nodes) if node.layer == layer)

    def origin(self, place: int) -> int:
        """The tensor whose values a tensor has."""
        node = self.nodes[place]
        while node.kind in PASSING and len(node.inputs) == 1:
            place = node.inputs[0]
            node = self.nodes[place]
        return place

    def output_of(self, place: int) -> str | None:
        """The module whose output a tensor is, if that is called once: what is done to its output is done to it."""
        at = self.nodes[place].at
        return at if at and self.calls[at] == 1 else None


class _Watch(TorchFunctionMode):
    """Notes what modules and functions make of what."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.calls: Counter[str] = Counter()
        self._network = network
        self._places: dict[int, int] = {}
        self._alive: list[Tensor] = []
        """Of which no identity is given to another tensor."""
        self._inside = 0
        self._entered: list[tuple[int, ...]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for name, module in self._network.named_modules():
            leaf = isinstance(module, _BatchNorm) or {child for child, _ in module.named_children()} <= {
                "parametrizations"
            }
            self._handles += [
                module.register_forward_pre_hook(self._entering(leaf), with_kwargs=True, prepend=True),
                module.register_forward_hook(self._leaving(name, leaf)),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *cause: Any) -> None:
        super().__exit__(*cause)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._alive.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self._inside and isinstance(made, Tensor):
            name = getattr(func, "__name__", str(func))
            self._made(made, name, None, None, self._seen([*args, *(kwargs or {}).values()]))
        return made

    def _seen(self, values: list[Any]) -> tuple[int, ...]:
        flat = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
        return tuple(self._place(part) for part in flat if isinstance(part, Tensor) and part.is_floating_point())

    def _place(self, tensor: Tensor) -> int:
        if id(tensor) not in self._places:
            self._made(tensor, "", None, None, ())
        return self._places[id(tensor)]

    def _made(self, tensor: Tensor, kind: str, layer: str | None, at: str | None, inputs: tuple[int, ...]) -> None:
        self._places[id(tensor)] = len(self.nodes)
        self._alive.append(tensor)
        self.nodes.append(Node(kind, layer, at, inputs))

    def _entering(self, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if leaf:
                self._entered.append(self._seen([*args, *kwargs.values()]))
                self._inside += 1

        return hook

    def _leaving(self, name: str, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, made: Any) -> None:
            self.calls[name] += 1
            inputs = self._entered.pop() if leaf else ()
            self._inside -= leaf
            if not isinstance(made, Tensor):
                return
            if leaf:
                self._made(made, type(module).__name__, name, name, inputs)
            elif (place := self._places.get(id(made))) is not None and self.nodes[place].at is None:
                found = self.nodes[place]
                self.nodes[place] = Node(found.kind, found.layer, name, found.inputs)

        return hook
