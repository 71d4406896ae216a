"""A plan's components made into objects: children before parents, each under a seed of its own.

A recipe builds registered classes only; nothing in it is imported. Whether its values fit was seen in :mod:`lab.types`.
"""

from __future__ import annotations

import functools
import hashlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import seed_everything

from lab.annotations import hints_of, is_path, is_path_or_name, refusal, typed
from lab.artifact import Teacher
from lab.check import component as find_component
from lab.document import Node, Place, Problem, RecipeError
from lab.files import located
from lab.plan import Component, From, Value
from lab.registry import KINDS

Fetch: typing.TypeAlias = Callable[[From, Mapping[str, Any]], tuple[torch.nn.Module, dict[str, Any]]]


class Builder:
    """Builds the components of one stage.

    Every component is built under a seed of its own, made of the recipe's seed and the component's place in the
    stage: a control's network starts from the same weights as the network that it controls, whatever else the two
    stages build.

    Args:
        seed: the stage's seed.
        fetch: gives the network that a ``{from: ...}`` means, for the data's facts, and the network's specification.
    """

    def __init__(self, seed: int, fetch: Fetch | None = None) -> None:
        self.seed = seed
        self.fetch = fetch or _nothing
        self.facts: dict[str, Any] = {}
        self.made: dict[tuple[str, ...], Any] = {}
        """Every object that was built or fetched, by its place in the stage."""
        self._fetched: dict[tuple[str, ...], dict[str, Any]] = {}

    def build(self, component: Component, given: Mapping[str, Any] | None = None) -> Any:
        """The object that a component describes.

        Args:
            given: values for the parameters that lab fills, beside the data's facts.

        Raises:
            RecipeError: the constructor refused its arguments, or they contradict the data; with the component's place.
        """
        target = component.entry.load()
        hints = hints_of(component)
        arguments = {name: self._value(value, hints.get(name)) for name, value in component.arguments.items()}
        self._refuse_contradictions(component)
        arguments.update(self._filled(component, {"seed": self.seed, **self.facts, **(given or {})}))
        if KINDS[component.kind].factory:
            return functools.partial(target, **arguments)
        seed_everything(_seed(self.seed, component.path), verbose=False)
        try:
            built = target(**arguments)
        except RecipeError:
            raise
        except Exception as cause:  # anyone's constructor
            raise RecipeError(
                [Problem(component.place, ".".join(component.path), refusal(component, cause))]
            ) from cause
        self.made[component.path] = built
        return Teacher(built) if component.frozen else built

    def spec(self, component: Component | From) -> dict[str, Any]:
        """What a component was built from, facts included: enough to build it again without the recipe or the data.

        A reference has the specification of the network that it fetched. An object with a method ``rebuild`` gives
        arguments that replace the recipe's, so that what only its first weights came from is not needed again.
        """
        if isinstance(component, From):
            return self._fetched[component.path]
        result = component.plain()
        for name, value in component.arguments.items():
            result[name] = self._specified(value, result[name])
        available = {"seed": self.seed, **self.facts}
        for name in component.filled:
            if name in available:
                value = available[name]
                result[name] = list(value) if isinstance(value, tuple) else value
        rebuild = getattr(self.made.get(component.path), "rebuild", None)
        return {**result, **rebuild()} if callable(rebuild) else result

    def _specified(self, value: Value, plain: Any) -> Any:
        """A value's plain form, with the specifications of the components in it."""
        if isinstance(value, Component | From):
            return self.spec(value)
        if isinstance(value, list):
            return [self._specified(child, part) for child, part in zip(value, plain, strict=True)]
        if isinstance(value, dict):
            return {name: self._specified(child, plain[name]) for name, child in value.items()}
        return plain

    def _value(self, value: Value, hint: Any) -> Any:
        if isinstance(value, Component):
            return self.build(value)
        if isinstance(value, From):
            network, self._fetched[value.path] = self.fetch(value, self.facts)
            self.made[value.path] = network
            return Teacher(network) if value.frozen else network
        if isinstance(value, list):
            return [self._value(child, None) for child in value]
        if isinstance(value, dict):
            return {key: self._value(child, None) for key, child in value.items()}
        if is_path(hint) and isinstance(value.value, str):
            return located(value.value, value.place.folder, or_name=is_path_or_name(hint))
        paths = [str(i.place.folder / i.value) if isinstance(i.value, str) else i.plain() for i in value.items]
        return typed(hint, paths if is_path(hint) and paths else value.plain())[0]

    def _filled(self, component: Component, available: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that the recipe left out and lab knows; a fact that names a component becomes one."""
        filled: dict[str, Any] = {}
        for name, source in component.filled.items():
            if name in available:
                value = available[name]
                is_name = isinstance(value, str) and name in self.facts and f"{name}s" in KINDS
                filled[name] = self._named(f"{name}s", value) if is_name else value
            elif component.signature.parameters[name].required and not KINDS[component.kind].factory:
                message = f"{component.name} needs the argument '{name}', and {source} does not give it"
                raise RecipeError([Problem(component.place, ".".join(component.path), message)])
        return filled

    def _named(self, kind: str, name: str) -> Any:
        found = find_component(kind, {"name": name}, Place("the data's facts"), list(self.facts))
        return self.build(found)

    def _refuse_contradictions(self, component: Component) -> None:
        for name, fact in self.facts.items():
            value = component.arguments.get(name)
            if value is None or name not in component.signature.parameters or isinstance(value, From):
                continue
            said: Any = (
                value.name if isinstance(value, Component) else value.plain() if isinstance(value, Node) else fact
            )
            known = list(fact) if isinstance(fact, tuple) else fact
            if said is not None and said != known:
                place = value.place if isinstance(value, Component | Node) else component.place
                message = f"the recipe says {said!r}, the data has {known!r}: leave it out, or choose other data"
                raise RecipeError([Problem(place, ".".join((*component.path, name)), message)])


def _nothing(reference: From, facts: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    raise RecipeError(
        [Problem(reference.place, ".".join(reference.path), "there is no run to take a network from here")]
    )


def _seed(seed: int, path: tuple[str, ...]) -> int:
    """A component's own seed, from the recipe's and its place in the stage."""
    digest = hashlib.sha256(f"{seed}:{'.'.join(path)}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
