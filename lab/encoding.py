"""Values as plain data and back: numbers, strings and tensors, and mappings that say what they were.

What comes out loads with ``weights_only=True``, whatever went in; what goes in again builds nothing but the types here.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEEPEST = 32
"""Containers within containers that a value may have."""
KIND = "is"
MAPPINGS = ("dict", "OrderedDict", "Counter", "defaultdict")
TENSOR = "tensor"
PLAIN = (type(None), bool, int, float, complex, str, bytes)
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class Unsavable(TypeError):
    """A value that no checkpoint can hold."""


@dataclass(frozen=True)
class _Codec:
    """How values of a kind become plain and are made again.

    Args:
        accepts: whether a value is of this kind.
        encode: its plain parts; whatever of them isn't plain is encoded in turn.
        decode: the value, from its parts (decoded) and the value that is in its place now, which may be taken over.
    """

    accepts: Callable[[Any], bool]
    encode: Callable[[Any], Any]
    decode: Callable[[Any, Any], Any]


def encoded(value: Any, depth: int = 0) -> Any:
    """A value as plain data.

    Raises:
        Unsavable: it is, or holds, something that has no plain form.
    """
    if type(value) in PLAIN and value != b"":  # empty bytes are pickled as a call, which doesn't load
        return value
    if depth > DEEPEST:
        raise Unsavable(f"it is nested more than {DEEPEST} deep")
    if isinstance(value, Tensor):
        return {KIND: TENSOR, "value": value.detach().clone(), "device": str(value.device)}
    if type(value) in (list, tuple):
        return type(value)(encoded(part, depth + 1) for part in value)
    for kind, codec in CODECS.items():
        if codec.accepts(value):
            return {KIND: kind, "value": encoded(codec.encode(value), depth + 1)}
    raise Unsavable(f"it is or holds a {type(value).__module__}.{type(value).__qualname__}")


def decoded(plain: Any, existing: Any = None) -> Any:
    """The value that was encoded; put into ``existing`` where that is of the same kind.

    Raises:
        Unsavable: it can only be put into an existing object, and there is none; or it is of no kind that there is.
    """
    if type(plain) in (list, tuple):
        parts = type(plain)(decoded(part, _taking(existing, place)) for place, part in enumerate(plain))
        if type(plain) is list and type(existing) is list:
            existing[:] = parts
            return existing
        return parts
    if not isinstance(plain, dict):
        return plain
    kind, value = plain.get(KIND), plain.get("value")
    if kind == TENSOR and isinstance(value, Tensor):
        return _tensor(value, plain["device"], existing)
    if kind not in CODECS:
        raise Unsavable(f"the unknown kind {kind!r}")
    if kind in MAPPINGS:
        items = [(key := decoded(name), decoded(part, _taking(existing, key))) for name, part in value or ()]
        return CODECS[kind].decode(items, existing)
    return CODECS[kind].decode(decoded(value), existing)


def stateful(value: Any) -> bool:
    """Whether an object says what its state is, and takes it again."""
    if isinstance(value, type):
        return False
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _taking(container: Any, place: Any) -> Any:
    """What is at a place of a container, if only an existing object can take the state that was its."""
    if isinstance(container, dict):
        found = container.get(place)
    else:
        found = container[place] if isinstance(container, list | tuple) and place < len(container) else None
    return found if stateful(found) or isinstance(found, defaultdict) else None


def _exactly(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


def _a(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def _tensor(value: Tensor, device: str, existing: Any) -> Tensor:
    here = existing if isinstance(existing, Tensor) and not existing.is_inference() else None
    if here is not None and (here.shape, here.dtype) == (value.shape, value.dtype):
        with torch.no_grad():
            here.copy_(value)
        return here
    moved: Tensor = value.to(existing.device if isinstance(existing, Tensor) else device)
    return moved.clone()


def _mapping(kind: type) -> _Codec:
    def decode(items: Any, existing: Any) -> Any:
        if type(existing) is not kind:
            if kind is defaultdict:
                raise Unsavable("a defaultdict was made during the training: make it before, in the constructor")
            return kind(items) if kind is not Counter else Counter(dict(items))
        existing.clear()  # type: ignore[attr-defined]  # it is the same kind of mapping
        existing.update(dict(items))  # type: ignore[attr-defined]
        return existing

    return _Codec(_exactly(kind), lambda value: list(value.items()), decode)


def _deque(parts: Any, existing: Any) -> deque[Any]:
    values, longest = parts
    if type(existing) is not deque or existing.maxlen != longest:
        return deque(values, longest)
    existing.clear()
    existing.extend(values)
    return existing


def _set(parts: Any, existing: Any) -> set[Any]:
    if type(existing) is not set:
        return set(parts)
    existing.clear()
    existing.update(parts)
    return existing


def _array(parts: Any, existing: Any) -> Any:
    content, dtype, shape = parts
    array = np.frombuffer(content, np.dtype(dtype)).reshape(shape).copy()
    alike = type(existing) is np.ndarray and existing.shape == array.shape and existing.dtype == array.dtype
    if alike and existing.flags.writeable:
        existing[...] = array
        return existing
    return array if shape or isinstance(existing, np.ndarray) else array[()]


def _torch_generator(parts: Any, existing: Any) -> torch.Generator:
    state, device = parts
    generator = existing if isinstance(existing, torch.Generator) else torch.Generator(device)
    generator.set_state(state)
    return generator


def _numpy_generator(state: Any, existing: Any) -> np.random.Generator:
    if not isinstance(existing, np.random.Generator):
        if state["bit_generator"] not in BIT_GENERATORS:
            raise Unsavable(f"unknown generator {state['bit_generator']!r}")
        existing = np.random.Generator(getattr(np.random, state["bit_generator"])())
    generator: np.random.Generator = existing
    generator.bit_generator.state = state
    return generator


def _numpy_legacy(state: Any, existing: Any) -> np.random.RandomState:
    legacy = existing if isinstance(existing, np.random.RandomState) else np.random.RandomState()
    legacy.set_state(state)
    return legacy


def _python_generator(state: Any, existing: Any) -> random.Random:
    generator = existing if isinstance(existing, random.Random) else random.Random()
    generator.setstate(state)
    return generator


def _state(state: Any, existing: Any) -> Any:
    if not stateful(existing):
        raise Unsavable("what has a state_dict was made during the training: make it before, in the constructor")
    existing.load_state_dict(state)
    return existing


CODECS: dict[str, _Codec] = {
    "dict": _mapping(dict),
    "OrderedDict": _mapping(OrderedDict),
    "Counter": _mapping(Counter),
    "defaultdict": _mapping(defaultdict),
    "set": _Codec(_exactly(set), list, _set),
    "frozenset": _Codec(_exactly(frozenset), list, lambda parts, _: frozenset(parts)),
    "deque": _Codec(_exactly(deque), lambda value: (list(value), value.maxlen), _deque),
    "size": _Codec(_exactly(torch.Size), list, lambda parts, _: torch.Size(parts)),
    "bytes": _Codec(_exactly(bytes), list, lambda parts, _: bytes(list(parts))),
    "path": _Codec(_a(Path), str, lambda parts, _: Path(parts)),
    "array": _Codec(
        lambda value: isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc",
        lambda value: (np.ascontiguousarray(value).tobytes(), value.dtype.str, list(value.shape)),
        _array,
    ),
    "torch.Generator": _Codec(
        _a(torch.Generator), lambda value: (value.get_state(), str(value.device)), _torch_generator
    ),
    "numpy.Generator": _Codec(_a(np.random.Generator), lambda value: value.bit_generator.state, _numpy_generator),
    "numpy.RandomState": _Codec(_a(np.random.RandomState), lambda value: value.get_state(legacy=False), _numpy_legacy),
    "random.Random": _Codec(_a(random.Random), lambda value: value.getstate(), _python_generator),
    "state": _Codec(stateful, lambda value: value.state_dict(), _state),
}
"""By what the plain form calls a kind; the first that accepts a value encodes it."""
