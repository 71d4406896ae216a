"""Constructors, read from source text: what a recipe may say beside ``name:``, known before torch is imported.

A recipe's schema is the signature of the class that it names, but importing torch and lightning to see it takes
seconds. So the class is found in source text (:mod:`lab.source`), its bases are put in method resolution order
(``_mro``), and the constructor is the first ``__init__`` along it, a dataclass's generated one included
(``_constructor``). Where it hands ``**kwargs`` to ``super().__init__``, the next one's parameters are added, minus
those that the call itself binds.

Source text doesn't say everything, so what is reported is one-sided: an argument is unknown or required only where that
is certain; otherwise the signature is ``open`` (may take more), or not ``known`` at all, with the reason.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

from lab.source import (
    ALIAS_DEPTH,
    MISSING,
    NOWHERE,
    RUNS,
    TORCH_MODULE,
    TRANSPARENT,
    Binding,
    Definition,
    Function,
    Module,
    Unreadable,
    dotted_name,
    expression_of,
    find_module,
    literal_of,
    locate,
    lookup,
    read_module,
    unaliased,
)


class Reference(str):
    """The dotted name that a class attribute has in place of a literal (``consumes = Labelled``)."""

    __slots__ = ()


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor.

    Args:
        name: the keyword.
        annotation: source text; empty where there is none.
        default: source text; None where the argument is required, ``...`` where it isn't certain which default holds.
        literal: the default's value where it is a literal, else ``MISSING``.
        owner: ``package.module:Class`` whose constructor has it.
    """

    name: str
    annotation: str
    default: str | None
    literal: Any
    owner: str
    _find_names: Callable[[], Iterable[str]] = field(default=tuple, repr=False, compare=False)

    @property
    def required(self) -> bool:
        """A call without it fails."""
        return self.default is None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every dotted name in the annotation, as its module imports it, with those that type aliases stand for.

        Found when first asked for: aliases may lie in files that nothing else needs.
        """
        return tuple(dict.fromkeys(self._find_names()))


@dataclass(frozen=True)
class Signature:
    """What source text tells about a class or function.

    Args:
        target: ``package.module:Class``, as asked.
        parameters: what can be given by keyword, in order.
        open: other keywords may be accepted too.
        known: False where the constructor couldn't be read; ``parameters`` is then empty and says nothing.
        doc: its own docstring.
        attributes: class attributes that are literals or a ``Reference``, inherited ones included.
        bases: dotted names of the ancestors, nearest first, in the modules that define them.
        file: where it is defined.
        line: the line there.
        reason: why it isn't known.
        broken: importing it would fail: no such module, no such attribute, a syntax error.
        computed: what else the class or an ancestor binds, methods included, whose value only running it tells.
    """

    target: str
    parameters: dict[str, Parameter]
    open: bool
    known: bool
    doc: str
    attributes: dict[str, Any]
    bases: tuple[str, ...]
    file: str | None
    line: int | None
    reason: str = ""
    broken: bool = False
    computed: frozenset[str] = frozenset()


@cache
def read(target: str) -> Signature:
    """The signature of ``package.module:Class`` or ``:function``, without importing it; a bad one isn't ``known``."""
    module, _, path = target.partition(":")
    try:
        return _described(unaliased(lookup(read_module(module), path)), target)
    except Unreadable as why:
        return replace(_nothing(target), reason=str(why), broken=why.broken)
    except RecursionError:
        return replace(_nothing(target), reason=f"{target} is nested too deeply, or refers to itself")


def summary(target: str) -> tuple[str, str]:
    """The docstring of ``package.module:Class``, and why it cannot be read; its bases are left alone."""
    module, _, path = target.partition(":")
    try:
        found = unaliased(lookup(read_module(module), path))
    except (Unreadable, RecursionError) as why:
        return "", str(why)
    return _doc(found), ""


def inspected(obj: Any, target: str) -> Signature:
    """The same from a live class or function without a source file, a notebook's: what ``inspect`` can tell.

    Parameters that ``**kwargs`` may hand to a base are listed as optional.
    """
    classes = [cls for cls in inspect.getmro(obj) if cls is not object] if inspect.isclass(obj) else []
    values = {name: _live_value(value) for cls in reversed(classes) for name, value in vars(cls).items()}
    found = replace(
        _nothing(target),
        doc=inspect.cleandoc(obj.__doc__ or ""),
        attributes={k: v for k, v in values.items() if v is not MISSING and not k.startswith("__")},
        bases=tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in classes[1:]),
    )
    try:
        live = inspect.signature(obj).parameters.values()
    except (TypeError, ValueError) as why:
        return replace(found, reason=str(why))
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in live):
        return replace(found, reason="an argument can only be given by position")
    module = _live_module(obj)
    named = [p for p in live if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    parameters = {p.name: _live_parameter(p, module, target) for p in named}
    is_open = any(p.kind is p.VAR_KEYWORD for p in live)
    for base in [cls for cls in classes if "__init__" in vars(cls)][1:2] if is_open else []:
        readable = read(f"{base.__module__}:{base.__qualname__}")
        inherited = readable if readable.known else inspected(base, readable.target)
        parameters |= _loosened(_Arguments(inherited.parameters)).parameters | parameters
    return replace(found, parameters=parameters, open=is_open, known=True)


def canonical(name: str) -> str:
    """The dotted name in the module that defines it (``torch.nn.Module`` → ``torch.nn.modules.module.Module``).

    Two names mean the same class where their canonical names are equal. One that can't be followed is its own.
    """
    if name.partition(".")[0] in sys.stdlib_module_names:
        return name
    try:
        return unaliased(locate(name)).home
    except (Unreadable, RecursionError):
        return name


def forget() -> None:
    """Read every file anew from now on: what was read is otherwise kept as long as the process lives."""
    for cached in (read, find_module, read_module, _mro):
        cached.cache_clear()


# Decorators that leave a class or a constructor as it is written; so do those whose name says that they register.
_HARMLESS = {
    *("abstractmethod", "deprecated", "final", "override", "runtime_checkable", "total_ordering"),
    *("checked", "validate_call", "_defaults_from_env_vars"),  # pydantic's, Lightning's Trainer's
}

_Mro = tuple[Definition, ...]


@dataclass(frozen=True)
class _Arguments:
    """What a constructor takes by keyword; by position, in order; and whether there may be more."""

    parameters: dict[str, Parameter]
    positional: tuple[str, ...] = ()
    open: bool = False


def _nothing(target: str) -> Signature:
    return Signature(target, {}, True, False, "", {}, (), None, None)


def _described(found: Definition, target: str) -> Signature:
    """Everything about a class or function."""
    if found.node is None or isinstance(found.node, ast.expr):
        raise Unreadable(f"{found.home} is not a class or function whose source can be read")
    signature = replace(_nothing(target), doc=_doc(found), file=found.module.file, line=found.node.lineno)
    try:
        if isinstance(found.node, ast.ClassDef):
            mro = _mro(found)
            bases = tuple(cls.home for cls in mro[1:])
            bound = _attributes(mro)
            attributes = {name: value for name, value in bound.items() if value is not MISSING}
            computed = frozenset(name for name, value in bound.items() if value is MISSING)
            signature = replace(signature, attributes=attributes, computed=computed, bases=bases)
            arguments = _called(mro)
        else:
            arguments = _declared(found.node, found, skip=0)
    except Unreadable as why:
        return replace(signature, reason=str(why))
    return replace(signature, parameters=arguments.parameters, open=arguments.open, known=True)


def _doc(found: Definition) -> str:
    """The docstring; of one that is put together (``__doc__ = "..." + ...``) the first part."""
    if isinstance(found.node, ast.ClassDef | Function) and (doc := ast.get_docstring(found.node)):
        return doc
    put_together = found.body.get("__doc__") or found.module.names.get(f"{found.name}.__doc__")
    node: object = put_together[0].value if put_together else None
    while isinstance(node, ast.BinOp | ast.JoinedStr):
        node = node.left if isinstance(node, ast.BinOp) else node.values[0]
    doc = literal_of(node)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


@cache
def _mro(cls: Definition) -> _Mro:
    """A class and its ancestors in method resolution order (C3), as far as they can be read; without ``object``."""
    if not isinstance(cls.node, ast.ClassDef):
        return (cls,)
    bases = [base for node in cls.node.bases if (base := _base(cls, node)).home != "object"]
    order, sequences = [cls], [*(list(_mro(base)) for base in bases), bases]
    while sequences := [sequence for sequence in sequences if sequence]:
        heads = [sequence[0] for sequence in sequences]
        chosen = next((head for head in heads if not any(head in rest[1:] for rest in sequences)), heads[0])
        order.append(chosen)
        sequences = [[each for each in sequence if each != chosen] for sequence in sequences]
    return tuple(order)


def _base(cls: Definition, node: ast.expr) -> Definition:
    """The class that an expression among the bases names."""
    dotted = dotted_name(node.value if isinstance(node, ast.Subscript) else node)
    if not dotted:
        return Definition(NOWHERE, ast.unparse(node))
    try:
        found = unaliased(lookup(cls.module, dotted))
    except Unreadable:
        found = cls
    return found if found != cls else Definition(NOWHERE, cls.module.meanings(dotted)[0])


def _called(mro: _Mro) -> _Arguments:
    """What calling a class takes: a metaclass decides, then ``__new__``, if it names arguments, then ``__init__``."""
    for cls in mro:
        for keyword in cls.node.keywords if isinstance(cls.node, ast.ClassDef) else ():
            if keyword.arg in ("metaclass", None) and _base(cls, keyword.value).home not in TRANSPARENT:
                raise Unreadable(f"the metaclass of {cls.home} may change its constructor")
    maker = next((cls for cls in mro if "__new__" in cls.body), None)
    if maker is None:
        arguments = _constructor(mro)
    else:
        arguments = _declared(maker.method("__new__"), maker, skip=1)
        if not arguments.parameters or not all(map(_harmless, maker.decorators)):
            raise Unreadable(f"{maker.home} has a __new__")
    return replace(arguments, open=arguments.open or any(cls.opaque for cls in mro))


def _constructor(mro: _Mro, start: int = 0) -> _Arguments:
    """What the first ``__init__`` from a place in the order takes."""
    for at, cls in enumerate(mro[start:], start):
        if cls.opaque:
            raise Unreadable(f"its base {cls.home} can't be read")
        if cls.home == TORCH_MODULE and cls.node is None:
            return _Arguments({}, open=any("call_super_init" in each.body for each in mro))
        options = _dataclass_options(cls)
        if "__init__" in cls.body:
            return _written(mro, at)
        if options is not None and options.get("init", True) is not False:
            return _generated(mro[at:])
        if isinstance(cls.node, ast.ClassDef) and len(cls.node.bases) > 1 and any(each.opaque for each in mro):
            raise Unreadable(f"not all bases of {cls.home} can be read")
    return _Arguments({})


def _declared(function: Function, home: Definition, skip: int) -> _Arguments:
    """The parameters as written, without the first ``skip`` (``self``)."""
    a = function.args
    by_place = [*a.posonlyargs, *a.args]
    defaults = [*[None] * (len(by_place) - len(a.defaults)), *a.defaults]
    pairs = [*zip(by_place, defaults, strict=True)][skip:]
    only_by_place = len(a.posonlyargs) - skip if len(a.posonlyargs) > skip else 0
    if any(default is None for _, default in pairs[:only_by_place]):
        raise Unreadable(f"an argument of {function.name} can only be given by position")
    if len(by_place) < skip or (a.vararg and not (pairs or a.kwonlyargs or a.kwarg)):
        raise Unreadable(f"{function.name} takes *args only")
    named = [*pairs[only_by_place:], *zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    parameters = {arg.arg: _parameter(home, arg.arg, arg.annotation, default) for arg, default in named}
    found = _Arguments(parameters, tuple(arg.arg for arg, _ in pairs), open=a.kwarg is not None)
    return found if all(map(_harmless, function.decorator_list)) else _loosened(found)


def _parameter(home: Definition, name: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    module = home.module
    return Parameter(
        name,
        annotation=module.text(annotation) if annotation else "",
        default=module.text(default) if default else None,
        literal=literal_of(default),
        owner=f"{module.name}:{home.name}",
        _find_names=partial(_names, module, annotation) if annotation else tuple,
    )


def _harmless(decorator: ast.expr) -> bool:
    """The decorator leaves alone what it decorates."""
    name = _called_name(decorator).rpartition(".")[2]
    return name in _HARMLESS or name.startswith("register")


def _loosened(arguments: _Arguments) -> _Arguments:
    """The same where something else may give arguments, or take more."""
    optional = {name: replace(p, default="...", literal=MISSING) for name, p in arguments.parameters.items()}
    return _Arguments(optional, arguments.positional, open=True)


def _written(mro: _Mro, at: int) -> _Arguments:
    """What a written ``__init__`` takes, with what its ``**kwargs`` hand to the next one."""
    init = mro[at].method("__init__")
    own = _declared(init, mro[at], skip=1)
    call, exact = _passed_on(init, mro[at].name)
    exact = exact and all(map(_harmless, init.decorator_list))
    if call is None:
        return own
    try:
        base = _constructor(mro, at + 1)
    except Unreadable:
        return own
    rest = init.args.vararg.arg if init.args.vararg else None
    by_place = [each for each in call.args if not (isinstance(each, ast.Starred) and dotted_name(each.value) == rest)]
    exact = exact and len(by_place) <= len(base.positional) and not any(isinstance(e, ast.Starred) for e in by_place)
    bound = {*own.parameters, *base.positional[: len(by_place)], *(keyword.arg for keyword in call.keywords)}
    base = base if exact else _loosened(base)
    added = {name: p for name, p in base.parameters.items() if name not in bound}
    positional = [name for name in base.positional if name in added] if len(by_place) < len(call.args) else []
    return _Arguments({**own.parameters, **added}, (*own.positional, *positional), base.open)


def _passed_on(init: Function, name: str) -> tuple[ast.Call | None, bool]:
    """The call ``super().__init__(..., **kwargs)``, and whether all of ``kwargs``, unchanged, surely arrives there."""
    kwargs = init.args.kwarg.arg if init.args.kwarg else None
    rest = init.args.vararg.arg if init.args.vararg else None
    nodes = [node for statement in init.body for node in ast.walk(statement)] if kwargs else []
    calls = [node for node in nodes if isinstance(node, ast.Call) and _is_super_init(node.func, name)]
    passing = [call for call in calls if any(k.arg is None and dotted_name(k.value) == kwargs for k in call.keywords)]
    if not passing:
        return None, False
    call = passing[0]
    exact = (
        sum(isinstance(node, ast.Name) and node.id == kwargs for node in nodes) == 1
        and sum(keyword.arg is None for keyword in call.keywords) == 1
        and any(statement.value is call for statement in _straight(init.body))
        and not any(isinstance(node, ast.Return) and node.lineno < call.lineno for node in nodes)
        and not any(isinstance(node, ast.Name) and node.id == rest and type(node.ctx) is ast.Store for node in nodes)
    )
    return call, exact


def _straight(body: list[ast.stmt]) -> Iterator[ast.Expr]:
    """Expression statements that run whatever the arguments are."""
    for statement in body:
        if isinstance(statement, ast.Expr):
            yield statement
        elif isinstance(statement, ast.With | ast.Try):
            yield from _straight(statement.body)


def _is_super_init(function: ast.expr, name: str) -> bool:
    match function:
        case ast.Attribute(value=ast.Call(func=ast.Name("super"), args=args), attr="__init__"):
            return not args or dotted_name(args[0]) == name
    return False


def _dataclass_options(cls: Definition) -> dict[str, Any] | None:
    """What ``@dataclass`` says, if a class has it.

    Raises:
        Unreadable: another decorator may replace the constructor.
    """
    options = None
    for decorator in cls.decorators:
        if "dataclasses.dataclass" in cls.module.meanings(_called_name(decorator)):
            keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
            options = {keyword.arg or "**": literal_of(keyword.value) for keyword in keywords}
        elif not _harmless(decorator):
            raise Unreadable(f"{cls.home} is decorated with {ast.unparse(decorator)}")
    return options


def _generated(mro: _Mro) -> _Arguments:
    """The constructor that ``@dataclass`` makes from the fields of a class and its ancestors."""
    fields: dict[str, Parameter] = {}
    by_keyword: set[str] = set()
    for cls in reversed(mro):
        options = _dataclass_options(cls)
        if cls.opaque or (options and MISSING in options.values()):
            raise Unreadable(f"the fields of {cls.home} can't be read")
        if options is None or not isinstance(cls.node, ast.ClassDef):
            continue
        keywords_only = options.get("kw_only", False)
        for statement in cls.node.body:
            if isinstance(statement, ast.If | ast.Try | ast.With | ast.For):
                raise Unreadable(f"fields of {cls.home} depend on conditions")
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            kind = _kind(cls.module, statement.annotation)
            keywords_only = keywords_only or kind == "KW_ONLY"
            if kind in ("ClassVar", "KW_ONLY"):
                continue
            name, default, said = statement.target.id, statement.value, {}
            if isinstance(default, ast.Call) and "dataclasses.field" in cls.module.meanings(_called_name(default)):
                said = {keyword.arg: keyword.value for keyword in default.keywords}
                default = said.get("default", said.get("default_factory"))
            fields[name] = _parameter(cls, name, statement.annotation, default)
            given = literal_of(said["init"]) if "init" in said else True
            assigned_elsewhere = default is None and not said and any(name in each.body for each in mro)
            if given is MISSING or None in said or assigned_elsewhere:
                fields[name] = replace(fields[name], default="...", literal=MISSING)
            if given is False:
                del fields[name]
            if literal_of(said["kw_only"]) if "kw_only" in said else keywords_only:
                by_keyword.add(name)
    return _Arguments(fields, tuple(name for name in fields if name not in by_keyword))


def _attributes(mro: _Mro) -> dict[str, Any]:
    """What classes bind: literals, references, and MISSING for methods and whatever is computed; the nearest wins."""
    found: dict[str, Any] = {}
    for cls in reversed(mro):

        def refer(dotted: str, cls: Definition = cls) -> Any:
            return found.get(dotted, MISSING) if dotted in cls.body else Reference(cls.module.meanings(dotted)[0])

        for name, bindings in cls.body.items():
            value = bindings[0].value
            found[name] = literal_of(value, refer) if isinstance(value, ast.expr) and len(bindings) == 1 else MISSING
    return {name: value for name, value in found.items() if not name.startswith("__")}


def _called_name(node: ast.expr) -> str:
    return dotted_name(node.func if isinstance(node, ast.Call) else node)


def _kind(module: Module, annotation: ast.expr) -> str:
    """The last part of an annotation's outermost name: ``ClassVar`` of ``typing.ClassVar[int]``."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = expression_of(annotation.value) or annotation
    head = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return module.meanings(dotted_name(head))[0].rpartition(".")[2]


def _names(module: Module, node: ast.AST, depth: int = 0) -> Iterator[str]:
    """The dotted names in an annotation, each followed by those of the type alias that it is."""
    match node:
        case ast.Constant(value=None):
            yield "None"
        case ast.Constant(value=str() as text):
            if inner := expression_of(text):
                yield from _names(module, inner, depth)
        case ast.Name() | ast.Attribute() if dotted := dotted_name(node):
            for meaning in module.meanings(dotted):
                yield meaning
                yield from _names_of_alias(meaning, depth)
        case ast.Subscript(value=head, slice=inside):
            yield from _names(module, head, depth)
            kind = _kind(module, head)
            for at, part in enumerate(inside.elts if isinstance(inside, ast.Tuple) else [inside]):
                is_value = kind == "Literal" or (kind == "Annotated" and at and isinstance(part, ast.Constant))
                is_argument = kind == "Callable" and not at  # what a factory is given is nothing that it is made of
                if not is_value and not is_argument:
                    yield from _names(module, part, depth)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _names(module, child, depth)


def _names_of_alias(dotted: str, depth: int) -> Iterator[str]:
    if depth == ALIAS_DEPTH or dotted.partition(".")[0] in sys.stdlib_module_names:
        return
    try:
        found = locate(dotted)
    except (Unreadable, RecursionError):
        return
    if isinstance(found.node, ast.expr):
        yield from _names(found.module, found.node, depth + 1)


def _live_value(value: Any) -> Any:
    """A plain value itself; a class or module as a reference."""
    if inspect.isclass(value):
        return Reference(f"{value.__module__}.{value.__qualname__}")
    if inspect.ismodule(value):
        return Reference(value.__name__)
    return value if isinstance(value, type(None) | bool | int | float | str | tuple | list | dict) else MISSING


def _live_module(obj: Any) -> Module:
    """What the names in annotations mean where a live object was defined."""
    values = {name: _live_value(value) for name, value in vars(sys.modules.get(obj.__module__, builtins)).items()}
    names = {name: [Binding(value, RUNS)] for name, value in values.items() if isinstance(value, Reference)}
    return Module(obj.__module__, None, "", names)


def _live_parameter(parameter: inspect.Parameter, module: Module, owner: str) -> Parameter:
    annotation = "" if parameter.annotation is parameter.empty else parameter.annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    default = None if parameter.default is parameter.empty else repr(parameter.default)
    literal = MISSING if default is None else literal_of(expression_of(default))
    node = expression_of(text)
    return Parameter(parameter.name, text, default, literal, owner, partial(_names, module, node) if node else tuple)
