"""What a few seeds can say: Student's t intervals, paired and unpaired tests, Holm's correction.

Small samples of a metric, one value a run. Student (The Probable Error of a Mean, Biometrika 1908) for means and for
differences of pairs, B. L. Welch (The generalization of 'Student's' problem, Biometrika 1947) for unpaired samples,
S. Holm (A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979) for several
tests at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

LEVEL = 0.95
"""How often an interval covers what it estimates."""
ROUNDING = 1e-12
"""Spread, relative to the values, that is rounding and nothing else."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Args:
        n: how many values it is the mean of; for unpaired samples, of the smaller one.
        half: half the interval's width, in the values' unit; None where one value says nothing of the spread.
    """

    n: int
    mean: float
    half: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end."""
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)


@dataclass(frozen=True)
class Test:
    """The difference of two samples' means.

    Args:
        kind: ``paired t``, ``Welch t``, or ``none`` where there are too few values for either.
        difference: with its 95 % interval.
        p: two-sided; None where there is no test, or where every pair has the same difference (t is not defined).
    """

    kind: str
    difference: Estimate
    p: float | None

    __test__ = False  # pytest takes any Test* for tests


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of finite values, at least one, with its interval."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Estimate(n, mean, None)
    return Estimate(n, mean, _quantile(n - 1) * statistics.stdev(values) / math.sqrt(n))


def compare(values: Mapping[Key, float], baseline: Mapping[Key, float]) -> Test:
    """The test that the samples allow: paired where two keys at least (seeds) are common, else Welch's.

    A paired test leaves values without a partner out.

    Args:
        values: finite, at least one, by what pairs them.
        baseline: what is subtracted.
    """
    common = values.keys() & baseline.keys()
    if len(common) > 1:
        differences = [values[key] - baseline[key] for key in values if key in common]
        difference = estimate(differences)
        error = statistics.stdev(differences) / math.sqrt(len(common))
        return Test("paired t", difference, _p(difference.mean, error, len(common) - 1, [*values.values()]))
    one, other = [*values.values()], [*baseline.values()]
    mean, n = math.fsum(one) / len(one) - math.fsum(other) / len(other), min(len(one), len(other))
    if n < 2:
        return Test("none", Estimate(n, mean, None), None)
    a, b = (statistics.stdev(values) / math.sqrt(len(values)) for values in (one, other))
    error = math.hypot(a, b)
    share = (a / error) ** 2 if error else 0.5  # of the first sample in the variance
    freedom = 1 / (share**2 / (len(one) - 1) + (1 - share) ** 2 / (len(other) - 1))
    return Test("Welch t", Estimate(n, mean, _quantile(freedom) * error), _p(mean, error, freedom, [*one, *other]))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: at most 1, never smaller than a smaller p's."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def _quantile(freedom: float) -> float:
    from scipy import special  # a third of the time that scipy.stats takes to import

    return float(special.stdtrit(freedom, (1 + LEVEL) / 2))


def _p(mean: float, error: float, freedom: float, values: Sequence[float]) -> float | None:
    """Two-sided p of t = mean / error."""
    from scipy import special

    rounding = ROUNDING * max(map(abs, values))
    if error > rounding:
        return float(2 * special.stdtr(freedom, -abs(mean) / error))
    return None if abs(mean) > rounding else 1.0
