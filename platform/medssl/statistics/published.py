"""Welch's tests recomputed from the means and standard deviations that a paper prints, beside the p values it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from medssl.statistics.samples import Alternative, Summary, welch_from_summary

_LAST_DIGIT = 0.01
"""Largest relative distance of two p values that count as the same: a paper's means and p values are rounded."""
_NEARLY = 0.1


@dataclass(frozen=True)
class PublishedTest:
    """One p value of a paper's table."""

    first: str
    """Row whose mean is claimed to be greater, or to differ."""
    second: str
    alternative: Alternative
    """`greater` where the null hypothesis is first <= second, `two-sided` where it is first = second."""
    p: float
    is_bound: bool = False
    """Whether the paper prints `< p`."""


@dataclass(frozen=True)
class RecomputedTest:
    """A published p value, and Welch's from the published means and standard deviations."""

    published: PublishedTest
    p: float
    agreement: Literal["yes", "nearly", "no"]
    """yes: within 1% of the printed value, or below the printed bound. nearly: within 10% of the value."""


def recompute_published(rows: Mapping[str, Summary], tests: Sequence[PublishedTest]) -> list[RecomputedTest]:
    """Each test again by `welch_from_summary`, in order.

    Where the two disagree the paper's test was another one, or was made from other numbers than its table shows; this
    cannot tell which.

    Args:
        rows: mean, standard deviation (n - 1) and number of runs by the row's name.

    Raises:
        ValueError: a test names a row that is not there, or a p outside 0 to 1.
    """
    found = []
    for test in tests:
        missing = [name for name in (test.first, test.second) if name not in rows]
        if missing:
            raise ValueError(f"no row is named '{missing[0]}': choose from {', '.join(rows)}")
        if not 0 < test.p <= 1:
            raise ValueError(f"published p of {test.first} and {test.second} is {test.p}: it lies above 0 and up to 1")
        p = welch_from_summary(*rows[test.first], *rows[test.second], test.alternative)
        found.append(RecomputedTest(test, p, _agreement(test, p)))
    return found


def _agreement(test: PublishedTest, p: float) -> Literal["yes", "nearly", "no"]:
    if test.is_bound:
        return "yes" if p < test.p else "no"
    off = abs(p / test.p - 1)
    return "yes" if off <= _LAST_DIGIT else "nearly" if off <= _NEARLY else "no"
