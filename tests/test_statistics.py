"""Intervals against published numbers and the equations that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nextlat.statistics import Z95, mean_interval, proportion, seeds_interval


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_ones(hits: int, n: int, low: float, high: float) -> None:
    value, found_low, found_high, total = proportion(hits, n)
    assert (value, total) == (hits / n, n)
    assert (found_low, found_high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(("hits", "n"), [(1, 2), (3, 10), (997, 1000), (50, 100), (0, 5), (5, 5)])
def test_wilson_bounds_solve_the_score_equation(hits: int, n: int) -> None:
    value, low, high, _ = proportion(hits, n)
    for bound in (low, high):
        assert abs(value - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 2000, 10**6])
def test_wilson_interval_stays_inside_zero_and_one_and_holds_the_value(n: int) -> None:
    # the normal interval has no width at 0 % and 100 %, where path_star often ends
    for hits in (0, 1, n // 2, n - 1, n):
        value, low, high, _ = proportion(hits, n)
        assert 0.0 <= low <= value <= high <= 1.0
    assert proportion(0, n)[1] == 0.0
    assert proportion(0, n)[2] > 0.0
    assert proportion(n, n)[2] == 1.0
    assert proportion(n, n)[1] < 1.0


def test_wilson_interval_is_symmetric_in_hits_and_misses() -> None:
    _, low, high, _ = proportion(3, 11)
    _, other_low, other_high, _ = proportion(8, 11)
    assert (low, high) == (pytest.approx(1 - other_high), pytest.approx(1 - other_low))


def test_a_proportion_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        proportion(0, 0)


def test_mean_interval_by_hand() -> None:
    metric = mean_interval([1.0, 2.0, 3.0, 6.0], chance=0.5)
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)  # divided by n - 1
    assert metric.value == 3.0
    assert metric.high == pytest.approx(3 + 1.959964 * deviation / 2, rel=1e-6)
    assert metric.low == pytest.approx(3 - 1.959964 * deviation / 2, rel=1e-6)
    assert (metric.n, metric.chance) == (4, 0.5)
    assert isinstance(metric.value, float)


def test_mean_interval_covers_the_mean_of_many_samples_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for sample in rng.exponential(1.0, (2000, 200)):
        metric = mean_interval(sample)
        hits += metric.low <= 1.0 <= metric.high
    assert 0.93 < hits / 2000 < 0.965


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (6, 2.447),
        (7, 2.365),
        (8, 2.306),
        (9, 2.262),
        (10, 2.228),
        (11, 2.201),
        (12, 2.179),
        (13, 2.160),
        (14, 2.145),
        (15, 2.131),
        (19, 2.093),
        (20, 2.086),
        (25, 2.060),
        (30, 2.042),
        (40, 2.021),
        (60, 2.000),
        (80, 1.990),
        (100, 1.984),
    ],
)
def test_seed_interval_uses_the_tabulated_student_quantile(freedom: int, quantile: float) -> None:
    # freedom + 1 seeds, alternating so that mean and deviation are known
    n = freedom + 1
    values = [(-1.0) ** k for k in range(n)]
    mean = sum(values) / n
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / freedom)
    found_mean, low, high = seeds_interval(values)
    assert found_mean == pytest.approx(mean)
    assert (high - mean) / (deviation / math.sqrt(n)) == pytest.approx(quantile, abs=2.5e-3)
    assert high - mean == pytest.approx(mean - low)


def test_two_seeds_have_a_wide_interval() -> None:
    # the normal quantile would claim 0.25 +- 0.49
    mean, low, high = seeds_interval([0.0, 0.5])
    assert (mean, low, high) == (0.25, pytest.approx(0.25 - 12.706 * 0.25), pytest.approx(0.25 + 12.706 * 0.25))


def test_one_seed_has_no_interval() -> None:
    assert seeds_interval([0.7]) == (0.7, 0.7, 0.7)


def test_equal_seeds_have_an_interval_of_no_width() -> None:
    assert seeds_interval([0.5] * 4) == (0.5, 0.5, 0.5)
