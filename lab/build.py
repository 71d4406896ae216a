"""A plan's components made into objects: types and ranges checked first, then built, children before parents.

Values are checked against the constructors' annotations by pydantic in its strict JSON mode: a recipe's ``"4"`` is no
number and its ``[1, 2]`` is a tuple where the annotation says so. A recipe builds registered classes only; nothing in
it is imported.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import seed_everything
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lab.artifact import Teacher
from lab.check import component as find_component
from lab.check import once, slot, wanted
from lab.document import Node, Place, Problem, RecipeError
from lab.optimization import given_steps
from lab.plan import Component, From, Plan, Stage, Value
from lab.ranges import Count, NonNegative, Whole
from lab.recipe import ONLY_STAGE, shown
from lab.registry import KINDS, BrokenPlugin, nearest

Fetch: typing.TypeAlias = Callable[[From, Mapping[str, Any]], tuple[torch.nn.Module, dict[str, Any]]]

ALTERNATIVES = 4
"""How many alternatives of a union an error names."""
UNSAYABLE = "is of a type that a recipe cannot say"
"""Where pydantic wants an object."""
TRAINER_RANGES: dict[str, Any] = {
    "accumulate_grad_batches": Count,
    "check_val_every_n_epoch": Count | None,
    "gradient_clip_val": NonNegative | None,
    "log_every_n_steps": Whole | None,
    "num_nodes": Count,
}
"""What Lightning's Trainer takes without a word, and then divides by zero or trains uphill."""


def check_types(plan: Plan) -> None:
    """Import every class that a plan names, and check every argument's type and range.

    Raises:
        RecipeError: every problem, with its place.
    """
    problems: list[Problem] = []
    for stage in plan.stages.values():
        for component in stage.components():
            if isinstance(component, Component):
                problems += _problems(component, _key(stage, component.path))
        problems += _trainer_problems(stage, _key(stage, ("trainer",)))
    if problems:
        raise RecipeError(once(problems))


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
        hints = _all_hints(component)
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
                [Problem(component.place, ".".join(component.path), _refusal(component, cause))]
            ) from cause
        self.made[component.path] = built
        return Teacher(built) if component.frozen else built

    def spec(self, component: Component | From) -> dict[str, Any]:
        """What a component was built from, facts included: enough to build it again without the recipe or the data.

        A reference has the specification of the network that it fetched.
        """
        if isinstance(component, From):
            return self._fetched[component.path]
        result = component.plain()
        for name, value in component.arguments.items():
            if isinstance(value, Component | From):
                result[name] = self.spec(value)
        available = {"seed": self.seed, **self.facts}
        for name in component.filled:
            if name in available:
                value = available[name]
                result[name] = list(value) if isinstance(value, tuple) else value
        return result

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
        if _is_path(hint) and isinstance(value.value, str):
            return value.place.folder / value.value
        paths = [str(i.place.folder / i.value) if isinstance(i.value, str) else i.plain() for i in value.items]
        return _typed(hint, paths if _is_path(hint) and paths else value.plain())[0]

    def _filled(self, component: Component, available: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that the recipe left out and lab knows; a fact that names a component becomes one."""
        filled: dict[str, Any] = {}
        for name, source in component.filled.items():
            if name in available:
                value = available[name]
                is_name = isinstance(value, str) and name in self.facts and f"{name}s" in KINDS
                filled[name] = self._named(f"{name}s", value, component) if is_name else value
            elif component.signature.parameters[name].required and not KINDS[component.kind].factory:
                message = f"{component.name} needs the argument '{name}', and {source} does not give it"
                raise RecipeError([Problem(component.place, ".".join(component.path), message)])
        return filled

    def _named(self, kind: str, name: str, parent: Component) -> Any:
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


def _key(stage: Stage, path: tuple[str, ...]) -> str:
    prefix = ("stages", stage.name) if stage.name != ONLY_STAGE else ()
    return ".".join((*prefix, *path))


def _problems(component: Component, key: str) -> Iterator[Problem]:
    """What is wrong with one component's own arguments; its children are looked at for themselves."""
    kind = KINDS[component.kind]
    try:
        target = component.entry.load()
    except BrokenPlugin as cause:
        yield Problem(component.place, key, str(cause))
        return
    if not callable(target):
        yield Problem(component.place, key, f"{_whose(component)} is no class or function")
        return
    if isinstance(target, type) and kind.base and not issubclass(target, _class(kind.base)):
        yield Problem(component.place, key, f"{_whose(component)} is no {kind.base}")
        return
    hints = _all_hints(component)
    sound = True
    for name, value in component.arguments.items():
        if isinstance(value, Node) and name in hints and not (_is_path(hints[name]) and isinstance(value.value, str)):
            _, problem = _typed(hints[name], value.plain())
            if problem:
                sound = False
                yield Problem(value.place, f"{key}.{name}", _not_typed(component, name, problem, value))
        for child in _children(value):
            if isinstance(child, Node):
                said = [_typed(each, child.plain())[1] for each in _classes(hints.get(name))]
                if said and all(said):
                    sound = False
                    yield Problem(child.place, f"{key}.{name}", _not_typed(component, name, str(said[0]), child))
            elif (wrong := _wrong_class(child, hints.get(name))) is not None:
                yield Problem(child.place, f"{key}.{name}", wrong)
    if sound and kind.factory:
        yield from _refused(component, target, key)


def _not_typed(component: Component, name: str, problem: str, value: Node) -> str:
    """A wrong type in words; where a component or a type that YAML has not is wanted, pydantic's mean nothing."""
    parameter = component.signature.parameters.get(name)
    if problem in (UNSAYABLE, "should be callable", "should be a list") and parameter is not None:
        if kind := slot(parameter):
            problem = f"expected {wanted(kind)}"
        elif problem == UNSAYABLE:
            problem = f"a recipe cannot say {parameter.annotation}"
    return f"{problem}, got {shown(value.plain())}"


def _whose(component: Component) -> str:
    return f"{component.name} of package {component.entry.package} ({component.entry.target})"


def _children(value: Value) -> Iterator[Component | Node]:
    """The components in a value, and what stands beside them in its lists and mappings."""
    if isinstance(value, Component):
        yield value
    elif isinstance(value, list | dict):
        for child in value.values() if isinstance(value, dict) else value:
            yield from [child] if isinstance(child, Node) else _children(child)


def _wrong_class(child: Component, hint: Any) -> str | None:
    """Why a component's class does not fit a slot that wants a more special one; None where it may fit."""
    try:
        target = child.entry.load()
    except BrokenPlugin:
        return None
    wanted = [c for c in _classes(hint) if c is not type(None)]
    if child.frozen or KINDS[child.kind].factory or not isinstance(target, type) or not wanted:
        return None
    if any(_may_be(target, c) for c in wanted):
        return None
    return f"{child.name} is no {' or '.join(dict.fromkeys(c.__name__ for c in wanted))}"


def _may_be(target: type, wanted: type) -> bool:
    try:
        return issubclass(target, wanted)
    except TypeError:  # a protocol with attributes
        return True


def _classes(hint: Any) -> list[type]:
    if isinstance(hint, type) and not typing.get_args(hint):
        return [hint]
    return [c for argument in typing.get_args(hint) for c in _classes(argument)]


def _refused(component: Component, target: Any, key: str) -> Iterator[Problem]:
    """What an optimizer or scheduler says to its arguments, tried on one parameter: it checks their ranges."""
    hints = _all_hints(component)
    values = {name: value for name, value in component.arguments.items() if isinstance(value, Node)}
    if len(values) < len(component.arguments):
        return
    arguments = {name: _typed(hints.get(name), value.plain())[0] for name, value in values.items()}
    parameters = component.signature.parameters
    needed = [name for name in arguments if name in parameters and parameters[name].required]

    def make(**arguments: Any) -> None:
        weights = [torch.nn.Parameter(torch.zeros(1))]
        if component.kind == "optimizers":
            target(weights, **arguments)
        elif component.kind == "schedulers":
            optimizer = torch.optim.SGD(weights, lr=0.1)
            scheduler = target(optimizer, **given_steps(target, arguments, 1000), **arguments)
            if type(scheduler).step is torch.optim.lr_scheduler.LRScheduler.step:
                optimizer.step()
                scheduler.step()  # only now do some divide by what they were given

    for name, cause in _blamed(make, arguments, needed):
        place = values[name].place if name else component.place
        yield Problem(place, f"{key}.{name}" if name else key, _refusal(component, cause))


def _blamed(
    make: Callable[..., None], arguments: Mapping[str, Any], needed: Sequence[str] = ()
) -> Iterator[tuple[str | None, Exception]]:
    """What a call raises, each time with the argument without which it would not; None where no one argument is.

    Args:
        needed: arguments that the call fails without.
    """
    left = dict(arguments)
    while (cause := _raised(make, left)) is not None:
        said = _line(cause)
        named = [name for name, value in left.items() if name in said or str(value) in said]
        tried = [name for name in dict.fromkeys([*named, *left]) if name not in needed]
        healing = (name for name in tried if _line(_raised(make, {k: v for k, v in left.items() if k != name})) != said)
        name = next(healing, named[0] if named else None)
        if len(left) == len(arguments) or name in named:  # a later one may be for want of what was taken away
            yield name, cause
        if name is None or name in needed:
            return
        del left[name]


def _raised(make: Callable[..., None], arguments: Mapping[str, Any]) -> Exception | None:
    try:
        make(**arguments)
    except Exception as cause:  # anyone's constructor
        return cause
    return None


def _line(cause: Exception | None) -> str:
    """What an exception says, on one line, without the frames that PyTorch's C++ adds."""
    if cause is None:
        return ""
    return " ".join(str(cause).partition("\nException raised from ")[0].split()) or type(cause).__name__


def _trainer_problems(stage: Stage, key: str) -> Iterator[Problem]:
    """What Lightning's Trainer says to the recipe's arguments: one that is never used is built of them."""
    from lightning.pytorch import Trainer

    from lab.trainer import quiet

    hints = _hints("lightning.pytorch.trainer.trainer:Trainer")
    sound = True
    names = _trainer_names()
    for name, value in stage.trainer.mapping.items():
        _, problem = _typed(TRAINER_RANGES.get(name, hints.get(name)), value.plain())
        if problem:
            problem = f"{problem}, got {shown(value.plain())}"
        elif isinstance(value.value, str) and name in names and value.value.lower() not in names[name]:
            problem = f"no {name} named '{value.value}'{nearest(value.value, names[name])}"
        if problem:
            sound = False
            yield Problem(value.place, f"{key}.{name}", problem)
    if not sound:
        return

    def make(**arguments: Any) -> None:
        with quiet():
            Trainer(**arguments, logger=False, enable_checkpointing=False)

    for blamed, cause in _blamed(make, stage.trainer.plain()):
        place = stage.trainer.mapping[blamed].place if blamed else stage.trainer.place
        yield Problem(place, f"{key}.{blamed}" if blamed else key, _line(cause))


@functools.cache
def _trainer_names() -> dict[str, set[str]]:
    """The names that the Trainer's arguments know."""
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    return {
        "strategy": {"auto", *StrategyRegistry.available_strategies()},
        "accelerator": {"auto", "gpu", *AcceleratorRegistry.available_accelerators()},
        "profiler": {"simple", "advanced", "pytorch", "xla"},
    }


def _typed(hint: Any, value: Any) -> tuple[Any, str | None]:
    """A plain value as its annotation wants it, or what is wrong with it."""
    adapter = _adapter(hint)
    if adapter is None:
        return value, None
    try:
        return adapter.validate_json(json.dumps(value), strict=True), None
    except ValidationError as cause:
        return value, _said(cause)


def _said(error: ValidationError) -> str:
    """pydantic's messages as one phrase."""
    phrases = []
    for detail in error.errors(include_url=False):
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


def _all_hints(component: Component) -> dict[str, Any]:
    """Each parameter's annotation, from the class whose constructor has it."""
    hints: dict[str, Any] = {}
    for name, parameter in component.signature.parameters.items():
        owned = _hints(parameter.owner) if component.entry.loaded is None else _hints_of(component.entry.loaded)
        if name in owned:
            hints[name] = owned[name]
    return hints


@functools.cache
def _hints(owner: str) -> dict[str, Any]:
    module, _, attribute = owner.partition(":")
    try:
        target: Any = importlib.import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except Exception:  # the class itself did load; its base may hide
        return {}
    return _hints_of(target)


def _hints_of(target: Any) -> dict[str, Any]:
    function = getattr(target, "__init__", target) if isinstance(target, type) else target
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except Exception:  # annotations that exist for type checkers only
        return {}


def _is_path(hint: Any) -> bool:
    from pathlib import Path

    return hint is Path or Path in typing.get_args(hint)


@functools.cache
def _class(dotted: str) -> type:
    module, _, attribute = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return object
    return found if isinstance(found, type) else object


def _refusal(component: Component, cause: Exception) -> str:
    said = _said(cause) if isinstance(cause, ValidationError) else _line(cause)
    if isinstance(cause, ValidationError):
        names = ", ".join(str(detail["loc"][0]) for detail in cause.errors() if detail["loc"])
        return f"{component.name}: {names} {said}"
    return (
        f"{component.name}: {said}"
        if isinstance(cause, ValueError | TypeError)
        else f"{component.name}: {type(cause).__name__}: {said}"
    )
