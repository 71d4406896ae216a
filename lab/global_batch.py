"""``global_batch_size`` as a recipe says it: samples, and perhaps the rule by which learning rates follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from lab.document import Node, Place
from lab.plan import RULES, Component, From, GlobalBatch, sized
from lab.recipe import GLOBAL_BATCH, shown
from lab.registry import nearest
from lab.slots import slot

Say: TypeAlias = Callable[[Place, tuple[str, ...], str], None]
"""Told of each problem: its place, its key within the stage, and what it is."""

KEYS = ("size", "scale_lr", "base_size")
"""Of the mapping."""


def read(node: Node | None, data: Component | From | None, module: Component | None, say: Say) -> GlobalBatch | None:
    """The samples of a step, of all processes together; None where there are none, or what is said is wrong.

    Args:
        data: they must have a batch size that follows from it.
        module: with a rule, the recipe must say its optimizers.
    """
    if node is None or node.value is None:
        return None
    reader, path = _Reader(say), (GLOBAL_BATCH,)
    for key, child in node.mapping.items():
        if key not in KEYS:
            reader.say(child.key or child.place, (*path, key), f"unknown key{nearest(key, KEYS)}")
    size, base_size = (reader.samples(node, name) for name in ("size", "base_size"))
    if "size" not in node.mapping:
        reader.say(node.place, path, "needs `size`, the samples of a step")
    elif data is None:
        reader.say(node.place, path, "there are no data whose batch_size could follow from it")
    elif isinstance(data, Component) and data.signature.known and sized(data) is None:
        reader.say(node.place, path, f"{data.name} has no batch_size that could follow from it")
    rule = reader.rule(node, module)
    if size is None or reader.wrong:
        return None
    return GlobalBatch(size, node.place, rule, base_size if rule else None)


class _Reader:
    """Reads the parts, and knows whether anything was wrong."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.wrong = False

    def say(self, place: Place, path: tuple[str, ...], message: str) -> None:
        self.wrong = True
        self._say(place, path, message)

    def rule(self, node: Node, module: Component | None) -> str | None:
        """By which rule learning rates follow a global batch; the recipe has to say the optimizers that they are of."""
        said, base = node.mapping.get("scale_lr"), node.mapping.get("base_size")
        if said is None and base is not None:
            rules = " or ".join(RULES)
            self.say(base.key or base.place, (GLOBAL_BATCH, "base_size"), f"is for a rule: say scale_lr: {rules}")
        if said is None or said.value is None:
            return None
        path, rule = (GLOBAL_BATCH, "scale_lr"), said.value
        if not isinstance(rule, str) or rule not in RULES:
            self.say(said.place, path, f"no rule {shown(said.plain())}{nearest(str(said.plain()), RULES)}")
            return None
        if base is None or base.value is None:
            what = "the samples of a step that the recipe's learning rates are for"
            self.say(said.place, path, f"{rule} needs base_size, {what}")
        for why in _without_rate(module) if module is not None else ():
            self.say(said.place, path, why)
        return rule

    def samples(self, node: Node, name: str) -> int | None:
        """A number of samples in a global batch."""
        said = node.mapping.get(name)
        if said is None or (said.value is None and name != "size"):
            return None
        if type(said.value) is int and said.value >= 1:
            return said.value
        path = (GLOBAL_BATCH,) if name == "size" and said.place == node.place else (GLOBAL_BATCH, name)
        self.say(said.place, path, f"expected a whole number from 1, got {shown(said.plain())}")
        return None


def _without_rate(module: Component) -> list[str]:
    """Why the learning rates of a module's optimizers cannot follow a global batch; nothing where they can."""
    parts = [part for part in module.components() if isinstance(part, Component)]
    optimizers = [part for part in parts if part.kind == "optimizers"]
    unsaid = [
        f"the recipe does not say {part.name}'s {name}, which is {parameter.default} as it comes: say "
        f"`{name}: {{name: ..., lr: ...}}` with the learning rate of base_size"
        for part in parts
        for name, parameter in part.signature.parameters.items()
        if name not in part.arguments and parameter.default != "None" and slot(parameter) == "optimizers"
    ]
    rateless = [
        f"{part.name} has no learning rate `lr` that could be scaled"
        for part in optimizers
        if "lr" not in part.arguments
        and not isinstance(getattr(part.signature.parameters.get("lr"), "literal", None), int | float)
    ]
    if not optimizers and not unsaid:
        return [f"{module.name} has no optimizer in the recipe whose learning rate could be scaled"]
    return unsaid + rateless
