"""Intervals against scipy and against their papers' own numbers."""

import random

import pytest

from scalepeft.core import stats

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("freedom", [*range(1, 41), 100, 999, 10_000, 10_001, 10**6])
def test_students_t(freedom: int) -> None:
    assert stats.t975(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=1e-7)


@pytest.mark.parametrize(("correct", "count"), [(0, 1), (1, 1), (3, 10), (0, 200), (1319, 1319)])
def test_wilson(correct: int, count: int) -> None:
    expected = scipy_stats.binomtest(correct, count).proportion_ci(method="wilson")
    assert stats.wilson(correct, count) == pytest.approx(tuple(expected), abs=1e-12)


def test_mean_interval() -> None:
    draw = random.Random(1)
    values = [draw.gauss(3, 2) for _ in range(17)]
    mean, half = stats.mean_interval(values)
    low, high = scipy_stats.t.interval(0.95, 16, loc=mean, scale=scipy_stats.sem(values))
    assert half is not None
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-8)
    assert stats.mean_interval([2.5]) == (2.5, None)


def test_one_share_of_a_mean_is_agresti_and_coulls() -> None:
    mean, low, high = stats.mean_of_shares([0.8], [50])
    p = (40 + 2) / 54
    half = stats.Z * (p * (1 - p) / 54) ** 0.5
    assert (mean, low, high) == pytest.approx((0.8, 0.8 - half, 0.8 + half))
    assert stats.mean_of_shares([0.0, 0.0], [10, 10])[2] > 0


def test_a_paired_difference() -> None:
    pairs = [(True, False)] * 9 + [(False, True)] * 4 + [(True, True)] * 20 + [(False, False)] * 7
    found, low, high = stats.paired_difference([pairs])
    n, b, c = 41, 9.5, 4.5
    half = stats.Z * ((b + c - (b - c) ** 2 / n) / n**2) ** 0.5
    assert (found, low, high) == pytest.approx((5 / 40, 5 / 40 - half, 5 / 40 + half))
    same = stats.paired_difference([[(True, True)] * 5])
    assert same[0] == 0 < same[2]
