"""A recipe: YAML files, merged, with overrides, as stages.

``extends``, stages and overrides are all the same merge: mappings merge, lists are replaced, a changed ``name`` drops
the old component's arguments, a bare name is a component without arguments, and the later one wins. ``null`` is None;
a callback or stage that is ``null`` is removed. A global batch that is a number is its ``size`` alone. What the names
mean is not looked at here (:mod:`lab.plan` does that).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import document
from lab.document import Node, Place, Problem, RecipeError
from lab.registry import nearest

INHERITED = ("seed", "data", "module", "trainer", "callbacks", "logger", "global_batch_size")
"""The keys that a stage takes over from the top level."""
TOP = ("description", "extends", *INHERITED, "stages", "require", "sweep")
"""The keys at the top of a recipe."""
STAGE = (*INHERITED, "require")
"""The keys of a stage."""
GLOBAL_BATCH = "global_batch_size"
"""The key of which a number is the ``size`` alone."""
RESERVED = ("name", "from")
"""The words that no constructor argument may be called."""
ONLY_STAGE = "main"
"""What the one stage of a recipe without ``stages`` is called."""
SHOWN = 80
"""How many characters of a value an error shows."""
NULL = ("", "~", "null", "Null", "NULL")
"""What an override says for null."""

_STAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Recipe:
    """A merged recipe.

    Args:
        name: the file's stem; names the folder of its runs.
        top: the merged top level, without what stages inherit where there are stages.
        stages: each stage, whole: what it inherits, what it says, and the overrides.
        order: the stages in dependency order.
        problems: unknown keys and wrong wiring; :func:`lab.check.check` refuses a recipe that has any, together with
            its own.
    """

    name: str
    top: Node
    stages: dict[str, Node]
    order: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def description(self) -> str:
        """The recipe's ``description``, or nothing."""
        node = self.top.mapping.get("description")
        return node.value if node is not None and isinstance(node.value, str) else ""


def load(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = (), *, name: str | None = None
) -> Recipe:
    """The recipe of a file, of a bundled recipe's name, or of a mapping.

    Args:
        overrides: ``path=value`` each, as on the command line.
        name: instead of the file's stem.

    Raises:
        RecipeError: it cannot be read. Unknown keys and wrong wiring are the recipe's ``problems``.
    """
    if isinstance(source, Mapping):
        root, name = _extended(Node.of(source, Place("recipe")), Path("recipe"), (), {}), name or "recipe"
    else:
        path = find(source)
        root, name = _extended(document.read(path), path, (), {}), name or _name_of(path)
    _require_mapping(root)
    return _assemble(root, [_override(text) for text in overrides], name)


def find(source: str | os.PathLike[str]) -> Path:
    """The file of a recipe: a path, or the name of one of the bundled recipes.

    Raises:
        RecipeError: there is none, with the nearest bundled name.
    """
    path = Path(source)
    if os.path.exists(path) or path.suffix in (".yaml", ".yml") or len(path.parts) != 1:  # noqa: PTH110  # never raises
        return path
    known = bundled()
    if str(source) in known:
        return known[str(source)]
    hint = nearest(str(source), known)
    raise RecipeError([Problem(Place(str(source)), "", f"no such file, and no bundled recipe of that name{hint}")])


def bundled() -> dict[str, Path]:
    """The recipes that come with lab, by name: inside the installed package, beside it in a checkout."""
    package = Path(__file__).parent
    folder = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def names(said: str) -> bool:
    """Whether a command's argument means a recipe, a file or a bundled one, and not a run."""
    return said.endswith((".yaml", ".yml")) or os.path.isfile(said) or said in bundled()  # noqa: PTH113  # never raises


def merge(base: Node, over: Node) -> Node:
    """``over`` on top of ``base``, by the one rule that all merging follows."""
    if not isinstance(over.value, dict):
        return over
    if isinstance(base.value, str) and not _is_component(over):
        base = Node({"name": base}, base.place, base.key)
    if not isinstance(base.value, dict) or _replaces(base, over):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, over.place, over.key or base.key)


def references(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Every ``{from: ...}`` below a node, with its path."""
    if "from" in node.mapping:
        yield path, node
        return
    children = node.mapping.items() if node.mapping else ((str(i), child) for i, child in enumerate(node.items))
    for key, child in children:
        yield from references(child, (*path, key))


def _is_component(node: Node) -> bool:
    return "name" in node.mapping or "from" in node.mapping


def _replaces(base: Node, over: Node) -> bool:
    """Whether ``over`` names another component, so that ``base``'s arguments mean nothing to it."""
    for word in RESERVED:
        if word in over.mapping:
            other = next(w for w in RESERVED if w != word)
            same = word in base.mapping and base.mapping[word].value == over.mapping[word].value
            return other in base.mapping or (word in base.mapping and not same)
    return False


def _name_of(path: Path) -> str:
    """A recipe's name: its file's stem; for a run's own ``recipe.yaml``, the name that the run was made under."""
    if path.name == "recipe.yaml" and (path.parent / "manifest.json").is_file():
        return path.resolve().parent.parent.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", path.stem).lstrip(".") or "recipe"


def _require_mapping(root: Node) -> None:
    if not isinstance(root.value, dict):
        raise RecipeError([Problem(root.place, "", f"a recipe is a mapping, not {kind_of(root)}")])


def _sized(level: Node) -> Node:
    """A recipe's top level or a stage with its global batch as a mapping, which others merge with."""
    said = level.mapping.get(GLOBAL_BATCH)
    return level if said is None else Node({**level.mapping, GLOBAL_BATCH: _size(said)}, level.place, level.key)


def _size(said: Node) -> Node:
    if said.value is None or isinstance(said.value, dict):
        return said
    return Node({"size": Node(said.value, said.place)}, said.place, said.key)


def _all_sized(root: Node) -> Node:
    """The same of a recipe and all its stages."""
    root = _sized(root)
    stages = root.mapping.get("stages")
    if stages is None or not stages.mapping:
        return root
    sized = Node({name: _sized(stage) for name, stage in stages.mapping.items()}, stages.place, stages.key)
    return Node({**root.mapping, "stages": sized}, root.place, root.key)


def _extended(node: Node, path: Path, chain: tuple[Path, ...], done: dict[Path, Node]) -> Node:
    """A file's node merged onto those that it extends; ``done`` has those that were merged before."""
    _require_mapping(node)
    node = _all_sized(node)
    chain = (*chain, path.resolve())
    extends = node.mapping.get("extends")
    if extends is None or extends.value is None:
        return node
    base: Node | None = None
    for parent in extends.items or [extends]:
        if not isinstance(parent.value, str):
            raise RecipeError(
                [Problem(parent.place, "extends", f"expected a file or a bundled recipe's name, got {kind_of(parent)}")]
            )
        try:
            found = find(parent.value)
        except RecipeError as cause:
            raise RecipeError([Problem(parent.place, "extends", cause.problems[0].message)]) from cause
        found = found if found.is_absolute() else parent.place.folder / found
        try:
            read = document.read(found)
        except RecipeError as cause:
            if cause.problems[0].place.line:
                raise
            raise RecipeError([Problem(parent.place, "extends", str(cause))]) from cause  # it is no file at all
        if (file := found.resolve()) in chain:
            raise RecipeError([Problem(parent.place, "extends", f"'{parent.value}' extends itself")])
        if len(chain) >= document.MAX_DEPTH:
            raise RecipeError([Problem(parent.place, "extends", f"more than {document.MAX_DEPTH} files deep")])
        if file not in done:
            done[file] = _extended(read, found, chain, done)
        base = done[file] if base is None else merge(base, done[file])
    own = Node({k: v for k, v in node.mapping.items() if k != "extends"}, node.place)
    return own if base is None else merge(base, own)


@dataclass(frozen=True)
class _Override:
    path: tuple[str, ...]
    value: Node


def _override(text: str) -> _Override:
    place = Place(f"override {text if len(text) <= SHOWN else text[:SHOWN] + '...'}")
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise RecipeError([Problem(place, "", "an override is key=value, such as trainer.max_epochs=3")])
    if len(path) > document.MAX_DEPTH:
        raise RecipeError([Problem(place, "", f"more than {document.MAX_DEPTH} levels deep")])
    node = Node(None, place) if value.strip() in NULL else document.parse(value, place)
    return _Override(path, _value_at(path, Node(node.value, place, place)))


def _value_at(path: tuple[str, ...], value: Node) -> Node:
    """An override's value, every global batch in it as a mapping."""
    match path:
        case (key,) | ("stages", _, key) if key == GLOBAL_BATCH:
            return _size(value)
        case ("stages", _):
            return _sized(value)
        case ("stages",):
            return _all_sized(Node({"stages": value}, value.place)).mapping["stages"]
    return value


def _assemble(root: Node, overrides: Sequence[_Override], name: str) -> Recipe:
    """The recipe of a merged root: inheritance and overrides applied, the stages in order."""
    problems = [*_unknown_keys(root, TOP, "")]
    stages_node = root.mapping.get("stages")
    if stages_node is not None and stages_node.value is not None and not isinstance(stages_node.value, dict):
        problems.append(
            Problem(stages_node.place, "stages", f"expected a mapping of stages, got {kind_of(stages_node)}")
        )
    own = stages_node.mapping if stages_node is not None else {}
    inherited = Node({k: v for k, v in root.mapping.items() if k in INHERITED}, root.place)
    only = not own
    stages = {ONLY_STAGE: inherited} if only else {}
    broken = set()
    for stage, node in own.items():
        if not _STAGE_NAME.fullmatch(stage):
            problems.append(
                Problem(node.key or node.place, f"stages.{stage}", "a stage's name is lower case: [a-z][a-z0-9_]*")
            )
        if node.value is None:
            continue
        if not isinstance(node.value, dict):
            problems.append(Problem(node.place, f"stages.{stage}", f"expected a mapping, got {kind_of(node)}"))
            broken.add(stage)
            continue
        problems += _unknown_keys(node, STAGE, f"stages.{stage}.")
        stages[stage] = merge(inherited, node)
    top = {k: v for k, v in root.mapping.items() if k in TOP and k not in (*INHERITED, "stages", "extends")}
    for override in sorted(
        overrides, key=lambda o: o.path[0] == "stages"
    ):  # one stage's own override wins over all stages'
        try:
            _apply(override, top, stages, only)
        except RecipeError as cause:
            problems += cause.problems
    if not stages and not problems:
        problems.append(Problem(root.place, "stages", "every stage is null: there is nothing to train"))
    order, wiring = _order(stages, set() if only else {*stages, *broken})
    if only and "require" in top and ONLY_STAGE in stages:
        stages[ONLY_STAGE] = Node({**stages[ONLY_STAGE].mapping, "require": top.pop("require")}, root.place)
    return Recipe(name, Node(top, root.place), stages, order, problems + wiring)


def _unknown_keys(node: Node, allowed: tuple[str, ...], prefix: str) -> list[Problem]:
    return [
        Problem(child.key or child.place, f"{prefix}{key}", f"unknown key{nearest(key, allowed)}")
        for key, child in node.mapping.items()
        if key not in allowed
    ]


def _apply(override: _Override, top: dict[str, Node], stages: dict[str, Node], only: bool) -> None:
    """One override onto the top level, every stage, or the stage that it names; changes both mappings."""
    first, *rest = override.path
    place = override.value.place
    if first == "extends" or first not in TOP:
        allowed = [key for key in TOP if key != "extends"]
        raise RecipeError([Problem(place, first, f"no such key at the top of a recipe{nearest(first, allowed)}")])
    if first in INHERITED:
        for stage, node in stages.items():
            stages[stage] = _put(node, override.path, override.value)
    elif first != "stages":
        top[first] = _put(Node(top, place), override.path, override.value).mapping[first]
    elif only:
        raise RecipeError([Problem(place, ".".join(override.path[:2]), "this recipe has no stages")])
    elif rest:
        _apply_to_stage(rest[0], tuple(rest[1:]), override.value, stages)
    else:
        for stage, node in override.value.mapping.items():
            _apply_to_stage(stage, (), node, stages)
        if not override.value.mapping:
            raise RecipeError(
                [Problem(place, "stages", f"expected a mapping of stages, got {kind_of(override.value)}")]
            )


def _apply_to_stage(stage: str, path: tuple[str, ...], value: Node, stages: dict[str, Node]) -> None:
    """An override of one stage, or of something in it."""
    key = ".".join(("stages", stage, *path))
    if stage not in stages:
        raise RecipeError([Problem(value.place, f"stages.{stage}", f"no such stage{nearest(stage, stages)}")])
    if path and path[0] not in STAGE:
        raise RecipeError([Problem(value.place, key, f"unknown key of a stage{nearest(path[0], STAGE)}")])
    if path:
        stages[stage] = _put(stages[stage], path, value)
    elif value.value is None:
        del stages[stage]
    elif not isinstance(value.value, dict):
        raise RecipeError([Problem(value.place, key, f"expected a mapping, got {kind_of(value)}")])
    elif unknown := _unknown_keys(value, STAGE, f"{key}."):
        raise RecipeError(unknown)
    else:
        stages[stage] = merge(stages[stage], value)


def _put(node: Node, path: tuple[str, ...], value: Node, done: tuple[str, ...] = ()) -> Node:
    """A node with ``value`` merged in at ``path``."""
    if not path:
        return merge(node, value)
    key, here = path[0], (*done, path[0])
    if isinstance(node.value, list):
        items = {str(i): child for i, child in enumerate(node.value)}
        if key not in items:
            positions = f"has the positions 0 to {len(items) - 1}" if items else "is empty"
            problem = f"the list at {'.'.join(done)} {positions}"
            raise RecipeError([Problem(value.place, ".".join(here), problem)])
        items[key] = _put(items[key], path[1:], value, here)
        return Node(list(items.values()), node.place, node.key)
    if node.value is not None and not isinstance(node.value, dict | str):
        problem = f"{'.'.join(done)} is {kind_of(node)}: there is nothing below it"
        raise RecipeError([Problem(value.place, ".".join(here), problem)])
    if key in RESERVED and len(path) == 1:  # another component: the old one's arguments go
        return merge(node, Node({key: value}, value.place, node.key))
    children = {"name": node} if isinstance(node.value, str) else node.mapping
    child = children.get(key, Node(None, value.place, value.place))
    return Node({**children, key: _put(child, path[1:], value, here)}, node.place, node.key)


def _order(stages: Mapping[str, Node], said: set[str]) -> tuple[list[str], list[Problem]]:
    """Dependency order (the file's order among equals), and what is wrong with the wiring.

    Args:
        said: the stages, and those that are no mapping: a problem already, but not unknown.
    """
    problems: list[Problem] = []
    needs: dict[str, dict[str, tuple[Place, str]]] = {stage: {} for stage in stages}
    for stage, node in stages.items():
        for path, reference in references(node):
            source = reference.mapping["from"]
            key = ".".join((*(("stages", stage) if stage != ONLY_STAGE else ()), *path, "from"))
            if not isinstance(source.value, str):
                problems.append(Problem(source.place, key, f"expected a stage or RUN/stage, got {kind_of(source)}"))
            elif "/" in source.value:
                continue
            elif source.value not in said:
                problems.append(
                    Problem(source.place, key, f"no stage named '{source.value}'{nearest(source.value, said)}")
                )
            elif source.value == stage:
                problems.append(Problem(source.place, key, f"the stage '{stage}' takes from itself"))
            elif source.value in stages:
                needs[stage].setdefault(source.value, (source.place, key))
    order: dict[str, None] = {}
    waiting = list(stages)
    while waiting:
        ready = next((stage for stage in waiting if needs[stage].keys() <= order.keys()), None)
        if ready is None:
            circle = _circle(needs, waiting)
            place, key = needs[circle[0]][circle[1]]
            wait = Problem(place, key, f"the stages wait for each other: {' → '.join(circle)}")
            return list(order), [*problems, wait]
        order[ready] = None
        waiting.remove(ready)
    return list(order), problems


def _circle(needs: Mapping[str, Mapping[str, Any]], waiting: Sequence[str]) -> list[str]:
    """One circle of stages that wait for each other, its first stage again at its end."""
    path = [waiting[0]]
    while True:
        following = next(parent for parent in needs[path[-1]] if parent in waiting)
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)


def shown(value: Any) -> str:
    """A value as a recipe says it, shortened."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def kind_of(node: Node) -> str:
    """A node's type in a user's words."""
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(node.value), "nothing")
