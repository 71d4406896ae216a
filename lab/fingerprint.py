"""What decides a stage's result, part by part: two stages that agree in all of them would train the same network.

A stage is reused where all parts are the same, so each errs towards a difference: what is not known to be without
effect counts. Parts are short texts, so that a person sees which one differs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from torch import nn

from lab import code
from lab.artifact import DESCRIPTION, WEIGHTS
from lab.document import Node
from lab.files import OR_NAME, located
from lab.plan import Component, From, Plan, Stage, Value
from lab.registry import callbacks as registered

if TYPE_CHECKING:
    from lab.assemble import Built

PACKAGES = ("torch", "lightning", "torchmetrics", "numpy")
"""The packages whose versions decide any stage's result."""
DISPLAYS = (ProgressBar, ModelSummary)
"""Lightning's callbacks that only watch; of others the class says ``watches_only = True``."""


def fingerprint(stage: Stage, built: Built, inputs: Mapping[str, str], *, smoke: bool) -> dict[str, str] | None:
    """The parts that decide what a stage gives.

    ``recipe``: its seed, data, module, trainer and callbacks. In it a path of the data stands for nothing (``data`` has
    what was read), any other for what lies there, and a reference for its place among ``inputs``.
    Loggers, gates and callbacks that only watch (they leave nothing in the stage's results) are not in it.
    ``code``: of every class that was built, its package: the version of one that was installed from an index, else a
    digest of its source, and of the sources beside it that it imports. ``versions``, ``device``, ``data``, ``inputs``,
    ``smoke``.

    Args:
        inputs: the digests of the networks that the stage starts from, as :func:`inputs_of` gives them.

    Returns:
        None where nobody can say: the data (or, without data, the module) have no method ``fingerprint``, or a class
        has no source, as in a notebook.
    """
    read = getattr(built.data if built.data is not None else built.module, "fingerprint", None)
    sources = code.of(_classes(stage, built), besides=PACKAGES)
    if not callable(read) or sources is None:
        return None
    references = _references(stage)
    return {
        "recipe": _sha256(_recipe(stage, references)),
        "code": sources,
        "versions": " ".join((f"python={_python()}", *(f"{name}={_version(name)}" for name in PACKAGES))),
        "device": _device(stage.trainer.plain()),
        "data": str(read()),
        "inputs": " ".join(inputs[name] for name in references) or "none",
        "smoke": str(smoke).lower(),
    }


def key(parts: Mapping[str, str]) -> str:
    """One SHA-256 of all parts; a ``key`` among them is not one."""
    return _sha256({name: part for name, part in sorted(parts.items()) if name != "key"})


def inputs_of(stage: Stage, folder_of: Callable[[From], Path]) -> dict[str, str]:
    """The digest of every network that a stage starts from, by what the recipe calls it.

    Args:
        folder_of: the folder of the stage that a reference names.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    found = {_called(c): (folder_of(c), c.checkpoint) for c in _deciding(stage) if isinstance(c, From)}
    return {name: digest_of_artifact(folder, checkpoint) for name, (folder, checkpoint) in found.items()}


def digest_of_artifact(folder: Path, checkpoint: str = "best") -> str:
    """SHA-256 of the network in a stage's folder: what it is, and its weights.

    Args:
        checkpoint: ``last`` for the weights in ``last.ckpt`` instead of those that the stage chose.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    total = hashlib.sha256()
    for path in (folder / DESCRIPTION, folder / (WEIGHTS if checkpoint == "best" else "checkpoints/last.ckpt")):
        total.update(_of_file(path).encode())
    return total.hexdigest()


def pin(plan: Plan) -> None:
    """Note the sources of a plan's classes as they are: what is edited while it trains is not what it trained with."""
    code.forget()
    code.of((found for stage in plan.stages.values() for found in _named(stage)), besides=PACKAGES)


def _deciding(stage: Stage) -> Iterator[Component | From]:
    """Every component and reference of a stage but those that only watch, children first."""
    for component in (stage.data, stage.module, *stage.callbacks.values()):
        if component is not None and not _watches(component):
            yield from component.components()


def _watches(component: Component) -> bool:
    return component.kind == "callbacks" and _leaves_nothing(component.entry.load())


def _leaves_nothing(found: Any) -> bool:
    """Whether a callback's class only watches, and has nothing to say in the stage's results and pictures."""
    watches = getattr(found, "watches_only", False) or (isinstance(found, type) and issubclass(found, DISPLAYS))
    return bool(watches) and not any(hasattr(found, method) for method in ("results", "pictures"))


def _called(reference: From) -> str:
    return reference.source if reference.checkpoint == "best" else f"{reference.source} ({reference.checkpoint})"


def _references(stage: Stage) -> list[str]:
    """What the stage starts from, each once, in the order of the recipe's meaning, not of its spelling."""
    return list(dict.fromkeys(_called(c) for c in _deciding(stage) if isinstance(c, From)))


def _recipe(stage: Stage, references: list[str]) -> dict[str, Any]:
    """A stage as plain data in which nothing depends on where the recipe lies or what other stages are called."""
    own = ("data", "module", "trainer", "callbacks", "logger", "require")
    return {
        **{name: said for name, said in stage.plain().items() if name not in own},
        "data": stage.data and _component(stage.data, references),
        "module": _component(stage.module, references),
        "trainer": dict(sorted(stage.trainer.plain().items())) if stage.trainer.mapping else {},
        "callbacks": [  # in their order: it is that of their hooks
            [name, c and _component(c, references)]
            for name, c in stage.callbacks.items()
            if not (_watches(c) if c else any(_leaves_nothing(entry.load()) for entry in registered.claims(name)))
        ],
    }


def _component(component: Component, references: list[str]) -> dict[str, Any]:
    said = component.plain()
    for name, value in component.arguments.items():
        parameter = component.signature.parameters.get(name)
        is_path = parameter is not None and any(dotted.endswith("pathlib.Path") for dotted in parameter.names)
        or_name = parameter is not None and OR_NAME in parameter.names
        path = _path_of(component.kind, or_name) if is_path else None
        said[name] = _value(value, references, path)
    return {**said, "name": component.entry.target}


def _value(value: Value, references: list[str], path: Callable[[str, Path], str] | None) -> Any:
    """A value as plain data.

    Args:
        path: what a text stands for that was said in a folder, where texts are paths.
    """
    if isinstance(value, Component):
        return _component(value, references)
    if isinstance(value, From):
        return {**value.plain(), "from": references.index(_called(value))}
    children = value.value if isinstance(value, Node) else value
    if isinstance(children, list):
        return [_value(child, references, path) for child in children]
    if isinstance(children, dict):
        return {name: _value(child, references, path) for name, child in children.items()}
    if isinstance(value, Node) and isinstance(children, str) and path is not None:
        return path(children, value.place.folder)
    return children


def _path_of(kind: str, or_name: bool) -> Callable[[str, Path], str]:
    """What a path stands for: in data for nothing, as their fingerprint has what was read there; else for its content.

    Args:
        or_name: a name may stand in its place, which stands for itself.
    """

    def of(said: str, folder: Path) -> str:
        found = located(said, folder, or_name=or_name)
        if isinstance(found, str):
            return found
        return "<data>" if kind == "datamodules" else _content(found)

    return of


def _content(path: Path) -> str:
    """The bytes at a path, of a folder those of every file below it, by name."""
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return str(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return _sha256([(file.relative_to(path).as_posix(), _of_file(file)) for file in files])


def _classes(stage: Stage, built: Built) -> set[Any]:
    """What the stage is built from: classes that the recipe names, that were filled in, and those inside networks."""
    made = [thing for path, thing in built.builder.made.items() if path[0] not in ("callbacks", "logger", "loggers")]
    inside = [part for thing in (*made, built.module) if isinstance(thing, nn.Module) for part in thing.modules()]
    return {*_named(stage), *map(type, (*made, *inside))}


def _named(stage: Stage) -> Iterator[Any]:
    return (c.entry.load() for c in _deciding(stage) if isinstance(c, Component))


def _device(trainer: Mapping[str, Any]) -> str:
    """The processor's type or the GPUs' names, and how precisely they multiply; not how many threads there are."""
    wanted = trainer.get("accelerator", "auto")
    kind = platform.machine()
    if wanted != "cpu" and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        everything = trainer.get("devices", "auto") in ("auto", "-1", -1)
        kind = ", ".join(names if everything else sorted(set(names)))
    elif wanted != "cpu" and torch.backends.mps.is_available():
        kind = f"mps {kind}"
    return f"{kind} matmul={torch.get_float32_matmul_precision()}"


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@functools.cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, default=repr).encode()).hexdigest()
