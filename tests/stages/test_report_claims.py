"""How a report words and tabulates claims: equivalence, many tests, claims added or dropped after the first run."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medssl.stages.report import format_result_table, render, result_json
from medssl.stages.report_comparisons import comparison_table
from medssl.stages.report_data import BOOTSTRAP, COLUMNS, EQUIVALENCE, NOT_REPORTED, WELCH, FirstList, ReportData

METRIC = "balanced_accuracy"


def line(better: str, than: str, numbers: tuple[float, float, float, float], test: str, **more: Any) -> dict[str, Any]:
    measured = dict(zip(("difference", "low", "high", "p"), numbers, strict=True))
    return {"better": better, "than": than, "protocol": "probe", "metric": METRIC, "test": test, **measured, **more}


def data(*rows: dict[str, Any], seeds: int = 3, before: int = 0) -> ReportData:
    arms = dict.fromkeys(name for row in rows for name in (row["better"], row["than"]))
    summary = pd.DataFrame([
        {"arm": arm, "protocol": "probe", "metric": METRIC, "mean": 0.5, "std": 0.01, "n": 9, "n_pretraining": seeds, "n_draw": 3,
         "n_head": 1} for arm in arms
    ])  # fmt: skip
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS["comparisons"]))
    return ReportData("s", main_protocol="probe", summary=summary, comparisons=frame, first_list=FirstList("ab" * 32, before))


UNCLEAR = (0.004, -0.011, 0.019, 0.4)
CLEAR = (0.05, 0.02, 0.08, 0.01)


def markdown(shown: ReportData) -> str:
    return render(shown)["report.md"].decode()


def test_two_arms_that_are_equivalent() -> None:
    rows = [
        line("a", "b", UNCLEAR, BOOTSTRAP, p_holm=0.4, effect_size=0.3, planned=True),
        line("a", "b", (0.004, -0.008, 0.016, 0.02), EQUIVALENCE, p_holm=0.04, margin=0.02, planned=True),
    ]
    text = markdown(data(*rows))
    assert "**a and b differ by less than 0.02 (probe).**" in text
    assert "the 90% interval −0.008 to +0.016 lies within it" in text
    assert "nor that" not in text
    assert "±0.02: 0.020 (0.040)" in text and "equivalence within ±0.02 (90% interval)" in text
    assert "differ by less than 0.02 (probe), from a single pretraining." in markdown(data(*rows, seeds=1))
    drawn = render(data(*rows))["report.html"].decode()
    assert "#e3e3e3" in drawn and "within the recipe&#39;s margin" in drawn
    assert "#e3e3e3" not in render(data(rows[0]))["report.html"].decode()


@pytest.mark.parametrize("ps", [(0.2, 0.4), (0.03, 0.06)])
def test_equivalence_that_is_not_shown(ps: tuple[float, float]) -> None:
    rows = [
        line("a", "b", UNCLEAR, BOOTSTRAP, p_holm=0.4, planned=True),
        line("a", "b", (0.004, -0.008, 0.016, ps[0]), EQUIVALENCE, p_holm=ps[1], margin=0.01, planned=True),
    ]
    text = markdown(data(*rows))
    assert "do not show which of the two is better, nor that they differ by less than 0.01." in text
    assert "Not enough evidence: a against b (probe)." in text


def test_a_clear_difference_may_be_immaterial() -> None:
    rows = [
        line("a", "b", (0.01, 0.004, 0.016, 0.001), BOOTSTRAP, p_holm=0.002, planned=True),
        line("a", "b", (0.01, 0.005, 0.015, 0.0001), EQUIVALENCE, p_holm=0.0002, margin=0.05, planned=False),
    ]
    text = markdown(data(*rows))
    assert "**a is better than b (probe).**" in text
    assert "smaller than the margin of 0.05 that the recipe calls immaterial (a margin added after the first run)" in text
    assert "Added after the first run: the margin of 0.05 for a over b (probe, balanced accuracy)." in text
    assert "yes; margin ±0.05 added after the first run" in text
    planned = markdown(data(*(row | {"planned": True} for row in rows)))
    assert "that the recipe calls immaterial: the 90% interval" in planned and "first run |" not in planned


def test_a_difference_that_many_tests_would_find_by_chance() -> None:
    rows = [line("a", f"b{k}", (0.05, 0.001, 0.099, 0.045), BOOTSTRAP, p_holm=0.18, planned=True) for k in range(4)]
    text = markdown(data(*rows))
    assert "is better than" not in text
    assert "a scored better than b2 (probe), but not beyond what so many tests find by chance." in text
    assert "Corrected for the 4 tests of this study (Holm), p is 0.180." in text and "p corrected for the 4 tests" in text
    worse = [row | {"difference": -0.05, "low": -0.099, "high": -0.001} for row in rows]
    assert "a scored worse than b0 (probe), but not" in markdown(data(*worse))
    certain = [row | {"p_holm": 0.03} for row in rows]
    assert "a is better than b3 (probe)." in markdown(data(*certain))


def test_claims_added_and_dropped_are_marked_everywhere() -> None:
    empty = (np.nan,) * 4
    rows = [
        line("a", "b", CLEAR, BOOTSTRAP, p_holm=0.02, planned=True),
        line("a", "b", CLEAR, WELCH, planned=True),
        line("a", "c", CLEAR, BOOTSTRAP, p_holm=0.02, planned=False),
        line("a", "d", empty, NOT_REPORTED, margin=0.02, planned=True),
    ]
    shown = data(*rows)
    text = markdown(shown)
    assert "fixed when this study was first run (recipe abababababab), before any of its evaluations." in text
    assert "Added after the first run: a over c (probe, balanced accuracy)." in text
    assert "Planned, not reported: a over d (probe, balanced accuracy)." in text
    assert text.count("This comparison was added after the first run.") == 1
    table = comparison_table(shown, [METRIC])
    assert table is not None and table.columns[-1].title == "planned"
    assert [(r[0], r[-1]) for r in table.rows] == [
        ("a over b", "yes"), ("a over c", "added after the first run"), ("a over d", "planned, not reported"),
    ]  # fmt: skip
    assert all(len(r) == len(table.columns) for r in table.rows)
    saved = result_json("s", shown.scores, shown.summary, shown.comparisons)["comparisons"]
    assert [(c["than"], c["test"], c["planned"]) for c in saved] == [
        ("b", BOOTSTRAP, True), ("b", WELCH, True), ("c", BOOTSTRAP, False), ("d", NOT_REPORTED, True),
    ]  # fmt: skip
    assert saved[3]["p"] is None and json.loads(json.dumps(saved, allow_nan=False)) == saved
    terminal = format_result_table(shown.summary, shown.comparisons)
    assert "nested bootstrap (added after the first run)" in terminal and "planned, not reported (margin ±0.02)" in terminal
    frame = pd.read_csv(io.BytesIO(render(shown)["comparisons.csv"]))
    assert frame["planned"].tolist() == [True, True, False, True]


def test_a_margin_that_was_dropped_is_named() -> None:
    rows = [
        line("a", "b", CLEAR, BOOTSTRAP, p_holm=0.01, planned=True),
        line("a", "b", (np.nan,) * 4, NOT_REPORTED, margin=0.02, planned=True),
    ]
    text = markdown(data(*rows))
    assert "| yes; margin ±0.02 planned, not reported |" in text
    assert "Planned, not reported: the margin of 0.02 for a over b (probe, balanced accuracy)." in text


def test_a_list_that_came_after_evaluations_says_so() -> None:
    text = markdown(data(line("a", "b", CLEAR, BOOTSTRAP, p_holm=0.01, planned=True), before=12))
    assert "By then 12 evaluations of its arms had been made in this store" in text and "with their scores in view" in text
    assert "before any of its evaluations" not in text


def test_without_a_first_list_nothing_is_said_of_plans() -> None:
    shown = dataclasses.replace(data(line("a", "b", CLEAR, BOOTSTRAP)), first_list=None)
    text = markdown(shown)
    assert "first run" not in text and "| planned |" not in text.split("### Every test")[0]
    assert "a is better than b (probe)." in text
