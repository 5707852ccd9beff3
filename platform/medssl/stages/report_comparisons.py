"""The comparisons of a report as tables: what each claim rests on, and every test of the study one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from medssl.stages.report_data import (
    BOOTSTRAP,
    EQUIVALENCE,
    NOT_REPORTED,
    SAME_AGAINST_SAME,
    WELCH,
    ReportData,
    complete,
    metric_order,
    protocol_order,
)
from medssl.stages.report_page import Column, Table
from medssl.stages.report_text import NONE, as_float, interval, metric_title, p_value, place, signed3, title_of

KEYS = ("better", "than", "protocol", "metric")
"""Columns that make a claim."""
ADDED = "added after the first run"


def comparison_table(data: ReportData, metrics: Sequence[str]) -> Table | None:
    """One row a comparison: the nested bootstrap's evidence, the Welch test, and beside it that test where nothing differs."""
    frame = complete(data.comparisons, "comparisons")
    kept = frame[frame["metric"].isin(list(metrics)) & frame["test"].isin([BOOTSTRAP, EQUIVALENCE, WELCH, NOT_REPORTED])]
    if kept.empty:
        return None
    shown = [metric for metric in metric_order(data) if (kept["metric"] == metric).any()]
    equivalence, tests = bool((kept["test"] == EQUIVALENCE).any()), corrected_tests(frame)
    rows = claims(kept)
    plans = [_plan(by_test) for _, by_test in rows]
    marked = any(plan not in ("yes", NONE) for plan in plans)
    lines = []
    for (key, by_test), plan in zip(rows, plans, strict=True):
        evidence, welch = by_test.get(BOOTSTRAP), by_test.get(WELCH)
        first = evidence if evidence is not None else welch
        line = [f"{key[0]} over {key[1]}", title_of(key[2])]
        line += [metric_title(key[3])] if len(shown) > 1 else []
        line.append(NONE if first is None else signed3(first["difference"]))
        line += [NONE] * 3 if evidence is None else _evidence(evidence, tests)
        line += [_equivalence(by_test.get(EQUIVALENCE), tests)] if equivalence else []
        line += [NONE if welch is None else p_value(welch["p"]), _same_line(frame, key[2], key[3])]
        line += [plan] if marked else []
        lines.append(line)
    corrected = " (Holm)" if tests > 1 else ""
    columns = [
        Column("comparison"), Column("protocol"), *([Column("metric")] if len(shown) > 1 else []), Column("difference", "", True),
        Column(f"{data.interval_level:.0%} interval", BOOTSTRAP, True), Column(f"p{corrected}", BOOTSTRAP, True),
        Column("Hedges' g", "over all runs", True),
        *([Column("equivalence", f"margin: p{corrected}", True)] if equivalence else []),
        Column("p", WELCH, True), Column("p of A/A line", "random against random", True),
        *([Column("planned")] if marked else []),
    ]  # fmt: skip
    return Table(_caption(data, shown, equivalence, tests), columns, lines)


def _caption(data: ReportData, metrics: Sequence[str], equivalence: bool, tests: int) -> str:
    caption = f"Comparisons on the {data.judged} split"
    caption += f", by {metric_title(metrics[0])}." if len(metrics) == 1 else "."
    caption += " The interval is the evidence. A/A: Welch's test where nothing differs."
    if tests > 1:
        caption += f" Holm: p corrected for the {tests} tests that this study makes on the nested bootstrap; intervals are not."
    caption += (
        " Hedges' g: the difference in standard deviations over all runs of an arm; runs share encoders and labels, so it "
        "describes the size and proves nothing."
    )
    if equivalence:
        span = 2 * data.interval_level - 1
        caption += (
            f" Equivalence: small p where the two differ by less than the margin (two one-sided tests; the {span:.0%} interval "
            "lies within it)."
        )
    return caption


def claims(frame: pd.DataFrame) -> list[tuple[tuple[str, ...], dict[str, pd.Series]]]:
    """The rows of each claim by their test, claims in order of appearance."""
    found: dict[tuple[str, ...], dict[str, pd.Series]] = {}
    for _, row in frame.iterrows():
        found.setdefault(tuple(str(row[k]) for k in KEYS), {})[str(row["test"])] = row
    return list(found.items())


def corrected_tests(comparisons: pd.DataFrame) -> int:
    """How many tests were corrected together by Holm's rule."""
    return int(sum(np.isfinite(as_float(p)) for p in complete(comparisons, "comparisons")["p_holm"]))


def is_planned(value: Any) -> bool | None:
    """A cell of the column `planned`: True, False, or None for an empty one."""
    if value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA:
        return None
    return bool(value)


def margin_of(row: pd.Series) -> str:
    """The margin of an equivalence test, as the recipe gives it."""
    return f"{as_float(row['margin']):g}"


def _evidence(row: pd.Series, tests: int) -> list[str]:
    return [interval(row["low"], row["high"]), _both(row, tests), signed3(row["effect_size"])]


def _equivalence(row: pd.Series | None, tests: int) -> str:
    return NONE if row is None else f"±{margin_of(row)}: {_both(row, tests)}"


def _both(row: pd.Series, tests: int) -> str:
    """p, and in brackets what Holm's rule makes of it where there is more than one test."""
    return p_value(row["p"]) + (f" ({p_value(row['p_holm'])})" if tests > 1 else "")


def _plan(by_test: Mapping[str, pd.Series]) -> str:
    """Whether a claim was in the list of the first run, and its margin."""
    dropped, tested = by_test.get(NOT_REPORTED), by_test.get(EQUIVALENCE)
    shown = next((row for test, row in by_test.items() if test not in (NOT_REPORTED, EQUIVALENCE)), None)
    if shown is None:
        return NOT_REPORTED
    planned = is_planned(shown["planned"])
    words = [NONE if planned is None else "yes" if planned else ADDED]
    if planned and tested is not None and is_planned(tested["planned"]) is False:
        words.append(f"margin ±{margin_of(tested)} {ADDED}")
    if dropped is not None:
        words.append(f"margin ±{margin_of(dropped)} {NOT_REPORTED}")
    return "; ".join(words)


def _same_line(frame: pd.DataFrame, protocol: str, metric: str) -> str:
    """p of the A/A rows of a protocol and metric: the one value, or the range over pairs."""
    p = same_against_same(frame, protocol, metric)
    if not len(p):
        return NONE
    low, high = p_value(p.min()), p_value(p.max())
    return low if len(p) == 1 else f"{low} … {high} ({len(p)} pairs)" if low != high else f"{low} ({len(p)} pairs)"


def same_against_same(comparisons: pd.DataFrame, protocol: str | None = None, metric: str | None = None) -> np.ndarray:
    """p values of the A/A rows, of one protocol and metric if given."""
    rows = comparisons[comparisons["test"] == SAME_AGAINST_SAME] if "test" in comparisons else comparisons.iloc[:0]
    for column, value in (("protocol", protocol), ("metric", metric)):
        rows = rows if value is None or rows.empty else rows[rows[column] == value]
    p = pd.to_numeric(rows["p"], errors="coerce").to_numpy(dtype=float) if len(rows) else np.empty(0)
    return p[np.isfinite(p)]


def all_tests_table(data: ReportData) -> Table | None:
    """Every row of the comparisons as it is, the A/A rows right below the Welch tests of their protocol and metric."""
    frame = complete(data.comparisons, "comparisons")
    if frame.empty:
        return None
    rank = {BOOTSTRAP: 0, EQUIVALENCE: 1, WELCH: 2, SAME_AGAINST_SAME: 3, NOT_REPORTED: 4}
    order = frame.assign(
        _protocol=[place(protocol_order(data), v) for v in frame["protocol"]],
        _metric=[place(metric_order(data), v) for v in frame["metric"]],
        _test=[rank.get(str(v), 5) for v in frame["test"]],
    ).sort_values(["_protocol", "_metric", "_test"], kind="stable")
    lines = [
        [
            f"{row['better']} over {row['than']}", title_of(str(row["protocol"])), metric_title(str(row["metric"])),
            _test_name(data, row), signed3(row["difference"]), interval(row["low"], row["high"]), p_value(row["p"]),
            p_value(row["p_holm"]), {True: "yes", False: ADDED, None: NONE}[is_planned(row["planned"])],
        ]
        for _, row in order.iterrows()
    ]  # fmt: skip
    columns = [
        Column("comparison"), Column("protocol"), Column("metric"), Column("test"), Column("difference", "", True),
        Column(f"{data.interval_level:.0%} interval", "", True), Column("p", "", True), Column("p, Holm", "", True),
        Column("planned"),
    ]  # fmt: skip
    return Table("Every test of this study.", columns, lines)


def _test_name(data: ReportData, row: pd.Series) -> str:
    """The test with what else tells it: an equivalence test has a margin, and an interval at twice its level."""
    name = str(row["test"])
    if name == EQUIVALENCE:
        return f"equivalence within ±{margin_of(row)} ({2 * data.interval_level - 1:.0%} interval)"
    has_margin = name == NOT_REPORTED and np.isfinite(as_float(row["margin"]))
    return f"{name} (margin ±{margin_of(row)})" if has_margin else name
