"""Exact state: what a training is besides its weights, its optimizers and Lightning's counters.

Random generators, the attributes that plugins keep, sums of metrics that an epoch has so far, frozen parameters and
modes. Everything is made of numbers, strings, tensors and containers of them, so that a checkpoint that has it loads
with ``weights_only=True``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import random
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric, MetricCollection

from lab.encoding import Unsavable, decoded, encoded, stateful

State: TypeAlias = dict[str, Any]

OTHERS_OWN = (Trainer, LightningDataModule, Callback, Logger, Optimizer, LRScheduler)
"""What a module may hold as an attribute, and what somebody else saves."""
LIBRARIES = ("torch", "torchmetrics", "torchvision", "lightning", "timm", "transformers")
"""Packages whose layers keep what matters in parameters and buffers."""
HASHED_UP_TO = 2**26
"""Bytes of a NumPy array whose content is looked at to see whether it changed; larger ones by their identity."""


def randomness() -> State:
    """The states of Python's, NumPy's and torch's global random generators, the current GPU's included."""
    state: State = {
        "python": random.getstate(),
        "numpy": encoded(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_randomness(state: State) -> None:
    """Put the global random generators where :func:`randomness` found them."""
    random.setstate(state["python"])
    np.random.set_state(decoded(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Attributes:
    """The attributes of modules, callbacks and data that change while a training goes on.

    What they were is noted when this is made; what changed since is saved if it is made of numbers, strings, bytes,
    tensors, NumPy arrays, random generators and containers of them, or has ``state_dict`` and ``load_state_dict``.
    Attributes of the base classes, cached properties and those that a class names in ``unsaved`` are left out, and so
    is an object whose class says ``watches_only = True``.

    Args:
        owners: the objects, by what an error calls them.
    """

    def __init__(self, owners: Mapping[str, object]) -> None:
        self.owners = {name: owner for name, owner in owners.items() if not getattr(owner, "watches_only", False)}
        self.before = {name: {key: _seen(value) for key, value in _own(owner)} for name, owner in self.owners.items()}
        self.objects = {name: {key: _same(value) for key, value in _own(owner)} for name, owner in self.owners.items()}

    def changed(self) -> State:
        """The attributes that are not what they were, encoded.

        Raises:
            Unsavable: one of them cannot be saved.
        """
        result: State = {}
        for name, key, value in self.differing():
            filled = self.objects[name].get(key) == _same(value)
            try:
                if (stateful(value) or isinstance(value, defaultdict)) and key not in self.objects[name]:
                    raise Unsavable("it was made during the training: make it before, in the constructor")
                result.setdefault(name, {})[key] = {"filled": filled, "value": encoded(value)}
            except Unsavable as cause:
                raise Unsavable(
                    f"{name}.{key} cannot be saved, so a resumed training would differ: {cause}. Keep numbers, "
                    "strings, tensors, random generators, and lists and mappings of them in attributes that "
                    f"change, give it state_dict and load_state_dict, or, if it can be made anew, name it in "
                    f'{type(self.owners[name]).__name__}.unsaved = ("{key}",)'
                ) from cause
        return result

    def differing(self) -> Iterator[tuple[str, str, Any]]:
        """The owner's name, the attribute's, and its value, of each that is not what it was."""
        for name, owner in self.owners.items():
            before = self.before[name]
            for key, value in _own(owner):
                if key not in before or _seen(value) != before[key]:
                    yield name, key, value

    def count(self, names: Iterable[tuple[str, str]]) -> None:
        """Take attributes for changed: owner's name and attribute's each."""
        for name, key in names:
            self.before[name].pop(key, None)

    def restore(self, state: State) -> None:
        """Give the attributes the values that :meth:`changed` encoded.

        Containers and tensors that were filled are filled again, so that whoever shares them sees it; where another
        object had taken the place, another takes it.
        """
        for name, attributes in state.items():
            if (owner := self.owners.get(name)) is None:
                continue
            for key, saved in attributes.items():
                existing = getattr(owner, key, None)
                new = decoded(saved["value"], existing if saved["filled"] else _apart(existing))
                if new is not existing:
                    setattr(owner, key, new)


def owners(trainer: Trainer) -> dict[str, object]:
    """Whose attributes are part of a training's state."""
    module = trainer.lightning_module
    found: dict[str, object] = {type(module).__qualname__: module}
    for name, part in module.named_modules():
        if name and type(part).__module__.partition(".")[0] not in LIBRARIES:
            found[f"{type(module).__qualname__}.{name}"] = part
    keepers: list[Callback | LightningDataModule] = [*trainer.callbacks]  # type: ignore[attr-defined]
    if (data := getattr(trainer, "datamodule", None)) is not None:
        keepers.append(data)
    for number, keeper in enumerate(keepers):
        base = Callback if isinstance(keeper, Callback) else LightningDataModule
        if type(keeper).state_dict is base.state_dict:  # else it says itself what its state is
            name = type(keeper).__qualname__
            found[name if name not in found else f"{name}[{number}]"] = keeper
    return found


@functools.cache
def _inherited() -> frozenset[str]:
    """The attributes that Lightning and torch keep themselves."""
    lazily = ("trainer", "_hparams", "_hparams_initial", "_hparams_name", "_log_hyperparams")
    bases = (LightningModule(), LightningDataModule(), nn.Module(), MeanMetric())
    return frozenset({*(name for base in bases for name in vars(base)), *lazily})


def _own(owner: object) -> Iterator[tuple[str, Any]]:
    """An object's attributes that are neither its base classes', nor caches, nor saved by somebody else."""
    kind = type(owner)
    unsaved = {name for base in kind.__mro__ for name in base.__dict__.get("unsaved", ())}
    foreign = kind.__module__.partition(".")[0] == "lightning"
    if isinstance(owner, Metric):
        unsaved |= owner._defaults.keys()  # what it adds up is saved as such
    for key, value in vars(owner).items():
        derived = isinstance(getattr(kind, key, None), functools.cached_property)
        derived = derived or getattr(value, "__self__", None) is owner  # a method, as DDP leaves one
        if key in _inherited() or key in unsaved or derived or isinstance(value, OTHERS_OWN):
            continue
        if foreign and not _encodable(value):
            continue
        yield key, value


def _encodable(value: Any) -> bool:
    try:
        encoded(value)
    except Unsavable:
        return False
    return True


def _seen(value: Any) -> Any:
    """What tells whether a value has changed, without its content where that would take long."""
    result: Any = object() if stateful(value) else _same(value)  # what has a state is always saved: it knows best
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            result = type(value).__name__, repr(value)  # nan is itself
        case Tensor():
            result = object() if value.is_inference() else (_same(value), value._version)  # the former don't count
        case np.ndarray() if value.dtype != object and value.nbytes <= HASHED_UP_TO:
            digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes()).digest()
            result = value.shape, str(value.dtype), digest
        case dict():
            result = _same(value), [(_seen(key), _seen(part)) for key, part in value.items()]
        case list() | tuple() | deque():
            result = type(value).__name__, [_seen(part) for part in value]
        case set() | frozenset():
            result = type(value).__name__, sorted(map(repr, value))
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            result = _same(value), [_seen(getattr(value, field.name)) for field in dataclasses.fields(value)]
        case torch.Generator():
            result = _same(value), value.get_state().numpy().tobytes()
        case np.random.Generator() | np.random.RandomState() | random.Random():
            result = _same(value), repr(encoded(value))
    return result


def _apart(value: Any) -> Any:
    """What a state can be put into without anybody else seeing it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict | list | set | deque):
        return copy.copy(value)
    return value if stateful(value) or isinstance(value, tuple) else None


class _same:  # noqa: N801  # a value of comparison, not a thing
    """Compares as the identity of an object, without keeping it alive where that can be helped."""

    def __init__(self, value: object) -> None:
        self.value: Callable[[], object]
        try:
            self.value = weakref.ref(value)
        except TypeError:
            self.value = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _same) and self.value() is other.value() is not None

    __hash__ = None  # type: ignore[assignment]


def metrics(module: LightningModule) -> State:
    """What the metric objects of a module hold, where they hold anything."""
    for part in module.modules():
        if isinstance(part, MetricCollection):
            part.values(copy_state=False)  # members that share their states get them
    return {
        name: {"updates": part._update_count, "states": encoded(dict(part.metric_state))}
        for name, part in module.named_modules()
        if isinstance(part, Metric) and part._update_count > 0
    }


def set_metrics(module: LightningModule, state: State) -> None:
    """Give metric objects what :func:`metrics` found in them; those that held nothing are reset."""
    for name, part in module.named_modules():
        if not isinstance(part, Metric):
            continue
        if name not in state:
            if part._update_count:
                part.reset()
            continue
        for key, value in decoded(state[name]["states"]).items():
            setattr(part, key, value)
        part._update_count, part._computed = state[name]["updates"], None


SAID = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip
"""What Lightning knows of a logged value, beside its reduction."""
REDUCTIONS: dict[str, Any] = {
    "mean": torch.mean, "sum": torch.sum, "max": torch.max, "min": torch.min,
    "builtin sum": sum, "builtin max": max, "builtin min": min,
}  # fmt: skip
"""What Lightning reduces with, by what a checkpoint calls it."""


def logged(results: _ResultCollection) -> list[State]:
    """What ``self.log(..., on_epoch=True)`` has added up since the epoch began."""
    found = []
    for key, entry in results.items():
        if not entry.meta.on_epoch:
            continue
        meta, sync = entry.meta, entry.meta.sync
        reduction = next(name for name, reduce in REDUCTIONS.items() if reduce is meta.reduce_fx)
        saved = {
            "key": key, "said": {name: getattr(meta, name) for name in SAID}, "reduction": reduction,
            "sync": {"_should": sync.should, "rank_zero_only": sync.rank_zero_only},
            "is_tensor": entry.is_tensor, "has_reset": entry.has_reset, "updates": entry._update_count,
        }  # fmt: skip
        if entry.is_tensor:
            saved["sums"] = encoded({name: getattr(entry, name) for name in entry._defaults})
        found.append(saved)
    return found


class _Elsewhere(_Metadata):
    """Of a value that other processes logged, on more or fewer devices: whether it is reduced is said with the next."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Metadata):
            return NotImplemented
        self.sync = other.sync
        return all(getattr(self, part.name) == getattr(other, part.name) for part in dataclasses.fields(_Metadata))

    __hash__ = None  # type: ignore[assignment]


def set_logged(results: _ResultCollection, state: list[State], trainer: Trainer, *, elsewhere: bool) -> None:
    """Put back what :func:`logged` found.

    Args:
        elsewhere: on another number of processes.
    """
    results.clear()
    for saved in state:
        made = _Elsewhere if elsewhere else _Metadata
        meta = made(**saved["said"], reduce_fx=REDUCTIONS[saved["reduction"]])
        meta.sync = _Sync(fn=trainer.strategy.reduce, _group=None, **saved["sync"])
        entry = _ResultMetric(meta, saved["is_tensor"])
        if saved["is_tensor"]:
            vars(entry).update(decoded(saved["sums"]))
        elif meta.metric_attribute is not None:
            entry.value = trainer.lightning_module.get_submodule(meta.metric_attribute)
        entry.has_reset, entry._update_count = saved["has_reset"], saved["updates"]
        results[saved["key"]] = entry
    begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0
    if begun and not all(saved["has_reset"] for saved in state):
        trainer._logger_connector._first_loop_iter = True  # else the next batch's would clear the sums, as the first's


def frozen(module: nn.Module) -> State:
    """Which parameters don't learn, and which parts are in evaluation mode."""
    return {
        "parameters": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "evaluating": [name for name, part in module.named_modules() if not part.training],
    }


def set_frozen(module: nn.Module, state: State) -> None:
    """Freeze and set modes as :func:`frozen` found them."""
    still, evaluating = set(state["parameters"]), set(state["evaluating"])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in still)
    for name, part in module.named_modules():
        part.training = name not in evaluating
