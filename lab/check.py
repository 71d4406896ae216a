"""Checking a recipe without running it: names to classes, arguments to parameters, stages to stages.

Nothing is imported here: signatures are read from source text (:mod:`lab.signature`), so that ``lab check`` names
every unknown name, key and wire of a recipe, with its place, in a fraction of a second. Types and ranges need the
classes: :mod:`lab.build`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lab import global_batch, signature, space
from lab.document import Node, Place, Problem, RecipeError
from lab.gates import Gate
from lab.plan import FROM_OPTIONS, Component, From, Plan, Stage, Value
from lab.recipe import GLOBAL_BATCH, ONLY_STAGE, RESERVED, Recipe, kind_of, shown
from lab.registry import KINDS, DuplicateName, Entry, UnknownName, datamodules, nearest
from lab.signature import Parameter, Reference, Signature
from lab.slots import (
    facts_of,
    is_a,
    kinds_with,
    last_word,
    one,
    read_signature,
    slot,
    takes_list,
    takes_mapping,
    wanted,
    yielded,
    yielding,
)  # fmt: skip

TRAINER = "lightning.pytorch.trainer.trainer:Trainer"
OWN_TRAINER_KEYS = {
    "callbacks": "use the recipe's `callbacks`",
    "logger": "use the recipe's `logger`",
    "plugins": "lab chooses them",
    "default_root_dir": "use `--out`",
    "enable_checkpointing": "use `callbacks: {checkpoints: null}` to have none",
    "use_distributed_sampler": "the datamodule shards its batches",
    "fast_dev_run": "use `lab fit --smoke`",
    "enable_progress_bar": "use `callbacks: {progress: null}` to have none",
    "enable_model_summary": "`callbacks: {profile: ...}` counts parameters",
    "barebones": "lab needs its callbacks",
    "model_registry": "a run's folder has its networks",
}
"""Arguments of Lightning's Trainer that a recipe cannot give, and what to use instead."""

GIVEN: dict[str, dict[str, str]] = {
    "callbacks": {"monitor": "the module", "mode": "the module", "title": "the run"},
    "loggers": {"save_dir": "the run", "group": "the run", "job_type": "the run", "title": "the run", "id": "the run"},
    "schedulers": {"total_steps": "the trainer", "T_max": "the trainer", "epoch_steps": "the trainer"},
}
"""What lab fills when a recipe leaves it out, by kind; ``seed`` and the data's facts are filled in every kind."""

FROZEN = "lab.artifact.Teacher"
SHOWN_KEYS = 4
"""How many of a mapping's keys an error shows."""


def check(recipe: Recipe) -> Plan:
    """The meaning of a recipe.

    Raises:
        RecipeError: every unknown name, unknown or missing argument and wrong wire, and the recipe's own problems.
    """
    finder = _Finder()
    problems = list(recipe.problems)
    description = recipe.top.mapping.get("description")
    if description is not None and not isinstance(description.value, str | None):
        problems.append(Problem(description.place, "description", f"expected text, got {kind_of(description)}"))
    order = [*recipe.order, *(name for name in recipe.stages if name not in recipe.order)]
    stages = {name: finder.stage(name, recipe.stages[name]) for name in order}
    complete = {name: stage for name, stage in stages.items() if stage is not None}
    if "require" in recipe.top.mapping:
        finder.top_gates(recipe.top.mapping["require"], stages)
    finder.compared(complete)
    problems += finder.problems
    swept = None
    if (said := recipe.top.mapping.get("sweep")) is not None and said.value is not None:
        try:
            swept = space.read(said, order)
        except RecipeError as cause:
            problems += cause.problems
    if problems:
        raise RecipeError(once(problems))
    return Plan(recipe.name, recipe.description, complete, sweep=swept)


def once(problems: Sequence[Problem]) -> list[Problem]:
    """Each problem once: one that several stages inherit from one place has no stage's name in its key."""
    found: dict[tuple[Place, str, str], Problem] = {}
    for problem in problems:
        key = _IN_STAGE.sub("", problem.key)
        first = found.setdefault((problem.place, key, problem.message), problem)
        if first.key != problem.key:
            found[problem.place, key, problem.message] = replace(problem, key=key)
    return list(found.values())


def component(kind: str, data: Any, place: Place, facts: Sequence[str] = ()) -> Component:
    """The component that plain data describes, as in a network's JSON file.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    finder = _Finder(tuple(facts))
    found = finder.component(Node.of(data, place), kind, (kind,))
    if finder.problems or not isinstance(found, Component):
        raise RecipeError(finder.problems or [Problem(place, "", "names no component")])
    return found


class _Finder:
    """Walks the stages, collecting what is wrong."""

    def __init__(self, facts: tuple[str, ...] = ()) -> None:
        self.stage_name = ""
        self.facts = facts
        self.facts_known = True
        self.problems: list[Problem] = []

    def say(self, place: Place, path: tuple[str, ...], message: str) -> None:
        prefix = ("stages", self.stage_name) if self.stage_name not in ("", ONLY_STAGE) else ()
        self.problems.append(Problem(place, ".".join((*prefix, *path)), message))

    def stage(self, name: str, node: Node) -> Stage | None:
        """One stage, or None where it has no module or data that could be found."""
        self.stage_name, self.facts = name, ()
        parts = node.mapping
        data = self.component(parts["data"], "datamodules", ("data",)) if _said(parts, "data") else None
        self.facts, self.facts_known = _facts(data), not _said(parts, "data") or _is_known(data)
        module: Component | None = None
        if _said(parts, "module"):
            found = self.component(parts["module"], "modules", ("module",))
            module = found if isinstance(found, Component) else None
        else:
            place = parts["module"].place if "module" in parts else node.place
            self.say(place, ("module",), "a stage needs a module, such as `module: {name: supervised, ...}`")
        if isinstance(module, Component) and isinstance(data, Component):
            self._fit(module, data)
        callbacks = self._callbacks(parts.get("callbacks"))
        loggers = self._loggers(parts.get("logger"))
        seed = self._seed(parts.get("seed"))
        gates = self._gates(parts.get("require"))
        trainer = self._trainer(parts.get("trainer"), node.place)
        together = global_batch.read(parts.get(GLOBAL_BATCH), data, module, self.say)
        if module is None or isinstance(data, From):
            return None
        return Stage(name, seed, module, data, trainer, callbacks, loggers, gates, together)

    def component(
        self, node: Node, kind: str | None, path: tuple[str, ...], *, frozen: bool = False
    ) -> Component | From | None:
        """What a node names, with its arguments; None, and a problem said, where it names nothing."""
        if "from" in node.mapping:
            return self._from(node, kind, path, frozen)
        name_node = node.mapping.get("name", node)
        if not isinstance(name_node.value, str):
            got = f"a name that is {kind_of(name_node)}" if name_node is not node else _without_name(node)
            self.say(name_node.place, path, f"expected {wanted(kind)}; got {got}")
            return None
        entry = self._entry(name_node, kind, path)
        if entry is None:
            return None
        signature = read_signature(entry)
        given = {key: child for key, child in node.mapping.items() if key != "name"}
        filled = self._filled(entry, signature, given)
        if signature.known:
            self._arguments_fit(entry, signature, given, filled, place=node.place, path=path)
        arguments = {
            key: self._value(child, signature.parameters.get(key), (*path, key)) for key, child in given.items()
        }
        return Component(entry.kind, entry, signature, name_node.place, path, arguments, filled, frozen)

    def _arguments_fit(
        self,
        entry: Entry,
        signature: Signature,
        given: Mapping[str, Node],
        filled: Mapping[str, str],
        *,
        place: Place,
        path: tuple[str, ...],
    ) -> None:
        """Whether a constructor has every argument that is given, and is given every one that it needs."""
        for key, child in given.items():
            if not signature.open and key not in signature.parameters:
                hint = nearest(key, [name for name in signature.parameters if name not in RESERVED])
                self.say(child.key or child.place, (*path, key), f"{entry.name} has no argument '{key}'{hint}")
        for name, parameter in signature.parameters.items():
            if parameter.required and name not in given and name not in filled:
                what = f": {parameter.annotation}" if parameter.annotation else ""
                self.say(place, path, f"{entry.name} needs the argument '{name}'{what}{self._instead(name)}")

    def _instead(self, name: str) -> str:
        """Why a missing argument is missing, where that is known."""
        if name in RESERVED:
            return " (which a recipe cannot say: `name` and `from` are reserved words)"
        giving = [entry.name for entry in datamodules.entries() if name in facts_of(read_signature(entry))]
        if not giving or name in self.facts:
            return ""
        whose = "this data does not give it, other data would" if self.facts else "data would give it"
        return f" ({whose}: {', '.join(giving)})"

    def _entry(self, node: Node, kind: str | None, path: tuple[str, ...]) -> Entry | None:
        """The entry that a name node names; without a kind, of whichever kind has it."""
        name = str(node.value)
        here = (*path, "name") if node.key is not None and path and node.place else path
        kinds = [KINDS[kind]] if kind else kinds_with(name)
        if not kinds:
            self.say(
                node.place,
                here,
                f"nothing is registered as '{name}'{nearest(name, {n for k in KINDS.values() for n in k.names()})}",
            )
            return None
        try:
            return kinds[0].find(name)
        except (UnknownName, DuplicateName) as cause:
            self.say(node.place, here, str(cause.args[0]))
            return None

    def _value(self, node: Node, parameter: Parameter | None, path: tuple[str, ...]) -> Value:
        """An argument's value: components where the annotation, or a ``name:`` in the value, asks for them."""
        kind = slot(parameter) if parameter is not None else None
        plain_mapping = parameter is not None and takes_mapping(parameter)
        if self._names_component(node, parameter, kind):
            frozen = parameter is not None and FROZEN in parameter.names
            return self.component(node, kind, path, frozen=frozen) or node
        if node.mapping and kind and not plain_mapping:
            self.say(node.place, path, f"expected {wanted(kind)}; got {_without_name(node)}")
            return node
        if node.items and parameter is not None and kind and not takes_list(parameter):
            self.say(node.place, path, f"expected {wanted(kind)}; got a list")
            return node
        items = [self._value(child, parameter, (*path, str(i))) for i, child in enumerate(node.items)]
        children = {key: self._value(child, parameter, (*path, key)) for key, child in node.mapping.items()}
        found = any(not isinstance(value, Node) for value in (*items, *children.values()))
        return (items or children) if found else node

    def _names_component(self, node: Node, parameter: Parameter | None, kind: str | None) -> bool:
        """Whether an argument's value is a component, not data."""
        if "from" in node.mapping:
            return True
        if "name" in node.mapping:
            return kind is not None or parameter is None or not takes_mapping(parameter)
        if kind is None or parameter is None or not isinstance(node.value, str):
            return False
        return "str" not in parameter.names or node.value in KINDS[kind].names()

    def _from(self, node: Node, kind: str | None, path: tuple[str, ...], frozen: bool) -> From | None:
        """A reference; whether its stage exists was checked with the recipe's wiring."""
        source = node.mapping["from"]
        options: dict[str, str] = {}
        for key, child in node.mapping.items():
            allowed = FROM_OPTIONS.get(key)
            if key == "from":
                continue
            if allowed is None:
                self.say(
                    child.key or child.place, (*path, key), f"unknown option of `from`{nearest(key, FROM_OPTIONS)}"
                )
            elif child.value not in allowed:
                self.say(child.place, (*path, key), f"expected {' or '.join(allowed)}, got {shown(child.plain())}")
            else:
                options[key] = str(child.value)
        if kind not in (None, "networks"):
            self.say(node.place, path, f"a stage gives a network; here {one(kind)} is wanted")
            return None
        if not isinstance(source.value, str):
            return None
        if "/" in source.value:
            from lab.run import RunNotFound, locate

            try:
                locate(source.value, source.place.folder)
            except (RunNotFound, OSError) as cause:
                self.say(source.place, (*path, "from"), str(cause))
                return None
        return From(source.value, source.place, path, folder=source.place.folder, frozen=frozen, **options)

    def _filled(self, entry: Entry, signature: Signature, given: Mapping[str, Node]) -> dict[str, str]:
        """The parameters that the recipe leaves out and lab fills."""
        sources = {"seed": "the recipe", **dict.fromkeys(self.facts, "the data"), **GIVEN.get(entry.kind, {})}
        if "monitor" in given or "monitor" not in signature.parameters:  # a mode of something else
            sources.pop("mode", None)
        if not self.facts_known:  # what the data gives is seen when they are there
            sources = {**{name: "the data" for name, p in signature.parameters.items() if p.required}, **sources}
        return {name: sources[name] for name in signature.parameters if name in sources and name not in given}

    def _fit(self, module: Component, data: Component) -> None:
        """Whether the module can consume what the data yields, where both say so."""
        consumes, (yields, argument) = module.signature.attributes.get("consumes"), yielded(data)
        if not isinstance(consumes, Reference) or not isinstance(yields, Reference) or is_a(yields, consumes):
            return
        fitting = [
            entry.name
            for entry in datamodules.entries()
            if isinstance(other := read_signature(entry).attributes.get("yields"), Reference) and is_a(other, consumes)
        ]
        fit = f"data that fits: {', '.join(fitting)}" if fitting else "no installed data does"
        if others := yielding(data.signature, consumes):
            fit = f"{argument}: {' or '.join(others)} gives them"
        said = f" with {argument}: {data.plain()[argument]}" if argument in data.arguments else ""
        message = (
            f"{module.name} consumes {last_word(consumes)} batches, {data.name}{said} yields {last_word(yields)}; {fit}"
        )
        self.say(data.place, ("data",), message)

    def _callbacks(self, node: Node | None) -> dict[str, Component | None]:
        """Callbacks by name; a name that is not registered is an alias with ``name:`` inside; null removes."""
        if node is None or node.value is None:
            return {}
        if not isinstance(node.value, dict):
            self.say(node.place, ("callbacks",), f"expected a mapping of callbacks by name, got {kind_of(node)}")
            return {}
        result: dict[str, Component | None] = {}
        for key, child in node.value.items():
            path = ("callbacks", key)
            if not key.isprintable():
                self.say(child.key or child.place, path, "a callback's name is one line of printable text")
                continue
            if child.value is None:
                result[key] = None
                continue
            named = child
            if isinstance(child.value, dict) and not {"name", "from"} & child.value.keys():
                named = Node({"name": Node(key, child.key or child.place), **child.value}, child.place, child.key)
            found = self.component(named, "callbacks", path)
            if isinstance(found, Component):
                result[key] = found
        return result

    def _loggers(self, node: Node | None) -> list[Component]:
        """``wandb``, ``{name: wandb, ...}``, or a list of those."""
        if node is None or node.value in (None, False):
            return []
        children = node.items if isinstance(node.value, list) else [node]
        found: list[Component] = []
        for child in children:
            logger = self.component(child, "loggers", ("logger",))
            if not isinstance(logger, Component):
                continue
            if logger.plain() in [other.plain() for other in found]:
                self.say(child.place, ("logger",), f"{logger.name} stands twice, and would write into the same place")
            found.append(logger)
        return found

    def _seed(self, node: Node | None) -> int:
        if node is None:
            return 0
        if not isinstance(node.value, int) or isinstance(node.value, bool) or not 0 <= node.value < 2**32:
            self.say(node.place, ("seed",), f"expected a whole number from 0 to 4294967295, got {shown(node.plain())}")
            return 0
        return node.value

    def _trainer(self, node: Node | None, place: Place) -> Node:
        if node is None or node.value is None:
            return Node({}, place)
        if not isinstance(node.value, dict):
            self.say(node.place, ("trainer",), f"expected a mapping of the Trainer's arguments, got {kind_of(node)}")
            return Node({}, place)
        signature = signature_of_trainer()
        allowed = [name for name in signature.parameters if name not in OWN_TRAINER_KEYS]
        for key, child in node.value.items():
            if key in OWN_TRAINER_KEYS:
                self.say(child.key or child.place, ("trainer", key), f"is lab's own: {OWN_TRAINER_KEYS[key]}")
            elif signature.known and key not in signature.parameters:
                self.say(
                    child.key or child.place,
                    ("trainer", key),
                    f"the Trainer has no argument '{key}'{nearest(key, allowed)}",
                )
            elif isinstance(child.value, dict):
                self.say(child.place, ("trainer", key), "expected a number or a name, got a mapping")
        return node

    def _gates(self, node: Node | None) -> list[Gate]:
        if node is None or node.value is None:
            return []
        if not isinstance(node.value, dict):
            self.say(
                node.place,
                ("require",),
                f"expected a mapping such as {{test/accuracy: '>= 0.95'}}, got {kind_of(node)}",
            )
            return []
        found = [self._gate(metric, child, ("require", metric)) for metric, child in node.value.items()]
        return [gate for gate in found if gate is not None]

    def _gate(self, metric: str, node: Node, path: tuple[str, ...]) -> Gate | None:
        try:
            return Gate.parse(metric, node.value if isinstance(node.value, str) else "", node.place)
        except ValueError:
            example = "expected a bound such as '>= 0.95', '< 50_000' or '<= teacher / 4'"
            self.say(node.place, path, f"{example}, got {shown(node.plain())}")
            return None

    def top_gates(self, node: Node, stages: Mapping[str, Stage | None]) -> None:
        """``require`` at the top: ``stage.metric``."""
        self.stage_name = ""
        if node.value is not None and not isinstance(node.value, dict):
            example = "{student.test/accuracy: '>= 0.95'}"
            self.say(node.place, ("require",), f"expected a mapping such as {example}, got {kind_of(node)}")
        for key, child in node.mapping.items():
            stage, dot, metric = key.partition(".")
            if not dot or stage not in stages:
                self.say(child.key or child.place, ("require", key), f"expected stage.metric{nearest(stage, stages)}")
            elif (gate := self._gate(metric, child, ("require", key))) and (found := stages[stage]) is not None:
                found.gates.append(gate)

    def compared(self, stages: Mapping[str, Stage]) -> None:
        """Gates beside other stages: that these were trained before."""
        for name, stage in stages.items():
            before = _ancestors(name, stages)
            for gate in stage.gates:
                if gate.stage is not None and gate.stage not in before:
                    self.stage_name = ""
                    there = f"there are: {', '.join(sorted(before))}" if before else "there is none"
                    self.say(
                        gate.place, ("require", f"{name}.{gate.metric}"),
                        f"'{gate.stage}' is no stage that {name} comes from ({there})",
                    )  # fmt: skip


def _ancestors(name: str, stages: Mapping[str, Stage]) -> set[str]:
    """The stages that a stage's networks come from, through others too."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        stage = stages.get(waiting.pop())
        new = set(stage.parents if stage else ()) - found
        found |= new
        waiting += new
    return found - {name}


_IN_STAGE = re.compile(r"^stages\.[^.]+\.")


def signature_of_trainer() -> Signature:
    """The constructor of Lightning's Trainer."""
    return signature.read(TRAINER)


def _said(parts: Mapping[str, Node], key: str) -> bool:
    return key in parts and parts[key].value is not None


def _facts(data: Component | From | None) -> tuple[str, ...]:
    """The names of the facts that a datamodule declares."""
    return facts_of(data.signature) if isinstance(data, Component) else ()


def _is_known(data: Component | From | None) -> bool:
    return isinstance(data, Component) and data.signature.known and "facts" not in data.signature.computed


def _without_name(node: Node) -> str:
    keys = f" of {', '.join(list(node.mapping)[:SHOWN_KEYS])}" if node.mapping else ""
    return f"a mapping{keys} without `name:`" if isinstance(node.value, dict) else kind_of(node)
