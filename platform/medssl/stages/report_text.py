"""How a report writes numbers and names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

METRIC_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_weighted": "weighted F1",
    "f1_macro": "macro F1",
    "auc": "AUC",
    "expected_calibration_error": "calibration error (ECE)",
}
NONE = "–"
"""Stands where there is no number."""


def title_of(name: str) -> str:
    """A name from a recipe or frame as a reader sees it."""
    return name.replace("_", " ")


def metric_title(name: str) -> str:
    """A metric's name in running text."""
    return METRIC_TITLES.get(name, title_of(name))


def place(order: Sequence[str], value: object) -> int:
    """Position of a name in an order; behind the last where it is not in it."""
    return order.index(str(value)) if str(value) in order else len(order)


def as_float(value: Any) -> float:
    """The value as a float; NaN for what is missing or no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def number3(value: Any) -> str:
    """Three decimals; one significant digit where that would show a number that is not zero as zero."""
    x = as_float(value)
    if not math.isfinite(x):
        return NONE
    if x != 0 and abs(x) < 0.0005:
        return f"{x:.1g}" if abs(x) >= 1e-6 else f"{x:.0e}"
    return f"{x:.3f}"


def signed3(value: Any) -> str:
    """As `number3`, always with its sign (a true minus)."""
    text = number3(value)
    if text == NONE:
        return text
    return f"−{text[1:]}" if text.startswith("-") else f"+{text}"


def mean_std(mean: Any, std: Any) -> str:
    """`0.490 ± 0.021`; the mean alone where there is no standard deviation (a single value)."""
    spread = number3(std)
    return number3(mean) if NONE in (spread, number3(mean)) else f"{number3(mean)} ± {spread}"


def interval(low: Any, high: Any) -> str:
    """`+0.041 to +0.091`."""
    return NONE if NONE in (number3(low), number3(high)) else f"{signed3(low)} to {signed3(high)}"


def p_value(value: Any) -> str:
    """Three decimals, or `< 0.001`."""
    p = as_float(value)
    return NONE if not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(value: Any) -> str:
    """A count with thousands separated."""
    x = as_float(value)
    return f"{round(x):,}" if math.isfinite(x) else NONE


def some(words: Sequence[str], separator: str, most: int = 6) -> str:
    """The words, of many the first and how many there are: a study of ten arms under ten protocols has a hundred."""
    if len(words) <= most + 1:
        return separator.join(words)
    return f"{separator.join(words[:most])}{separator}and {len(words) - most} more"


def plural(number: int, word: str, words: str | None = None) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number:,} {word if number == 1 else words or word + 's'}"


def cell(value: Any) -> str:
    """A value of a table whose columns are not known beforehand."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return NONE
    x = as_float(value)
    if isinstance(value, str) or not math.isfinite(x):
        return NONE if not isinstance(value, str) and math.isnan(x) else str(value)
    if x.is_integer() and abs(x) < 1e15:
        return f"{x:,.0f}"
    return f"{x:,.1f}" if abs(x) >= 100 else number3(x)
