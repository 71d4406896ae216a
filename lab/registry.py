"""Names: every component that a recipe can use, found through entry points, imported only when a recipe names it.

A *kind* (modules, networks, callbacks, ...) is an entry-point group ``lab.<kind>``; an entry is ``name =
package.module:Class``. The project's own names stand in its ``pyproject.toml`` like any plugin's. In a notebook, or
in a package given as ``--import``, the decorator does the same::

    @registry.modules.register("my_technique")
    class MyTechnique(LightningModule): ...

Listing reads package metadata only: no plugin runs, and neither torch nor lightning is imported.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


class UnknownName(LookupError):
    """No component of that kind has that name."""


class DuplicateName(LookupError):
    """Two packages claim the same name of the same kind."""


class BrokenPlugin(ImportError):
    """The package behind a name does not import."""


@dataclass(frozen=True)
class Entry:
    """A name, and where its class is.

    ``target`` is ``package.module:Class``; ``package`` the distribution that brought it, or how else it came;
    ``loaded`` the class itself where a decorator gave it.
    """

    kind: str
    name: str
    target: str
    package: str
    loaded: Any = None

    @property
    def dotted(self) -> bool:
        """Whether it was named in full, as ``--import`` allows."""
        return self.name == self.target.replace(":", ".")

    def load(self) -> Any:
        """The class or function itself.

        Raises:
            BrokenPlugin: importing it failed; the message names the package and the cause.
        """
        if self.loaded is not None:
            return self.loaded
        module, _, attribute = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as cause:  # a plugin may fail in any way
            raise BrokenPlugin(
                f"{self.kind} '{self.name}' of package {self.package} does not load ({self.target}): "
                f"{type(cause).__name__}: {cause}{_install_hint(self, cause)}"
            ) from cause
        return found


@dataclass(frozen=True)
class Kind:
    """One sort of component.

    Args:
        name: plural, as in the entry-point group ``lab.<name>``.
        base: dotted name of the class that its classes derive from; empty where any callable serves.
        slots: dotted names that, in a constructor's annotation, ask for a component of this kind.
        factory: recipes inject a factory (the class with its arguments bound), not an object.
        later: how many of its first parameters a recipe cannot say: whoever calls the factory gives them.
    """

    name: str
    base: str
    slots: tuple[str, ...] = ()
    factory: bool = False
    later: int = 0
    _registered: dict[str, Entry] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def singular(self) -> str:
        """``network`` of ``networks``."""
        return self.name.removesuffix("s")

    @property
    def one(self) -> str:
        """``a network`` of ``networks``, ``an optimizer`` of ``optimizers``."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.singular}"

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make a class known under ``name`` in this process.

        Raises:
            DuplicateName: another class has the name already.
            ValueError: its constructor needs an argument called ``name``, which no recipe can give.
        """

        def decorate(target: T) -> T:
            _refuse_needed_name(self, name, target)
            entry = Entry(self.name, name, f"{target.__module__}:{target.__qualname__}", _home(target), target)
            taken = [e for e in (*self._registered.values(), *_installed()[self.name]) if e.name == name]
            for other in taken:
                if other.target != entry.target:
                    raise DuplicateName(_claims(self.name, name, [other, entry]))
            self._registered[name] = entry
            return target

        return decorate

    def entries(self) -> list[Entry]:
        """Every entry of this kind, by name; a name that two packages claim stands twice."""
        own = self._registered
        installed = [e for e in _installed()[self.name] if e.name not in own]
        return sorted([*own.values(), *installed], key=lambda e: (e.name, e.package))

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted({e.name for e in self.entries()})

    def claims(self, name: str) -> list[Entry]:
        """Every entry with this name: one, unless packages are at odds."""
        return [entry for entry in self.entries() if entry.name == name]

    def find(self, name: str) -> Entry:
        """The entry with this name.

        A dotted name (``package.module.Class``) is allowed where ``--import`` named its package.

        Raises:
            UnknownName: the message has the nearest names.
            DuplicateName: two packages claim it; the message names both.
        """
        claims = self.claims(name)
        if len(claims) == 1:
            return claims[0]
        if claims:
            raise DuplicateName(_claims(self.name, name, claims))
        if "." in name and all(part.isidentifier() for part in name.split(".")):
            return self._dotted(name)
        others = [kind.one for kind in KINDS.values() if kind is not self and name in kind.names()]
        hint = f": it is {others[0]}" if others else nearest(name, self.names())
        raise UnknownName(f"no {self.singular} named '{name}'{hint}{_pyproject_hint(self.name, name)}")

    def _dotted(self, name: str) -> Entry:
        package = name.partition(".")[0]
        if package not in _imported:
            raise UnknownName(
                f"'{name}' is a dotted name: recipes build registered classes only; "
                f"`--import {package}` allows the classes of that package"
            )
        module, _, attribute = name.rpartition(".")
        return Entry(self.name, name, f"{module}:{attribute}", package)


modules = Kind("modules", "lightning.pytorch.LightningModule", ("lightning.LightningModule",))
datamodules = Kind("datamodules", "lightning.pytorch.LightningDataModule", ("lightning.LightningDataModule",))
networks = Kind("networks", "torch.nn.Module", ("torch.nn.Module", "lab.artifact.Teacher"))
objectives = Kind("objectives", "lab.objectives.Objective", ("lab.objectives.Objective",))
callbacks = Kind("callbacks", "lightning.pytorch.Callback", ("lightning.Callback",))
loggers = Kind("loggers", "lightning.pytorch.loggers.Logger", ("lightning.Logger",))
schedulers = Kind(
    "schedulers",
    "torch.optim.lr_scheduler.LRScheduler",
    ("lab.optimization.SchedulerFactory", "torch.LRScheduler", "lightning.LRSchedulerCallable"),
    factory=True,
    later=1,
)
optimizers = Kind(
    "optimizers",
    "torch.optim.Optimizer",
    ("lab.optimization.OptimizerFactory", "torch.Optimizer", "lightning.OptimizerCallable"),
    factory=True,
    later=1,
)
transforms = Kind("transforms", "", ("lab.transforms.Transform",))
environments = Kind(
    "environments",
    "lab.environments.Environment",
    ("lab.environments.EnvironmentFactory", "gymnasium.Env"),
    factory=True,
)

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        modules, datamodules, networks, objectives, callbacks,
        loggers, optimizers, schedulers, transforms, environments,
    )
}  # fmt: skip

_imported: set[str] = set()


def allow(package: str) -> None:
    """Import a package (what ``--import`` does): its decorators register, its classes go by dotted name.

    Looked for where Python looks, then in the working directory.

    Raises:
        BrokenPlugin: it does not import.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        importlib.import_module(package)
    except (Exception, SystemExit) as cause:  # a user's package may fail in any way
        raise BrokenPlugin(f"--import {package}: {type(cause).__name__}: {cause}") from cause
    _imported.add(package.partition(".")[0])


def nearest(name: str, names: Iterable[str], *, shown: int = 3) -> str:
    """`` (did you mean ...?)`` with the valid names closest to ``name``, else the names there are."""
    import difflib

    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=shown, cutoff=0.6)
    if close:
        return f" (did you mean {' or '.join(repr(n) for n in close)}?)"
    if not names:
        return " (there are none)"
    return f" (there are: {', '.join(names)})"


@cache
def _installed() -> dict[str, tuple[Entry, ...]]:
    """The entry points of every kind, from every distribution on ``sys.path``, each once.

    They are read as ``importlib.metadata`` reads them, whose own import would cost more than all else here.
    """
    found: dict[Entry, None] = {}
    projects: set[str] = set()  # the first distribution of a name hides the others
    for folder in dict.fromkeys(sys.path):
        try:
            infos = [info for info in os.listdir(folder or ".") if info.endswith((".dist-info", ".egg-info"))]  # noqa: PTH208
        except OSError:  # no folder, or no right to look into it
            continue
        for info in infos:
            project = info.rpartition(".")[0].partition("-")[0]
            if project.lower().replace(".", "_") not in projects:
                projects.add(project.lower().replace(".", "_"))
                found |= dict.fromkeys(_entry_points(Path(folder, info), project))
    return {kind: tuple(entry for entry in found if entry.kind == kind) for kind in KINDS}


def _entry_points(folder: Path, project: str) -> Iterator[Entry]:
    """The entries of one distribution, from ``entry_points.txt`` in the folder of its metadata."""
    group, package = "", ""
    for line in map(str.strip, _text(folder / "entry_points.txt").splitlines()):
        if line.startswith("["):
            group = line.strip("[]").strip()
        elif group.startswith("lab.") and "=" in line and line[0] not in "#;":
            name, _, value = (part.strip() for part in line.partition("="))
            package = package or _project_name(folder) or project
            yield Entry(group.removeprefix("lab."), name, value.partition("[")[0].strip(), package)


def _project_name(folder: Path) -> str:
    """A distribution's name as its author writes it."""
    for file in ("METADATA", "PKG-INFO"):
        for line in _text(folder / file).splitlines():
            if line.lower().startswith("name:"):
                return line[5:].strip()
    return ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _refuse_needed_name(kind: Kind, name: str, target: Callable[..., Any]) -> None:
    import inspect

    try:
        needed = inspect.signature(target).parameters.get("name")
    except (TypeError, ValueError):  # written in C, say
        return
    if needed is not None and needed.default is needed.empty:
        raise ValueError(
            f"{kind.singular} '{name}' ({target.__module__}.{target.__qualname__}) needs an argument 'name', which a "
            "recipe cannot give: there, `name` is the component's own; call the argument something else"
        )


def _home(target: Any) -> str:
    return f"module {target.__module__}"


def _claims(kind: str, name: str, entries: list[Entry]) -> str:
    claims = " and ".join(f"{e.package} ({e.target})" for e in entries)
    return f"{kind} '{name}' is claimed by {claims}: uninstall one of them, or rename"


def _install_hint(entry: Entry, cause: BaseException) -> str:
    """The line that installs what is missing, where an extra of the entry's package brings it."""
    import importlib.metadata

    if not isinstance(cause, ModuleNotFoundError) or not cause.name:
        return ""
    module = cause.name.partition(".")[0]
    try:
        requires = importlib.metadata.requires(entry.package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        requires = []
    needs = [line for line in requires if re.split(r"[^\w.-]", line)[0].replace("-", "_").lower() == module.lower()]
    named = [extra for line in requires for extra in re.findall(r"extra == ['\"]([\w.-]+)", line)]
    if extras := [extra for line in needs for extra in re.findall(r"extra == ['\"]([\w.-]+)", line)]:
        return f"; pip install '{entry.package}[{min(extras, key=named.count)}]'"  # not the one that has everything
    if not needs and entry.target.startswith((f"{module}.", f"{module}:")):
        return f"; files of {entry.package} are missing: install it again"
    return f"; pip install {module}"


def _pyproject_hint(kind: str, name: str) -> str:
    """A name that stands in a pyproject.toml here, but is not installed yet."""
    import tomllib

    for folder in (Path.cwd(), Path(__file__).parent.parent):
        try:
            text = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue
        if name in text.get("project", {}).get("entry-points", {}).get(f"lab.{kind}", {}):
            where = os.path.relpath(folder / "pyproject.toml")
            return f"; {where} has it, but it is not installed: run `pip install -e .` there"
    return ""
