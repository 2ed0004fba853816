"""95 % confidence intervals: of a share, of a mean of shares, of a paired difference, of a mean."""

import math
import statistics
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

Z = 1.959963984540054  # normal quantile 0.975


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Wilson score interval of a share ``correct / count``, in [0, 1] (Wilson 1927)."""
    p, n, z = correct / count, count, Z
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def mean_of_shares(shares: Sequence[float], counts: Sequence[int]) -> tuple[float, float, float]:
    """Unweighted mean of shares p_i over n_i rows, with its interval: ``(mean, low, high)``.

    The variance is the sum of p (1 - p) / n over k^2, with two right and two wrong answers added to
    each source (Agresti and Coull 1998), so that a source with none right is not taken for exact.
    """
    mean = statistics.fmean(shares)
    pairs = zip(shares, counts, strict=True)
    adjusted = [((share * count + 2) / (count + 4), count + 4) for share, count in pairs]
    half = Z * math.sqrt(sum(p * (1 - p) / n for p, n in adjusted)) / len(shares)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def paired_difference(groups: Iterable[Sequence[tuple[bool, bool]]]) -> tuple[float, float, float]:
    """Difference of two shares over the same rows: ``(difference, low, high)``.

    Over n rows of a group, b right in the first alone and c in the second alone: d = (b - c) / n
    with variance (b + c - (b - c)^2 / n) / n^2, after half an answer is added to b and to c, so
    that no disagreement is not taken for certainty (Agresti and Min 2005). Groups are averaged.
    """
    groups = list(groups)
    difference = variance = 0.0
    for pairs in groups:
        b = sum(x and not y for x, y in pairs)
        c = sum(y and not x for x, y in pairs)
        n, d = len(pairs) + 1, b - c
        difference += d / len(pairs) / len(groups)
        variance += (b + c + 1 - d * d / n) / n**2 / len(groups) ** 2
    half = Z * math.sqrt(variance)
    return difference, difference - half, difference + half


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width t s / sqrt(n) of its interval (None for one value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, t975(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


@cache
def t975(freedom: int) -> float:
    """Student's t quantile 0.975 for ``freedom`` degrees of freedom.

    With x = sqrt(n) tan(a) the distribution is an integral of cos(a)^(n - 1). It is concave: the
    steps of Newton's method from the normal quantile, which lies below, never go too far.
    """
    ratio = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    wanted = 0.475 * math.sqrt(math.pi) / math.exp(ratio)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    angle = math.atan(Z / math.sqrt(freedom))
    for _ in range(20):
        integral = weights @ np.cos(angle * (nodes + 1) / 2) ** (freedom - 1) * angle / 2
        angle += (wanted - integral) / math.cos(angle) ** (freedom - 1)
    return math.sqrt(freedom) * math.tan(angle)
