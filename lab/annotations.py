"""What annotations say of values: each parameter's type and range, and a plain value as its annotation wants it.

Values are checked by pydantic in its strict JSON mode: a recipe's ``"4"`` is no number, and its ``[1, 2]`` is a tuple
where the annotation says so.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import typing
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lab.plan import Component
from lab.ranges import PathOrName

ALTERNATIVES = 4
"""How many alternatives of a union an error names."""
UNSAYABLE = "is of a type that a recipe cannot say"
"""Where pydantic wants an object."""


def typed(hint: Any, value: Any) -> tuple[Any, str | None]:
    """A plain value as its annotation wants it, or what is wrong with it."""
    adapter = _adapter(hint)
    if adapter is None:
        return value, None
    try:
        return adapter.validate_json(json.dumps(value), strict=True), None
    except ValidationError as cause:
        return value, _said(cause)
    except OSError as cause:  # a path where nothing is
        return value, one_line(cause)


def _said(error: ValidationError) -> str:
    """pydantic's messages as one phrase."""
    phrases = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "value_error":  # an annotation's own, written for people: other types are beside the point
            return str(detail["ctx"]["error"])
        inner = [str(part) for part in detail["loc"] if isinstance(part, int)]
        where = f" at position {'.'.join(inner)}" if inner else ""
        what = UNSAYABLE if detail["type"].startswith(("needs_python", "is_instance")) else detail["msg"]
        phrases.append(what.replace("Input should be", "should be").replace("valid array", "list") + where)
    unique = [p for p in dict.fromkeys(phrases) if UNSAYABLE not in p] or [UNSAYABLE]
    return " or ".join([unique[0], *(phrase.removeprefix("should be ") for phrase in unique[1:ALTERNATIVES])])


@functools.cache
def _adapter_of(key: int, hint: Any) -> TypeAdapter[Any] | None:
    for config in (ConfigDict(arbitrary_types_allowed=True), None):
        try:
            return TypeAdapter(hint, config=config)
        except Exception:  # an annotation that pydantic has no schema for
            continue
    return None


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    if hint is None:
        return None
    try:
        return _adapter_of(id(hint), hint)
    except TypeError:  # unhashable
        return None


def hints_of(component: Component) -> dict[str, Any]:
    """Each parameter's annotation, from the class whose constructor has it."""
    hints: dict[str, Any] = {}
    for name, parameter in component.signature.parameters.items():
        owned = (
            annotations_of(parameter.owner) if component.entry.loaded is None else _annotations(component.entry.loaded)
        )
        if name in owned:
            hints[name] = owned[name]
    return hints


@functools.cache
def annotations_of(owner: str) -> dict[str, Any]:
    """The annotations of the constructor of ``package.module:Class``; empty where they cannot be had."""
    module, _, attribute = owner.partition(":")
    try:
        target: Any = importlib.import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except Exception:  # the class itself did load; its base may hide
        return {}
    return _annotations(target)


def _annotations(target: Any) -> dict[str, Any]:
    function = getattr(target, "__init__", target) if isinstance(target, type) else target
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except Exception:  # annotations that exist for type checkers only
        return {}


def is_path(hint: Any) -> bool:
    """Whether an annotation asks for a path, which is relative to the file that says it."""
    return hint is Path or Path in typing.get_args(hint) or is_path_or_name(hint)


def is_path_or_name(hint: Any) -> bool:
    """Whether it asks for a path or a name: see :func:`lab.files.located`."""
    return hint is not None and hint in (PathOrName, PathOrName | None)


def one_line(cause: Exception | None) -> str:
    """What an exception says, on one line, without the frames that PyTorch's C++ adds."""
    if cause is None:
        return ""
    return " ".join(str(cause).partition("\nException raised from ")[0].split()) or type(cause).__name__


def refusal(component: Component, cause: Exception) -> str:
    """What a constructor raised, as a sentence."""
    said = _said(cause) if isinstance(cause, ValidationError) else one_line(cause)
    if isinstance(cause, ValidationError):
        names = ", ".join(str(detail["loc"][0]) for detail in cause.errors() if detail["loc"])
        return f"{component.name}: {names} {said}"
    return (
        f"{component.name}: {said}"
        if isinstance(cause, ValueError | TypeError)
        else f"{component.name}: {type(cause).__name__}: {said}"
    )
