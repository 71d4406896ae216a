"""What stands where in a recipe: the kind of component that an annotation asks for, what an entry's signature says.

All of it is read from source text (:mod:`lab.signature`); nothing is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lab import signature
from lab.plan import Component
from lab.recipe import RESERVED
from lab.registry import KINDS, Entry, Kind, networks
from lab.signature import Parameter, Reference, Signature


def read_signature(entry: Entry) -> Signature:
    """What a recipe may say to an entry: its constructor's parameters, less those that whoever calls a factory gives.

    Read from source text, or from the class itself where a notebook defined it. An argument called as a reserved word
    is out of a recipe's reach: it is left out, unless nothing works without it.
    """
    found = signature.read(entry.target)
    if not found.known and entry.loaded is not None:
        found = signature.inspected(entry.loaded, entry.target)
    sayable = list(found.parameters.items())[KINDS[entry.kind].later :]
    return replace(found, parameters={name: p for name, p in sayable if p.required or name not in RESERVED})


def kinds_with(name: str) -> list[Kind]:
    """The kinds that know a name; for a dotted name the one that its class derives from, a function makes networks."""
    found = [kind for kind in KINDS.values() if name in kind.names()]
    if found or "." not in name or "/" in name:
        return found
    module, _, attribute = name.rpartition(".")
    ancestors = signature.read(f"{module}:{attribute}").bases
    return [kind for base in ancestors for kind in KINDS.values() if same_class(base, kind.base)][:1] or [networks]


def slot(parameter: Parameter) -> str | None:
    """The kind of component that an annotation asks for, if it does; factories go before what they are made of."""
    return _written_slot(parameter.names) or _first_kind(parameter.names, _derives_from_base)


@functools.cache
def _written_slot(names: tuple[str, ...]) -> str | None:
    """The kind that an annotation's own words say, without a look at what they name."""
    return _first_kind(names, _is_slot) or _first_kind(names, _resembles_slot)


def _first_kind(names: tuple[str, ...], matches: Callable[[str, Kind], bool]) -> str | None:
    kinds = sorted(KINDS.values(), key=lambda kind: not kind.factory)
    return next((kind.name for kind in kinds if any(matches(name, kind) for name in names)), None)


def _is_slot(name: str, kind: Kind) -> bool:
    return name in kind.slots


def _resembles_slot(name: str, kind: Kind) -> bool:
    return any(same_class(name, wanted) for wanted in kind.slots)


def _derives_from_base(name: str, kind: Kind) -> bool:
    if not kind.base or "." not in name or name.partition(".")[0] in ("typing", "collections", "builtins"):
        return False
    return is_a(name, kind.base)


def facts_of(signature: Signature) -> tuple[str, ...]:
    """The names of the facts that a datamodule's class declares."""
    facts = signature.attributes.get("facts", ())
    return tuple(fact for fact in facts if isinstance(fact, str)) if isinstance(facts, tuple | list) else ()


def yielded(data: Component) -> tuple[Any, str]:
    """What data yield, and the name of the argument that decides it, or nothing.

    A datamodule whose argument decides it names the argument in ``yields_by``; for a value V of it ``yields_V`` holds,
    where there is one.
    """
    attributes = data.signature.attributes
    argument = str(attributes.get("yields_by", ""))
    return attributes.get(f"yields_{data.plain().get(argument)}", attributes.get("yields")), argument


def yielding(signature: Signature, consumes: Reference) -> list[str]:
    """The values of the argument in ``yields_by`` with which the data yield what a module consumes."""
    attributes = signature.attributes
    parameter = signature.parameters.get(str(attributes.get("yields_by", "")))
    if parameter is None:
        return []
    values = {name.removeprefix("yields_"): found for name, found in attributes.items() if name.startswith("yields_")}
    by_default = values.pop("by") and attributes.get("yields")
    return [
        value
        for value, found in {str(parameter.literal): by_default, **values}.items()
        if isinstance(found, Reference) and is_a(found, consumes)
    ]


def takes_mapping(parameter: Parameter) -> bool:
    """Whether an annotation allows a mapping of plain values."""
    return any(last_word(name) in ("dict", "Mapping", "MutableMapping", "Dict") for name in parameter.names)


def takes_list(parameter: Parameter) -> bool:
    """Whether an annotation allows a list."""
    words = {"list", "List", "tuple", "Tuple", "Sequence", "MutableSequence", "Collection", "Iterable", "set", "Any"}
    return any(last_word(name) in words for name in parameter.names)


def one(kind: str | None) -> str:
    """A component of a kind, with its article."""
    return KINDS[kind].one if kind else "a component"


def wanted(kind: str | None) -> str:
    """What a component's place in a recipe takes."""
    reference = ", or `from:` a stage" if kind == "networks" else ""
    return f"{one(kind)}: its name, or a mapping with `name:` and its arguments{reference}"


def same_class(name: str, other: str) -> bool:
    """Whether two dotted names mean one class: packages re-export, so the first and the last word decide."""
    return name == other or (name.partition(".")[0], last_word(name)) == (other.partition(".")[0], last_word(other))


def is_a(name: str, wanted: str) -> bool:
    """Whether a dotted name is that of a class or of one derived from it."""
    module, _, attribute = name.rpartition(".")
    return same_class(name, wanted) or any(
        same_class(base, wanted) for base in signature.read(f"{module}:{attribute}").bases
    )


def last_word(name: str) -> str:
    """A dotted name's end."""
    return name.rpartition(".")[2]
