"""Tests of two samples of scores, from the runs or from the mean, standard deviation and n that a paper prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its parts load with their first use, which most processes never come to
from numpy.typing import ArrayLike, NDArray

Alternative = Literal["two-sided", "greater", "less"]
Summary = tuple[float, float, int]
"""Mean, standard deviation (n - 1), n."""


@dataclass(frozen=True)
class WelchResult:
    """Welch's t test of two sets of runs. Over head seeds it says nothing about the method, only about these encoders."""

    difference: float
    low: float
    """95% interval of the difference, two-sided whatever `p` is."""
    high: float
    t: float
    degrees_of_freedom: float
    p: float
    """Two-sided, or of "first greater than second" when asked one-sided."""
    n: tuple[int, int]


@dataclass(frozen=True)
class EquivalenceResult:
    """Two one-sided t tests (Schuirmann 1987): whether two means differ by less than a margin given beforehand."""

    difference: float
    low: float
    """Interval at twice the level of each test: equivalent at 5% when the 90% interval lies within the margin."""
    high: float
    margin: float
    p: float
    """The larger of the two one-sided p: below the level, the means are equivalent within the margin."""


def welch(first: ArrayLike, second: ArrayLike, *, one_sided: bool = False) -> WelchResult:
    """Welch's t test of two samples of scores; one-sided tests "first is greater"."""
    a, b = np.asarray(first, np.float64).ravel(), np.asarray(second, np.float64).ravel()
    if min(len(a), len(b)) < 2:
        raise ValueError(f"Welch's test needs two runs on each side: there are {len(a)} and {len(b)}")
    return _welch(_summary(a), _summary(b), "greater" if one_sided else "two-sided")


def welch_from_summary(
    mean1: float, std1: float, n1: int, mean2: float, std2: float, n2: int, alternative: Alternative = "two-sided"
) -> float:
    """p of Welch's t test from what a table prints: means, standard deviations (n - 1) and numbers of runs.

    Args:
        alternative: `greater` asks whether the first mean is greater, `less` whether it is smaller.

    Raises:
        ValueError: fewer than two runs on a side, a negative standard deviation, or another alternative.
    """
    if min(n1, n2) < 2:
        raise ValueError(f"Welch's test needs two runs on each side: there are {n1} and {n2}")
    if min(std1, std2) < 0:
        raise ValueError(f"standard deviations are 0 or more: they are {std1} and {std2}")
    if alternative not in ("two-sided", "greater", "less"):
        raise ValueError(f"alternative {alternative!r}: choose two-sided, greater or less")
    return _welch((mean1, std1, n1), (mean2, std2, n2), alternative).p


def equivalence(first: ArrayLike, second: ArrayLike, margin: float, *, level: float = 0.05) -> EquivalenceResult:
    """Whether two samples' means differ by less than `margin`, which must be chosen before the scores are seen.

    Two one-sided Welch tests, as papers make them over head seeds: they hold for these very encoders. For a claim about a
    method take `nested_equivalence`.

    Raises:
        ValueError: a margin that is not above 0, or fewer than two runs on a side.
    """
    if margin <= 0:
        raise ValueError(f"margin is {margin}: give the largest difference that does not matter, above 0")
    a, b = (np.asarray(sample, np.float64).ravel() for sample in (first, second))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"Welch's test needs two runs on each side: there are {len(a)} and {len(b)}")
    above = _welch((float(a.mean()) + margin, *_summary(a)[1:]), _summary(b), "greater")
    below = _welch((float(a.mean()) - margin, *_summary(a)[1:]), _summary(b), "less")
    found = _welch(_summary(a), _summary(b), "two-sided", confidence=1 - 2 * level)
    return EquivalenceResult(found.difference, found.low, found.high, margin, max(above.p, below.p))


def effect_size(first: ArrayLike, second: ArrayLike) -> float:
    """Hedges' g: the difference of the means in units of the pooled standard deviation, corrected for small samples.

    NaN for samples without spread or with fewer than two runs. The correction is exact (Hedges 1981).
    """
    a, b = (np.asarray(sample, np.float64).ravel() for sample in (first, second))
    freedom = len(a) + len(b) - 2
    if min(len(a), len(b)) < 2:
        return float("nan")
    pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / freedom)
    if pooled == 0:
        return float("nan")
    correction = np.exp(scipy.special.gammaln(freedom / 2) - scipy.special.gammaln((freedom - 1) / 2)) / np.sqrt(freedom / 2)
    return float((a.mean() - b.mean()) / pooled * correction)


def holm(p_values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """p values corrected for their number by Holm's step-down rule (1979), in the order given; NaN stays and counts not."""
    given = np.asarray(p_values, np.float64)
    known = np.flatnonzero(~np.isnan(given))
    order = known[np.argsort(given[known], kind="stable")]
    steps = given[order] * (len(order) - np.arange(len(order)))
    corrected = given.copy()
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else steps
    return corrected


def _summary(sample: NDArray[np.float64]) -> Summary:
    return float(sample.mean()), float(sample.std(ddof=1)), len(sample)


def _welch(first: Summary, second: Summary, alternative: Alternative, confidence: float = 0.95) -> WelchResult:
    difference = float(first[0] - second[0])
    squares = [std**2 / n for _, std, n in (first, second)]
    sizes = (first[2], second[2])
    if sum(squares) == 0:
        holds = {"two-sided": difference != 0, "greater": difference > 0, "less": difference < 0}[alternative]
        t = float(np.copysign(np.inf, difference)) if difference else 0.0
        return WelchResult(difference, difference, difference, t, float("nan"), 0.0 if holds else 1.0, sizes)
    freedom = sum(squares) ** 2 / sum(v**2 / (n - 1) for v, n in zip(squares, sizes, strict=True))
    reach = float(scipy.stats.t.ppf((1 + confidence) / 2, freedom)) * float(np.sqrt(sum(squares)))
    test = scipy.stats.ttest_ind_from_stats(*first, *second, equal_var=False, alternative=alternative)
    t, p = float(test.statistic), float(test.pvalue)
    return WelchResult(difference, difference - reach, difference + reach, t, float(freedom), p, sizes)
