"""How the report rounds numbers and draws scales, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.stages.report_figures import _thin
from medssl.stages.report_svg import Scale, linear_ticks, log_ticks, shade, short
from medssl.stages.report_text import interval, number3, p_value, signed3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4895, "0.489"), (0.0, "0.000"), (0.0004, "0.0004"), (-0.00041, "-0.0004"), (np.nan, "–"), (None, "–"),
     (1.0, "1.000"), (1e-9, "1e-09"), (np.inf, "–")],
)  # fmt: skip
def test_numbers_are_rounded_honestly(value: float | None, text: str) -> None:
    assert number3(value) == text


def test_signs_intervals_and_p_values() -> None:
    assert signed3(-0.0221) == "−0.022"
    assert signed3(0.05) == "+0.050"
    assert interval(0.0002, 0.05) == "+0.0002 to +0.050"
    assert interval(np.nan, 0.05) == "–"
    assert (p_value(0.00099), p_value(0.001), p_value(0), p_value(np.nan)) == ("< 0.001", "0.001", "< 0.001", "–")


def test_short_labels() -> None:
    labels = [short(v) for v in (0, 1e-5, 1.5e-4, 0.001, 0.0125, -0.025, 12, 212.4, 4321, 2e6)]
    assert labels == ["0", "1e-5", "1.5e-4", "0.001", "0.0125", "−0.025", "12", "212", "4321", "2e6"]


def test_ticks_lie_inside_and_are_round() -> None:
    assert linear_ticks(0.41, 0.52, 5) == [0.425, 0.45, 0.475, 0.5]
    assert linear_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert log_ticks(1e-4, 1e-1) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert log_ticks(0.9, 11) == [1, 2, 5, 10]
    scale = Scale(1, 100, 0, 10, log=True)
    assert (scale(1), scale(10), scale(100)) == pytest.approx((0, 5, 10))


def test_text_on_every_shade_is_readable() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for share in np.linspace(0, 1, 101):
        light, dark = sorted((luminance(c) for c in shade(share)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 3.9, share  # WCAG's formula; 3 is its bound for figures


def test_long_curves_are_thinned_to_means() -> None:
    x, y = _thin(np.arange(4800.0), np.arange(4800.0) * 2)
    assert len(x) == 240
    assert y.mean() == pytest.approx(4799)
    assert x[0] == pytest.approx(9.5)
