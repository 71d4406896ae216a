"""Intervals, tests and their correction against SciPy's own and published examples."""

import math

import numpy
import pytest
from scipy import stats

from lab.statistics import compare, estimate, holm

ONE = {0: 0.91, 1: 0.93, 2: 0.95, 3: 0.90}
OTHER = {0: 0.90, 1: 0.90, 2: 0.96, 3: 0.86}


def test_an_interval_is_students_t() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # the table's t(0.975, 2), s = 1
    lower, upper = stats.t.interval(0.95, 2, loc=2, scale=stats.sem([1.0, 2.0, 3.0]))
    assert found.interval == pytest.approx((lower, upper))


def test_one_value_has_no_interval() -> None:
    found = estimate([0.5])
    assert (found.n, found.mean, found.half, found.interval) == (1, 0.5, None, None)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    samples = numpy.random.default_rng(0).normal(3.0, 2.0, (4000, 4))
    covered = [low < 3.0 < high for low, high in (estimate(sample).interval for sample in samples.tolist())]
    assert 0.94 < sum(covered) / len(covered) < 0.96


def test_common_seeds_are_compared_in_pairs() -> None:
    found = compare(ONE, dict(reversed(OTHER.items())))
    reference = stats.ttest_rel([*ONE.values()], [*OTHER.values()])
    assert found.kind == "paired t"
    assert found.p == pytest.approx(reference.pvalue)
    assert found.difference.interval == pytest.approx(tuple(reference.confidence_interval()))


def test_a_seed_without_a_partner_is_left_out_of_a_paired_test() -> None:
    assert compare({**ONE, 9: 0.1}, OTHER) == compare(ONE, OTHER)


def test_seeds_that_do_not_pair_are_compared_by_welch() -> None:
    found = compare(ONE, {seed + 3: value for seed, value in OTHER.items()})
    reference = stats.ttest_ind([*ONE.values()], [*OTHER.values()], equal_var=False)
    assert found.kind == "Welch t"
    assert found.p == pytest.approx(reference.pvalue)
    assert found.difference.interval == pytest.approx(tuple(reference.confidence_interval()))


def test_one_value_a_side_is_a_difference_without_a_test() -> None:
    found = compare({0: 0.9}, {0: 0.8})
    assert (found.kind, found.p, found.difference.half) == ("none", None, None)
    assert found.difference.mean == pytest.approx(0.1)


def test_equal_samples_do_not_differ() -> None:
    assert compare(ONE, ONE).p == 1
    assert compare({0: 0.5, 1: 0.5}, {2: 0.5, 3: 0.5}).p == 1


def test_a_difference_without_spread_has_no_p() -> None:
    found = compare({0: 0.3, 1: 0.6}, {0: 0.1, 1: 0.4})
    assert found.difference.mean == pytest.approx(0.2)
    assert found.p is None


def test_holm_is_the_step_down_bonferroni() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Wikipedia's worked example
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
