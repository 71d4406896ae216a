"""YAML text to nodes that know their place, and plain data back to YAML.

PyYAML's (C) parser gives the events; this module composes them under the YAML 1.2 core schema, where ``1e-3`` is a
number and ``yes`` a word, and refuses what a recipe never needs: duplicate keys, tags, files over 1 MB, over 64
levels, aliases that explode. No object is ever constructed but mappings, lists, text, numbers, booleans and null.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lab.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_BITS = 64
ONE_LINE = 110
"""How long a leaf may be to stand on one line when data are written."""

Scalar: TypeAlias = str | int | float | bool | None
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Place:
    """Where something was said: a file's line and column, from 1, or another source such as the command line."""

    source: str
    line: int = 0
    column: int = 0
    is_file: bool = False

    def __str__(self) -> str:
        source = _shorter(self.source) if self.is_file else self.source
        return f"{source}:{self.line}:{self.column}" if self.line else source

    @property
    def folder(self) -> Path:
        """What a relative path said here is relative to: the file's folder, elsewhere the working directory."""
        return Path(self.source).parent if self.is_file else Path.cwd()


@dataclass(frozen=True)
class Node:
    """A value with its place, and the place of its key where it has one."""

    value: Scalar | dict[str, Node] | list[Node]
    place: Place
    key: Place | None = None

    @property
    def mapping(self) -> dict[str, Node]:
        """The children of a mapping; empty for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        """The children of a list; empty for anything else."""
        return self.value if isinstance(self.value, list) else []

    def plain(self) -> Any:
        """The value as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    @classmethod
    def of(cls, data: Any, place: Place, depth: int = 0) -> Node:
        """Plain data as nodes that all have one place.

        Raises:
            RecipeError: the data has something that YAML's core schema has not, or is too deep.
        """
        if depth > MAX_DEPTH:
            raise RecipeError([Problem(place, "", f"more than {MAX_DEPTH} levels deep")])
        if isinstance(data, Mapping):
            return cls({str(key): cls.of(child, place, depth + 1) for key, child in data.items()}, place)
        if isinstance(data, int) and data.bit_length() >= MAX_BITS:
            raise RecipeError([Problem(place, "", f"a whole number of more than {MAX_BITS} bits")])
        if isinstance(data, str | int | float | bool | None):
            return cls(data, place)
        if isinstance(data, os.PathLike):
            return cls(str(data), place)
        if isinstance(data, Sequence) and not isinstance(data, bytes | bytearray):
            return cls([cls.of(child, place, depth + 1) for child in data], place)
        raise RecipeError(
            [Problem(place, "", f"a recipe holds mappings, lists and scalars, not {type(data).__name__}")]
        )


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, at which key, and what."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        text = f"{self.place}: {self.key + ': ' if self.key else ''}{self.message}"
        return text.replace("\n", "\\n")  # a line a problem, whatever the recipe's names are

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        source = _shorter(self.place.source) if self.place.is_file else self.place.source
        position = {"line": self.place.line, "column": self.place.column}
        return {"source": source, **position, "key": self.key, "message": self.message}


class RecipeError(UserError, ValueError):
    """A recipe that cannot be run; ``problems`` has every one of its faults."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def read(path: Path) -> Node:
    """The nodes of a YAML file.

    Raises:
        RecipeError: it is missing, empty, no file, no text, no YAML, too large or too deep, with its place.
    """
    place = Place(str(path), is_file=True)
    content = b""
    try:
        if not path.is_file():
            raise _error(place, _instead_of_file(path))
        if (size := path.stat().st_size) > MAX_BYTES:
            raise _error(place, f"{size:,} bytes are more than a recipe's {MAX_BYTES:,}")
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as cause:
        raise _error(place, f"cannot be read: {cause.strerror}") from cause
    except UnicodeDecodeError as cause:
        line = Place(str(path), content.count(b"\n", 0, cause.start) + 1, 1, is_file=True)
        raise _error(line, f"is no UTF-8 text (byte {cause.start})") from cause
    return parse(text, place)


def parse(text: str, place: Place) -> Node:
    """The nodes of a YAML text that came from ``place``.

    Raises:
        RecipeError: it is no YAML, or not of the kind that a recipe is.
    """
    try:
        return _Composer(place).compose(text)
    except yaml.MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        where = _at(place, mark) if mark else place
        problem = cause.problem or str(cause)
        if "nesting depth" in problem:  # newer versions of libyaml count too, while they look ahead
            raise _error(where, f"more than {MAX_DEPTH} levels deep") from cause
        hint = ": YAML forbids tabs for indentation, use spaces" if _tab_at(text, mark) else ""
        raise _error(where, f"not YAML: {problem}{hint}") from cause
    except UnicodeEncodeError as cause:  # half a character, from a command line that was no UTF-8
        raise _error(place, f"is no UTF-8 text (character {cause.start + 1})") from cause
    except yaml.YAMLError as cause:  # a character that YAML forbids
        position = getattr(cause, "position", None)
        where = _position(place, text, position) if isinstance(position, int) else place
        raise _error(where, f"not YAML: {getattr(cause, 'reason', str(cause))}") from cause


def dump(data: Any) -> str:
    """Plain data as YAML that :func:`parse` reads back equal: block mappings, short leaves on one line."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=ONE_LINE, allow_unicode=True)
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    """A character that a terminal or editor would obey, such as one that turns text around, in a quoted scalar."""
    return f"\\U{ord(character):08x}" if ord(character) > 0xFFFF else f"\\u{ord(character):04x}"


class _Composer:
    """Builds nodes from the parser's events with a stack of its own, so that depth costs no recursion."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.anchors: dict[str, tuple[Node, int, int]] = {}  # name -> node, how many nodes it has, how deep it goes
        self.nodes = 0

    def compose(self, text: str) -> Node:
        root: Node | None = None
        stack: list[_Open] = []
        loader = _PARSER(text)
        try:
            while loader.check_event():
                event = loader.get_event()
                if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                    raise _error(_at(self.place, event.start_mark), "a second document: a recipe is one")
                finished = self._finished(event, stack)
                if finished is None:
                    continue
                if stack:
                    stack[-1].add(finished)
                else:
                    root = finished.node
        finally:
            loader.dispose()
        if root is None or root.value is None:
            raise _error(self.place, "is empty")
        return root

    def _finished(self, event: yaml.Event, stack: list[_Open]) -> _Finished | None:
        """The node that this event completes, if it does."""
        where = _at(self.place, event.start_mark)
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._refuse_tag(event.tag, where)
            if len(stack) >= MAX_DEPTH:
                raise _error(where, f"more than {MAX_DEPTH} levels deep")
            kind = _OpenMapping if isinstance(event, yaml.MappingStartEvent) else _OpenList
            stack.append(kind(where, event.anchor))
            return None
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            closed = stack.pop()
            return self._count(_Finished(closed.node(), closed.size, closed.depth), closed.anchor)
        if isinstance(event, yaml.ScalarEvent):
            self._refuse_tag(event.tag, where)
            plain = event.implicit[0] and event.style in (None, "")
            value = _resolve(event.value, where) if plain else event.value
            return self._count(_Finished(Node(value, where), 1, 0, event.value), event.anchor)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise _error(where, f"the alias *{event.anchor} names no finished anchor")
            node, size, depth = self.anchors[event.anchor]
            if len(stack) + depth > MAX_DEPTH:
                raise _error(where, f"more than {MAX_DEPTH} levels deep")
            text = node.value if isinstance(node.value, str) else None
            return self._count(_Finished(node, size, depth, text), None)
        return None

    def _count(self, finished: _Finished, anchor: str | None) -> _Finished:
        self.nodes = max(self.nodes + 1, finished.size)
        if self.nodes > MAX_NODES or finished.size > MAX_NODES:
            raise _error(finished.node.place, f"more than {MAX_NODES:,} values: aliases that explode?")
        if anchor is not None:
            self.anchors[anchor] = (finished.node, finished.size, finished.depth)
        return finished

    @staticmethod
    def _refuse_tag(tag: str | None, where: Place) -> None:
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise _error(where, f"the tag {shown} is not allowed: a recipe is plain data")


@dataclass(frozen=True)
class _Finished:
    node: Node
    size: int
    depth: int
    text: str | None = None  # a scalar as written: what a key is


class _Open(ABC):
    """A mapping or list whose end has not been read."""

    def __init__(self, place: Place, anchor: str | None) -> None:
        self.place, self.anchor = place, anchor
        self.size, self.depth = 1, 0

    def add(self, child: _Finished) -> None:
        self.size += child.size
        self.depth = max(self.depth, child.depth + 1)
        if self.size > MAX_NODES:
            raise _error(child.node.place, f"more than {MAX_NODES:,} values: aliases that explode?")

    @abstractmethod
    def node(self) -> Node: ...


class _OpenList(_Open):
    def __init__(self, place: Place, anchor: str | None) -> None:
        super().__init__(place, anchor)
        self.children: list[Node] = []

    def add(self, child: _Finished) -> None:
        super().add(child)
        self.children.append(child.node)

    def node(self) -> Node:
        return Node(self.children, self.place)


class _OpenMapping(_Open):
    def __init__(self, place: Place, anchor: str | None) -> None:
        super().__init__(place, anchor)
        self.children: dict[str, Node] = {}
        self.key: tuple[str, Place] | None = None

    def add(self, child: _Finished) -> None:
        super().add(child)
        if self.key is not None:
            text, place = self.key
            self.children[text] = Node(child.node.value, child.node.place, place)
            self.key = None
            return
        where = child.node.place
        if not child.text:
            raise _error(where, "a key must be text")
        if child.text == "<<":
            raise _error(where, "merge keys (<<) are not YAML 1.2: use `extends`, or say it once at the top level")
        if child.text in self.children:
            first = self.children[child.text].key
            line = f", first in line {first.line}" if first and first.line else ""
            raise _error(where, f"the key stands twice in one mapping{line}", child.text)
        self.key = (child.text, where)

    def node(self) -> Node:
        return Node(self.children, self.place)


_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Scalar] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


def _resolve(text: str, place: Place) -> Scalar:
    """A plain scalar under YAML 1.2's core schema (section 10.3.2 of the specification)."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        try:
            number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        except ValueError:  # more digits than Python converts
            number = 1 << MAX_BITS
        if number.bit_length() >= MAX_BITS:
            raise _error(place, f"a whole number of more than {MAX_BITS} bits")
        return number
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_scalar(self, tag: str, value: str, style: str | None = None) -> yaml.ScalarNode:
        if not value.replace("\n", "").isprintable():  # also what YAML 1.1 takes for the end of a line
            style = '"'
        return super().represent_scalar(tag, value, style)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, _is_short(mapping.values(), repr(mapping)))

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, _is_short(sequence, repr(sequence)))


_Dumper.add_implicit_resolver("tag:lab,2026:int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:lab,2026:float", _FLOAT, list("-+.0123456789"))


def _is_short(children: Iterable[Any], text: str) -> bool:
    nested = [child for child in children if isinstance(child, dict | list)]
    return len(text) <= ONE_LINE - 20 and all(_is_short(c.values() if isinstance(c, dict) else c, "") for c in nested)


def _instead_of_file(path: Path) -> str:
    """What a path is that is no file."""
    if path.is_dir():
        return "is a folder, not a file"
    if path.exists():
        return "is no file but a pipe or a device"
    return "is a link that leads nowhere" if path.is_symlink() else "no such file"


def _error(place: Place, message: str, key: str = "") -> RecipeError:
    return RecipeError([Problem(place, key, message)])


def _at(place: Place, mark: Any) -> Place:
    """A parser's mark as a place; texts from elsewhere than a file have only their source."""
    return Place(place.source, mark.line + 1, mark.column + 1, True) if place.is_file else place


def _position(place: Place, text: str, position: int) -> Place:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return Place(place.source, line, column, True) if place.is_file else place


def _tab_at(text: str, mark: Any) -> bool:
    lines = text.split("\n")
    return mark is not None and mark.line < len(lines) and lines[mark.line].lstrip(" ").startswith("\t")


def _shorter(path: str) -> str:
    """A path as a user in the working directory would type it."""
    try:
        relative = os.path.relpath(path)
    except ValueError:
        return path
    return relative if len(relative) < len(path) else path
