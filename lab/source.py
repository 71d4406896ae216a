"""Names in source text, followed through imports to where they are defined, while nothing is imported.

A module's file is found as the import system would find it, but no package's ``__init__`` runs; it is parsed, and what
each of its top-level names stands for is noted (:class:`Module`). :func:`locate` follows a dotted name from file to
file.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""In place of a value: there is none, or it is no literal."""


# How a name is bound: by statements that run, by `except` handlers where those fail, or for type checkers only.
RUNS, HANDLER, TYPING = range(3)

# Known without reading: they take no arguments and leave the constructor alone, and `typing` is a large file.
TRANSPARENT = {"abc.ABC", "abc.ABCMeta", "type", "typing.Generic", "typing.Protocol", "typing_extensions.Protocol"}
# Known too, and a larger file: it takes no arguments, unless `call_super_init` is set.
TORCH_MODULE = "torch.nn.modules.module.Module"

# A file with one of these may have names that aren't written in it.
_DYNAMIC = ("__getattr__", "__path__", "globals(", "setattr(", "sys.modules", "exec(", "import *")

ALIAS_DEPTH = 4
_UNCLEAR: Final = ast.Constant(...)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = ast.ClassDef | Function | ast.expr


class Unreadable(Exception):
    """Source text doesn't tell."""

    broken = False


class Absent(Unreadable):
    """Importing would fail."""

    broken = True


@dataclass(frozen=True)
class Binding:
    """One meaning of a name: the dotted name that it imports, or the node that defines it."""

    value: str | Node
    how: int


@dataclass(frozen=True, eq=False)
class Module:
    """One source file: what each of its top-level names stands for; under ``*`` the modules imported with a star."""

    name: str
    file: str | None
    source: str
    names: dict[str, list[Binding]]

    @cached_property
    def lines(self) -> list[str]:
        """The source text by lines."""
        return self.source.split("\n")

    def text(self, node: ast.expr) -> str:
        """The source text of an expression: as written, if on one line."""
        if node.lineno != node.end_lineno:
            return ast.unparse(node)
        return self.lines[node.lineno - 1].encode()[node.col_offset : node.end_col_offset].decode()

    def meanings(self, dotted: str) -> list[str]:
        """What a dotted name in this file stands for, one hop through its imports; several where branches differ."""
        first, dot, rest = dotted.partition(".")
        bindings = sorted(self.names.get(first, ()), key=lambda binding: binding.how)
        heads = [b.value if isinstance(b.value, str) else f"{self.name}.{first}" for b in bindings]
        if not heads and (source := self.star(first)):
            heads = [f"{source}.{first}"]
        return list(dict.fromkeys(head + dot + rest for head in heads or [first]))

    def star(self, name: str, seen: tuple[str, ...] = ()) -> str | None:
        """The module whose star import brings a name."""
        for source in [str(binding.value) for binding in reversed(self.names.get("*", ()))]:
            try:
                module = read_module(source)
            except Unreadable:
                continue
            listed = literal_of(module.names["__all__"][-1].value) if "__all__" in module.names else None
            if not isinstance(listed, list | tuple):
                inside = name in module.names or (source not in seen and module.star(name, (*seen, source)))
                listed = [name] if inside and not name.startswith("_") else []
            if name in listed:
                return source
        return None


NOWHERE: Final = Module("", None, "", {})


@dataclass(frozen=True)
class Definition:
    """A name followed to where it is defined; ``NOWHERE``, and no node, where its dotted name is all that is known."""

    module: Module
    name: str
    node: Node | None = None

    @property
    def home(self) -> str:
        """Its dotted name in the module that defines it."""
        return f"{self.module.name}.{self.name}".lstrip(".")

    @property
    def opaque(self) -> bool:
        """A class that may do anything."""
        return not isinstance(self.node, ast.ClassDef) and self.home not in {*TRANSPARENT, TORCH_MODULE}

    @cached_property
    def body(self) -> dict[str, list[Binding]]:
        """What a class binds when it runs."""
        every = bindings_of(self.node.body, "") if isinstance(self.node, ast.ClassDef) else {}
        return {name: kept for name, bound in every.items() if (kept := [b for b in bound if b.how != TYPING])}

    @property
    def decorators(self) -> list[ast.expr]:
        """What decorates it."""
        return self.node.decorator_list if isinstance(self.node, ast.ClassDef) else []

    def method(self, name: str) -> Function:
        """A method of a class."""
        first, *others = [binding.value for binding in self.body[name]]
        if others or not isinstance(first, Function):
            raise Unreadable(f"{name} of {self.home} is not a plain function")
        return first


@cache
def find_module(name: str) -> tuple[str | None, list[str]] | None:
    """File and folders of a module, found without running the packages above it; None if there is no such module."""
    parent, _, tail = name.rpartition(".")
    within = (find_module(parent) or (None, []))[1] if parent else None
    try:
        specs = (finder.find_spec(name, within) for finder in sys.meta_path)
        spec = next(filter(None, specs), None)
        return (spec.origin, list(spec.submodule_search_locations or ())) if spec else None
    except KeyError:  # a namespace package looks for the one around it among the imported modules
        folders = [Path(folder, tail) for folder in within or ()]
        return None, [str(folder) for folder in folders if folder.is_dir()]
    except (ImportError, ValueError, AttributeError):
        return None


@cache
def read_module(name: str) -> Module:
    """A module's file, parsed."""
    spec = find_module(name)
    if spec is None:
        made = name in sys.modules or is_dynamic(name.rpartition(".")[0])
        raise (Unreadable if made else Absent)(f"no module named '{name}'")
    file, folders = spec
    if file is None and folders:
        return Module(name, None, "", {})  # a namespace package
    if file is None or not file.endswith(".py"):
        raise Unreadable(f"{name} is not written in Python")
    try:
        source = importlib.util.decode_source(Path(file).read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError as why:
        raise Absent(f"syntax error in {file}:{why.lineno}: {why.msg}") from why
    except ValueError as why:
        raise Absent(f"{file} is not Python source: {why}") from why
    except OSError as why:
        raise Unreadable(f"{file} can't be read: {why.strerror}") from why
    return Module(name, file, source, bindings_of(tree.body, name if folders else name.rpartition(".")[0]))


def is_dynamic(name: str) -> bool:
    """What isn't written in a module may exist all the same."""
    try:
        return bool(name) and any(word in read_module(name).source for word in _DYNAMIC)
    except Unreadable as why:
        return not why.broken


def bindings_of(body: list[ast.stmt], package: str) -> dict[str, list[Binding]]:
    """What the statements of a file or a class bind; a name has several meanings where branches differ."""
    names: dict[str, list[Binding]] = {}

    def bind(statements: Iterable[ast.stmt], how: int, certain: bool) -> None:
        for statement in statements:
            for name, value in _bound(statement, package):
                earlier = names.get(name, [])
                kept = [each for each in earlier if each.how > how] if certain and name != "*" else earlier
                names[name] = [*kept, Binding(value, how)]
            match statement:
                case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                    bind(statement.body, TYPING, False)
                    bind(statement.orelse, how, certain)
                case ast.If() | ast.For() | ast.While():
                    bind([*statement.body, *statement.orelse], how, False)
                case ast.Try():
                    bind([*statement.body, *statement.orelse, *statement.finalbody], how, certain)
                    bind([each for handler in statement.handlers for each in handler.body], max(how, HANDLER), False)
                case ast.With():
                    bind(statement.body, how, certain)
                case ast.Match():
                    bind([each for branch in statement.cases for each in branch.body], how, False)

    bind(body, RUNS, True)
    return names


def _bound(statement: ast.stmt, package: str) -> Iterator[tuple[str, str | Node]]:
    """What one statement binds, without those inside it."""
    match statement:
        case ast.Import(names=names):
            for alias in names:
                top = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        case ast.ImportFrom(names=names, module=module, level=level):
            above = package.rsplit(".", level - 1)[0] if level else ""
            source = ".".join(filter(None, (above, module)))
            for alias in names:
                yield ("*", source) if alias.name == "*" else (alias.asname or alias.name, f"{source}.{alias.name}")
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield statement.name, statement  # of overloads the last, which is the implementation
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _assigned(target, value)
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield from _assigned(target, value)
        case ast.AugAssign(target=target):
            yield from _assigned(target, _UNCLEAR)
        case _ if type(statement).__name__ == "TypeAlias":  # from Python 3.12 on
            yield statement.name.id, statement.value  # type: ignore[attr-defined]


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    match target:
        case ast.Name(id=name):
            yield name, value
        case ast.Attribute(value=ast.Name(id=name), attr="__init__" | "__new__" | "__signature__"):
            yield name, _UNCLEAR  # a class whose constructor is replaced
        case ast.Attribute(value=ast.Name(id=name), attr="__doc__"):
            yield f"{name}.__doc__", value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            for part in parts:
                yield from _assigned(part, _UNCLEAR)


def locate(dotted: str) -> Definition:
    """Follow a dotted name, as an import says it, to its definition."""
    if dotted in {*TRANSPARENT, TORCH_MODULE}:
        return Definition(NOWHERE, dotted)
    parts = dotted.split(".")
    size = 1
    while size < len(parts) - 1 and find_module(".".join(parts[: size + 1])):
        size += 1
    if size == len(parts):
        raise Unreadable(f"{dotted} is not a class or function")
    return lookup(read_module(".".join(parts[:size])), ".".join(parts[size:]))


def lookup(module: Module, path: str) -> Definition:
    """Follow a dotted name, as a module's text says it, to its definition.

    Raises:
        RecursionError: imports go round in a circle.
    """
    first, dot, inner = path.partition(".")
    absent = Absent(f"no attribute '{first}' in {module.name}")
    for how in (RUNS, HANDLER, TYPING):
        found: list[Definition] = []
        for value in [binding.value for binding in module.names.get(first, ()) if binding.how == how]:
            if not isinstance(value, str):
                found.append(Definition(module, path, None if inner else value))
                continue
            try:
                found.append(locate(value + dot + inner))
            except Absent as why:
                absent = why
        if any(other != found[0] for other in found):
            raise Unreadable(f"{module.name} defines '{first}' in more than one way")
        if found:
            return found[0]
    if first not in module.names:
        if source := module.star(first):
            return locate(f"{source}.{path}")
        if first in vars(builtins):
            return Definition(NOWHERE, path)
        if is_dynamic(module.name):
            raise Unreadable(f"'{first}' is not written in {module.name}")
    raise absent


def unaliased(found: Definition) -> Definition:
    """What a plain assignment (``A = B``) is another name for."""
    for _ in range(ALIAS_DEPTH):
        dotted = dotted_name(found.node)
        if dotted:
            found = lookup(found.module, dotted)
    return found


def dotted_name(node: object) -> str:
    """``a.b.c`` as text; empty for anything else."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name) if above := dotted_name(value):
            return f"{above}.{name}"
    return ""


def expression_of(text: str) -> ast.expr | None:
    """The expression that a text is, as in a forward reference; None where it is none."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return None


def literal_of(node: object, refer: Callable[[str], Any] = lambda dotted: MISSING) -> Any:
    """The value of a literal, ``MISSING`` for anything else; names go through ``refer``."""
    match node:
        case ast.Constant(value=value) if value is not ...:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            parts = [literal_of(element, refer) for element in elements]
            if not any(part is MISSING for part in parts):
                return tuple(parts) if isinstance(node, ast.Tuple) else parts
        case ast.Dict(keys=keys, values=values):
            parts = [literal_of(each, refer) for each in (*keys, *values)]
            if not any(part is MISSING for part in parts) and all(isinstance(key, ast.Constant) for key in keys):
                return dict(zip(parts[: len(keys)], parts[len(keys) :], strict=True))
        case ast.Name() | ast.Attribute():
            return refer(dotted) if (dotted := dotted_name(node)) else MISSING
    return MISSING
