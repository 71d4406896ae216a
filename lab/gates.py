"""Gates: bounds that a stage's figures must keep, alone or beside another stage's."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lab.document import Place

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip
OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "": lambda value, _: value, "*": operator.mul, "/": operator.truediv, "+": operator.add, "-": operator.sub,
}  # fmt: skip
_NUMBER = r"(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?"
_GATE = re.compile(
    rf"(?P<relation>>=|<=|==|<|>)\s*(?:(?P<bound>[-+]?{_NUMBER})"
    rf"|(?P<stage>[a-z][a-z0-9_]*)(?:\s*(?P<operation>[-+*/])\s*(?P<amount>{_NUMBER}))?)"
)


@dataclass(frozen=True)
class Gate:
    """``test/accuracy: ">= 0.95"``, or ``bytes: "<= dense / 30"``.

    Args:
        metric: a metric, or another figure of ``results.json``; ``latency_ms/batch_64`` is in ``latency_ms``.
        relation: of the stage's figure to the bound.
        bound: the bound, or what another stage's figure is changed by to be it.
        place: in the recipe.
        stage: that other stage.
        operation: how its figure is changed.
    """

    metric: str
    relation: str
    bound: float
    place: Place
    stage: str | None = None
    operation: str = ""

    def __str__(self) -> str:
        number = repr(self.bound).removesuffix(".0")
        if self.stage is None:
            return f"{self.relation} {number}"
        return f"{self.relation} {self.stage}" + (f" {self.operation} {number}" if self.operation else "")

    @classmethod
    def parse(cls, metric: str, text: str, place: Place) -> Gate:
        """What a recipe says.

        Raises:
            ValueError: it is no bound.
        """
        match = _GATE.fullmatch(text.strip())
        if match is None or (match["operation"] == "/" and not float(match["amount"].replace("_", ""))):
            raise ValueError(f"no bound: {text!r}")
        number = match["bound"] or match["amount"] or "0"
        return cls(
            metric, match["relation"], float(number.replace("_", "")), place, match["stage"], match["operation"] or ""
        )

    def judge(self, result: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> tuple[bool, str]:
        """Whether a stage passes, and the figures that say so in words.

        Args:
            result: the stage's, as ``results.json`` has it.
            others: the results of those before it, by name.
        """
        value, bound, said = figure(result, self.metric), self.bound, ""
        if value is None:
            return False, f"{self.metric} was not measured, {self} is required"
        if self.stage is not None:
            other = figure(others.get(self.stage, {}), self.metric)
            if other is None:
                return False, f"{self.metric} of {self.stage} was not measured, {self} is required"
            bound = OPERATIONS[self.operation](other, self.bound)
            said = f", which is {bound:.6g}"
        return RELATIONS[self.relation](value, bound), f"{self.metric} is {value:.6g}, {self} is required{said}"


def figure(result: Mapping[str, Any], metric: str) -> float | None:
    """A stage's figure, by the name of a metric or of an entry of its results; None where it was not measured."""
    group, _, part = metric.partition("/")
    inner = result.get(group)
    within = inner.get(part) if isinstance(inner, Mapping) else None
    value = {**result, **result.get("metrics", {})}.get(metric, within)
    return float(value) if isinstance(value, int | float) else None
