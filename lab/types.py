"""Types and ranges: what is wrong with a plan's values, told before anything is built or written.

Every class that the plan names is imported. Values are held against annotations; optimizers, schedulers, Lightning's
callbacks and its Trainer, which check their ranges when they are built, are built once for nothing.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lab import nodes
from lab.annotations import UNSAYABLE, annotations_of, hints_of, is_path, is_path_or_name, one_line, refusal, typed
from lab.batching import settled
from lab.check import once
from lab.document import Node, Problem, RecipeError
from lab.files import located
from lab.optimization import given_steps
from lab.plan import BATCH_SIZE, Component, Plan, Stage, Value, sized
from lab.ranges import Count, NonNegative, Whole
from lab.recipe import ONLY_STAGE, shown
from lab.registry import KINDS, BrokenPlugin, nearest
from lab.slots import slot, wanted

TRAINER_RANGES: dict[str, Any] = {
    "accumulate_grad_batches": Count,
    "check_val_every_n_epoch": Count | None,
    "gradient_clip_val": NonNegative | None,
    "log_every_n_steps": Whole | None,
    "num_nodes": Count,
}
"""What Lightning's Trainer takes without a word, and then divides by zero or trains uphill."""

_TOO_MANY = re.compile(r"You requested gpu: \[(.*?)\]\s+But your machine only has: \[(.*?)\]")


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
        problems += _colliding(stage)
        wrong = list(_trainer_problems(stage, _key(stage, ("trainer",))))
        problems += wrong or list(_not_shared_out(stage)) or _unfit(stage, _key(stage, ("trainer",)))
    if problems:
        raise RecipeError(once(problems))


def check_component(component: Component) -> None:
    """The same for a component that stands alone, as in a network's JSON file.

    Raises:
        RecipeError: every problem, with its place.
    """
    parts = [part for part in component.components() if isinstance(part, Component)]
    if problems := [problem for part in parts for problem in _problems(part, ".".join(part.path))]:
        raise RecipeError(once(problems))


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
    if component.entry.dotted and not isinstance(target, type):
        yield Problem(component.place, key, f"{component.name} is no class: --import allows a package's classes only")
        return
    if not callable(target):
        yield Problem(component.place, key, f"{_whose(component)} is no class or function")
        return
    if isinstance(target, type) and kind.base and not issubclass(target, named_class(kind.base)):
        yield Problem(component.place, key, f"{_whose(component)} is no {kind.base}")
        return
    hints = hints_of(component)
    sound = True
    for name, value in component.arguments.items():
        if isinstance(value, Node) and name in hints:
            _, problem = typed(hints[name], _located(value, hints[name]))
            if problem := problem or (_not_finite(value) if kind.factory else None):
                sound = False
                yield Problem(value.place, f"{key}.{name}", _not_typed(component, name, problem, value))
        for child in _children(value):
            if isinstance(child, Node):
                said = [typed(each, child.plain())[1] for each in _classes(hints.get(name))]
                if said and all(said):
                    sound = False
                    yield Problem(child.place, f"{key}.{name}", _not_typed(component, name, str(said[0]), child))
            elif (wrong := _wrong_class(child, hints.get(name))) is not None:
                yield Problem(child.place, f"{key}.{name}", wrong)
    if sound and (kind.factory or _is_lightnings(component)):
        yield from _refused(component, target, key)


def _not_finite(value: Node) -> str | None:
    """What is wrong with infinities and NaN, which optimizers take without a word."""
    numbers = [v for v in (value.value, *(item.value for item in value.items)) if isinstance(v, float)]
    return None if all(map(math.isfinite, numbers)) else "should be a finite number"


def _is_lightnings(component: Component) -> bool:
    """Whether it is a callback of Lightning's own: building one has no effects."""
    return component.kind == "callbacks" and component.entry.target.startswith("lightning.")


def _colliding(stage: Stage) -> Iterator[Problem]:
    """Callbacks whose state a checkpoint could not tell apart, which Lightning refuses when training starts."""
    seen: dict[str, str] = {}
    for name, component in stage.callbacks.items():
        if component is None or (state := _state_key(component)) is None:
            continue
        if (other := seen.setdefault(state, name)) != name:
            message = f"is the same {component.name} as callbacks.{other}, as far as its state tells: remove one"
            yield Problem(component.place, _key(stage, ("callbacks", name)), message)


def _state_key(component: Component) -> str | None:
    """What a callback's state is called in a checkpoint; None where it has none, or nobody knows before it is built."""
    from lightning.pytorch import Callback

    try:
        target = component.entry.load()
    except BrokenPlugin:
        return None
    if not isinstance(target, type) or not issubclass(target, Callback) or target.state_dict is Callback.state_dict:
        return None
    if target.state_key is Callback.state_key:
        return target.__qualname__
    values = {name: value.plain() for name, value in component.arguments.items() if isinstance(value, Node)}
    if not _is_lightnings(component) or _raised(lambda **_: _callback(component, target, values), {}):
        return None
    return str(_callback(component, target, values).state_key)


def _callback(component: Component, target: Any, arguments: Mapping[str, Any]) -> Any:
    """One that is never used; what the module will say it monitors is any metric here."""
    given = {"monitor": "metric"} if "monitor" in component.filled else {}
    return target(**given, **arguments)


def _located(value: Node, hint: Any) -> Any:
    """A plain value; a path from the folder of the file that says it."""
    plain = value.plain()
    if not is_path(hint) or not isinstance(plain, str):
        return plain
    return str(located(plain, value.place.folder, or_name=is_path_or_name(hint)))


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
    """What a factory or a callback says to its arguments, tried on one parameter: it checks their ranges."""
    hints = hints_of(component)
    values = {name: value for name, value in component.arguments.items() if isinstance(value, Node)}
    if len(values) < len(component.arguments):
        return
    arguments = {name: typed(hints.get(name), value.plain())[0] for name, value in values.items()}
    parameters = component.signature.parameters
    needed = [name for name in arguments if name in parameters and parameters[name].required]

    def make(**arguments: Any) -> None:
        weights = [torch.nn.Parameter(torch.zeros(1))]
        if component.kind == "optimizers":
            target(weights, **arguments)
        elif component.kind == "schedulers":
            optimizer = torch.optim.SGD(weights, lr=0.1)
            scheduler = target(optimizer, **given_steps(target, arguments, lambda: (10**6, 1)), **arguments)
            if type(scheduler).step is torch.optim.lr_scheduler.LRScheduler.step:
                optimizer.step()
                scheduler.step()  # only now do some divide by what they were given
        else:
            _callback(component, target, arguments)

    for name, cause in _blamed(make, arguments, needed):
        place = values[name].place if name else component.place
        yield Problem(place, f"{key}.{name}" if name else key, refusal(component, cause))


def _blamed(
    make: Callable[..., None], arguments: Mapping[str, Any], needed: Sequence[str] = ()
) -> Iterator[tuple[str | None, Exception]]:
    """What a call raises, each time with the argument without which it would not; None where no one argument is.

    Args:
        needed: arguments that the call fails without.
    """
    left = dict(arguments)
    while (cause := _raised(make, left)) is not None:
        said = one_line(cause)
        named = [name for name, value in left.items() if name in said or str(value) in said]
        tried = [name for name in dict.fromkeys([*named, *left]) if name not in needed]
        without = {name: {k: v for k, v in left.items() if k != name} for name in tried}
        healing = (name for name in tried if one_line(_raised(make, without[name])) != said)
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


@functools.cache
def named_class(dotted: str) -> type:
    """The class of a dotted name; ``object`` where there is none, as of a package that is not installed."""
    module, _, attribute = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return object
    return found if isinstance(found, type) else object


def _trainer_problems(stage: Stage, key: str) -> Iterator[Problem]:
    """What Lightning's Trainer says to the recipe's arguments: one that is never used is built of them."""
    hints = annotations_of("lightning.pytorch.trainer.trainer:Trainer")
    sound = True
    names = _trainer_names()
    for name, value in stage.trainer.mapping.items():
        _, problem = typed(TRAINER_RANGES.get(name, hints.get(name)), value.plain())
        if problem:
            problem = f"{problem}, got {shown(value.plain())}"
        elif isinstance(value.value, str) and name in names and value.value.lower() not in names[name]:
            problem = f"no {name} named '{value.value}'{nearest(value.value, names[name])}"
        if problem:
            sound = False
            yield Problem(value.place, f"{key}.{name}", problem)
    if sound and (against := list(nodes.contradictions(stage, key))):
        sound = False
        yield from against
    settings = nodes.filled(stage).trainer.plain()
    if not sound or _trains(json.dumps(settings)):
        return
    for blamed, cause in _blamed(_trainer, settings):
        place = stage.trainer.mapping.get(blamed or "", stage.trainer).place
        yield Problem(place, f"{key}.{blamed}" if blamed else key, _of_this_machine(one_line(cause)))


def _of_this_machine(said: str) -> str:
    """What Lightning says of GPUs that are not there, with how to mend it; anything else as it is."""
    if said == "No supported gpu backend found!":
        return "there is no GPU here that torch can use: `accelerator: auto` takes what there is, `cpu` the processor"
    if found := _TOO_MANY.search(said):
        return f"GPUs {found[1]} are asked for, this machine has {found[2]}: `devices: auto` takes all that there are"
    return said


def _not_shared_out(stage: Stage) -> Iterator[Problem]:
    """Whether a global batch can be shared out evenly."""
    if stage.global_batch is None or not _countable(stage):
        return
    try:
        settled(stage)
    except ValueError as cause:
        yield Problem(stage.global_batch.place, _key(stage, ("global_batch_size",)), str(cause))


def _countable(stage: Stage) -> bool:
    """Whether a global batch is shared by whole numbers; what is wrong with them is said elsewhere."""
    data, trainer = sized(stage.data), stage.trainer.mapping
    said = [data.arguments.get(BATCH_SIZE) if data else None, trainer.get("accumulate_grad_batches")]
    return all(
        part is None or (isinstance(part, Node) and type(part.value) is int and part.value >= 1) for part in said
    )


def _unfit(stage: Stage, key: str) -> Iterator[Problem]:
    """What the stage's technique and callbacks cannot be trained with."""
    from lab.trainer import SHARDED

    settings = (settled(stage) if _countable(stage) else stage).trainer.mapping
    strategy = settings.get("strategy")
    for component in (stage.module, *stage.callbacks.values()):
        try:
            target = component.entry.load() if component is not None else None
        except BrokenPlugin:
            continue  # said elsewhere
        if component is None:
            continue
        refuses = getattr(target, "refuses", None)
        for name, why in refuses(component.plain()).items() if callable(refuses) else ():
            if name in settings and settings[name].value not in (None, 1 if name in _ONE_IS_NONE else None):
                said = f"{component.name} cannot be trained with it: {why}"
                yield Problem(settings[name].place, f"{key}.{name}", said)
        why = getattr(target, "unsharded", None)
        if strategy is not None and strategy.value in SHARDED and isinstance(why, str):
            said = f"{component.name} cannot be trained with {strategy.value}: {why}; use ddp"
            yield Problem(strategy.place, f"{key}.strategy", said)


_ONE_IS_NONE = ("accumulate_grad_batches",)
"""Arguments of the Trainer whose 1 says what leaving them out does."""


@functools.lru_cache(maxsize=256)
def _trains(settings: str) -> bool:
    """Whether a Trainer can be built of arguments, as JSON: a recipe's stages mostly have the same."""
    return _raised(_trainer, json.loads(settings)) is None


def _trainer(**arguments: Any) -> None:
    from lightning.pytorch import Trainer

    from lab.trainer import quiet, translated

    with quiet():
        Trainer(**translated(arguments), logger=False, enable_checkpointing=False)


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
