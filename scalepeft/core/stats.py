"""Confidence intervals."""

import math

# Student's t, quantile 0.975, for 1 to 30 degrees of freedom.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t975(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z, n = 1.959964, freedom  # the expansion of Fisher and Cornish: right to 0.0001 from here on
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n * n)


def interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 %), in [0, 1]."""
    p, n = correct / count, count
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
