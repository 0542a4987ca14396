"""Intervals: Wilson for proportions, normal for means, Student for few seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Z95 = 1.959963984540054
SOLVED_FROM = 0.90
"""Accuracy from which a run counts as solved."""
SHORTCUT_WITHIN = 0.05
"""Distance from chance within which a run counts as having learned the shortcut."""


class Metric(NamedTuple):
    """One measured figure with its 95 % interval."""

    value: float | str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    chance: float | None = None


def proportion(hits: int, n: int) -> tuple[float, float, float, int]:
    """Proportion with its 95 % Wilson interval.

    Returns:
        (value, low, high, n).
    """
    if n == 0:
        raise ValueError("a proportion of nothing")
    p, z2 = hits / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n


def mean_interval(values: ArrayLike, chance: float | None = None) -> Metric:
    """Mean over items with its 95 % interval (normal approximation); one item has no interval."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return Metric(float(x.mean()), n=int(x.size), chance=chance)
    half = Z95 * x.std(ddof=1) / sqrt(x.size)
    return Metric(float(x.mean()), float(x.mean() - half), float(x.mean() + half), int(x.size), chance)


def seeds_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % Student interval; the interval is the mean itself for one seed."""
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    if x.size < 2:
        return mean, mean, mean
    half = _student_95(x.size - 1) * float(x.std(ddof=1)) / sqrt(x.size)
    return mean, mean - half, mean + half


def _student_95(freedom: int) -> float:
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if freedom <= len(table):
        return table[freedom - 1]
    z = Z95  # Cornish-Fisher expansion, exact to three digits from 10 degrees of freedom on
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
