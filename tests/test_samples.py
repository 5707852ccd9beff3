"""Tests of two samples against scipy, textbook values and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from medssl.statistics import effect_size, equivalence, holm, welch_from_summary


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_welch_from_summary_equals_the_samples_own(alternative: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.51, 0.02, 35), rng.normal(0.50, 0.01, 12)
    summary = a.mean(), a.std(ddof=1), 35, b.mean(), b.std(ddof=1), 12
    expected = stats.ttest_ind(a, b, equal_var=False, alternative=alternative).pvalue
    assert welch_from_summary(*summary, alternative) == pytest.approx(expected, rel=1e-12)  # type: ignore[arg-type]


def test_welch_by_hand() -> None:
    """Means 10 and 8, standard deviations 2 and 3, 10 and 15 runs: t and the degrees of freedom from the formula."""
    t = 2 / math.sqrt(4 / 10 + 9 / 15)
    freedom = (0.4 + 0.6) ** 2 / (0.4**2 / 9 + 0.6**2 / 14)
    assert welch_from_summary(10, 2, 10, 8, 3, 15, "greater") == pytest.approx(stats.t.sf(t, freedom))
    assert welch_from_summary(10, 2, 10, 8, 3, 15, "less") == pytest.approx(stats.t.cdf(t, freedom))
    assert welch_from_summary(10, 2, 10, 8, 3, 15) == pytest.approx(2 * stats.t.sf(t, freedom))


def test_runs_without_spread() -> None:
    assert welch_from_summary(1, 0, 5, 1, 0, 5) == 1
    assert welch_from_summary(2, 0, 5, 1, 0, 5, "greater") == 0
    assert welch_from_summary(2, 0, 5, 1, 0, 5, "less") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 1, 1, 1, 1, 5), "two runs on each side: there are 1 and 5"),
        ((1, -1, 5, 1, 1, 5), "0 or more: they are -1 and 1"),
        ((1, 1, 5, 1, 1, 5, "larger"), "'larger': choose two-sided, greater or less"),
    ],
)
def test_summaries_that_are_refused(arguments: tuple[float, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        welch_from_summary(*arguments)  # type: ignore[arg-type]


def test_equivalence_is_two_one_sided_tests() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.50, 0.02, 35), rng.normal(0.505, 0.03, 20)
    found = equivalence(a, b, 0.02)
    lower = stats.ttest_ind(a + 0.02, b, equal_var=False, alternative="greater").pvalue
    upper = stats.ttest_ind(a - 0.02, b, equal_var=False, alternative="less").pvalue
    assert found.p == pytest.approx(max(lower, upper), rel=1e-12)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.90)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.02, 0.05])
def test_equivalent_at_5_percent_is_a_90_percent_interval_within_the_margin(margin: float) -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        found = equivalence(rng.normal(0.5, 0.02, 8), rng.normal(0.503, 0.02, 8), margin)
        assert (found.p < 0.05) is (-margin < found.low and found.high < margin)


def test_two_means_a_margin_apart_are_seldom_called_equivalent() -> None:
    """At the margin itself the test errs in 5% of the studies."""
    rng = np.random.default_rng(3)
    wrong = sum(equivalence(rng.normal(0.02, 0.01, 10), rng.normal(0, 0.01, 10), 0.02).p < 0.05 for _ in range(2000))
    assert wrong / 2000 == pytest.approx(0.05, abs=0.015)
    with pytest.raises(ValueError, match="margin is 0"):
        equivalence([1, 2], [1, 2], 0)


def test_effect_size_is_unbiased() -> None:
    """Averaged over many small samples it is the difference in standard deviations; without the correction 11% more."""
    rng = np.random.default_rng(4)
    sizes = [effect_size(rng.normal(0.8, 1, 5), rng.normal(0, 1, 5)) for _ in range(20_000)]
    assert np.mean(sizes) == pytest.approx(0.8, abs=0.02)
    a, b = np.array([1.0, 2, 3, 4]), np.array([0.0, 1, 2, 3])
    exact = math.gamma(3) / (math.sqrt(3) * math.gamma(2.5))  # J(6)
    assert effect_size(a, b) == pytest.approx(1 / a.std(ddof=1) * exact) == -effect_size(b, a)
    assert math.isnan(effect_size([1], [1, 2])) and math.isnan(effect_size([1, 1], [2, 2]))


def test_holm_by_its_definition() -> None:
    """The smallest is multiplied by m, the next by m - 1 ..., and none is below one that came before it."""
    rng = np.random.default_rng(5)
    for size in (1, 2, 7, 30):
        given = rng.uniform(0, 0.2, size)
        expected, largest = [0.0] * size, 0.0
        for rank, place in enumerate(sorted(range(size), key=lambda k: given[k])):
            largest = max(largest, min(1.0, (size - rank) * given[place]))
            expected[place] = largest
        assert holm(given).tolist() == pytest.approx(expected)
    assert holm([0.01, float("nan"), 0.04]).tolist()[::2] == pytest.approx([0.02, 0.04])
    assert holm([]).tolist() == []
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
