"""What a network is a sequence of: the parts that are gathered, or computed again, one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(network: nn.Module) -> list[str]:
    """The names of what a network is a sequence of: residual blocks, transformer layers, convolutions with their norms.

    They are the elements of its outermost ``Sequential``, ``ModuleList`` and ``ModuleDict`` that have parameters and
    parts; where such an element repeats a class itself, as a stage of blocks does, those.
    """

    def below(prefix: str, parent: nn.Module) -> Iterator[str]:
        for key, child in parent.named_children():
            if key == "parametrizations":  # containers too, of what weights are made of
                continue
            name = f"{prefix}{key}"
            if isinstance(parent, _CONTAINERS) and _is_composite(child) and not _repeats(child):
                yield name
            else:
                yield from below(f"{name}.", child)

    return list(below("", network))


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _repeats(module: nn.Module) -> bool:
    """Whether there is a container in it with several parts of one class, which is no container."""
    for part in module.modules():
        if isinstance(part, _CONTAINERS):
            classes = [type(c) for c in part.children() if _is_composite(c) and not isinstance(c, _CONTAINERS)]
            if max(Counter(classes).values(), default=0) > 1:
                return True
    return False
