"""Paper 000 (skin cancer, Barlow Twins, 35 runs): its Table 13 recomputed from its Table 4, the cells that differ marked."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError
from scipy import stats

from medssl.recipe import Recipe
from medssl.stages.report import render
from medssl.stages.report_data import ReportData
from medssl.stages.report_facts import published_tables
from medssl.statistics import PublishedTest, recompute_published

# Table 4: accuracy mean, std, weighted F1 mean, std; further pretraining on the IUD images.
TABLE_4 = {
    "SL": (0.65701, 0.02109, 0.66873, 0.01710),
    "SSL": (0.69112, 0.01117, 0.69628, 0.00902),
    "SL+SSL": (0.69565, 0.00954, 0.70213, 0.00814),
    "SL+SSL_p": (0.69809, 0.01413, 0.70484, 0.01213),
    "SSL+SSL": (0.69852, 0.00893, 0.70550, 0.00746),
    "SSL+SSL_p": (0.69734, 0.01002, 0.70499, 0.00837),
}
RUNS = 35

# Table 13: first, second, alternative; for accuracy and for F1 the printed p, whether it is a bound, Welch's p from Table 4,
# and whether the two agree. The bounds of the first three "no" cells belong to other numbers than Table 4 shows; the value
# 0.47254 comes from one standard deviation used for both rows.
TABLE_13 = [
    ("SSL", "SL", "greater", (1e-10, True, 1.2801e-11, "yes"), (1e-10, True, 1.4271e-11, "yes")),
    ("SSL+SSL", "SSL", "greater", (0.00147, False, 0.0016026, "nearly"), (1e-6, True, 7.9648e-06, "no")),
    ("SSL+SSL_p", "SSL", "greater", (0.00796, False, 0.0083993, "nearly"), (1e-4, True, 4.1707e-05, "yes")),
    ("SL+SSL", "SL", "greater", (1e-19, True, 2.2056e-13, "no"), (1e-13, True, 2.6287e-14, "yes")),
    ("SL+SSL_p", "SL", "greater", (1e-13, True, 5.9872e-14, "yes"), (1e-14, True, 4.0861e-15, "yes")),
    ("SSL+SSL", "SSL+SSL_p", "two-sided", (0.60469, False, 0.60469, "yes"), (0.78867, False, 0.78867, "yes")),
    ("SL+SSL", "SL+SSL_p", "two-sided", (0.47254, False, 0.40055, "no"), (0.27684, False, 0.27684, "yes")),
    ("SL+SSL_p", "SSL+SSL_p", "two-sided", (0.79869, False, 0.79869, "yes"), (0.95218, False, 0.95218, "yes")),
]


@pytest.mark.parametrize("column", ["accuracy", "f1_weighted"])
def test_table_13_from_table_4(column: str) -> None:
    at = ("accuracy", "f1_weighted").index(column)
    rows = {name: (numbers[2 * at], numbers[2 * at + 1], RUNS) for name, numbers in TABLE_4.items()}
    cells = [(first, second, alternative, both[at]) for first, second, alternative, *both in TABLE_13]
    tests = [PublishedTest(first, second, alternative, p, bound) for first, second, alternative, (p, bound, _, _) in cells]
    for found, (first, second, alternative, (printed, bound, expected, agreement)) in zip(
        recompute_published(rows, tests), cells, strict=True
    ):
        assert found.p == pytest.approx(expected, rel=1e-4)
        theirs = stats.ttest_ind_from_stats(*rows[first], *rows[second], equal_var=False, alternative=alternative)
        assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert found.agreement == agreement, (first, second, printed, bound)
    differing = {("accuracy", 2), ("f1_weighted", 1)}
    assert (column, sum(cell[3][3] == "no" for cell in cells)) in differing


def test_one_standard_deviation_used_twice_gives_the_papers_value() -> None:
    """Where 0.47254 comes from: the standard deviation of SL+SSL_p for both rows."""
    rows = {"SL+SSL": (0.69565, 0.01413, RUNS), "SL+SSL_p": (0.69809, 0.01413, RUNS)}
    [found] = recompute_published(rows, [PublishedTest("SL+SSL", "SL+SSL_p", "two-sided", 0.47254)])
    assert found.agreement == "yes"
    assert found.p == pytest.approx(0.47254, abs=5e-5)


def test_what_is_refused() -> None:
    rows = {"a": (0.5, 0.1, 5), "b": (0.4, 0.1, 5)}
    with pytest.raises(ValueError, match="no row is named 'c': choose from a, b"):
        recompute_published(rows, [PublishedTest("a", "c", "greater", 0.1)])
    with pytest.raises(ValueError, match="is 0: it lies above 0"):
        recompute_published(rows, [PublishedTest("a", "b", "greater", 0)])


def recipe(study: dict[str, Any] | None = None, /, **changes: Any) -> Recipe:
    """A study that shows the accuracies of Table 4, two of whose rows it has an arm for."""
    tests = [
        {"first": first, "second": second, "alternative": alternative, "p": f"< {p}" if bound else p}
        for first, second, alternative, (p, bound, _, _), _ in TABLE_13
    ]
    table = {
        "source": "paper 000, tables 4 and 13", "metric": "accuracy", "runs": RUNS, "protocol": "tune",
        "rows": {name: numbers[:2] for name, numbers in TABLE_4.items()}, "arms": {"SSL": "barlow"}, "tests": tests,
    }  # fmt: skip
    fields = {"study": "s", "dataset": "d", "arms": [{"name": "barlow"}], "protocols": [{"name": "tune", "kind": "fine_tune"}]}
    return Recipe.model_validate(fields | (study or {}) | {"published": [table | changes]})


def test_the_report_prints_welch_beside_the_papers_p() -> None:
    summary = pd.DataFrame([{"arm": "barlow", "protocol": "tune", "metric": "accuracy", "mean": 0.5, "std": 0.02, "n": 35}])
    files = render(ReportData("s", summary=summary, published=published_tables(recipe())))
    text = files["report.md"].decode().replace("&lt;", "<")
    assert "## What the paper prints" in text
    assert "| SSL | 0.691 ± 0.011 | barlow | 0.500 ± 0.020 |" in text and "| SL | 0.657 ± 0.021 | – | – |" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "-sided |" in line]
    assert len(lines) == len(TABLE_13)
    for line, (first, second, alternative, (printed, bound, expected, agreement), _) in zip(lines, TABLE_13, strict=True):
        assert line[0] == f"{first} {'over' if alternative == 'greater' else 'against'} {second}"
        assert line[2:4] == [f"{'< ' if bound else ''}{printed:.3g}", f"{expected:.3g}"]
        assert line[4] == {"yes": "yes", "nearly": "within 10%", "no": "no"}[agreement]
    assert "does not give the printed p for SL+SSL and SL, SL+SSL and SL+SSL_p" in text


def test_means_without_a_standard_deviation_and_rows_of_several_protocols() -> None:
    """As papers 001 and 002 print them, and table 5 of paper 000."""
    protocols = [{"name": name, "kind": "fine_tune"} for name in ("tune", "tune_80")]
    rows = {"SL": 0.657, "40 epochs": [0.35802, 0.01834], "80 epochs": [0.36460, 0.02142]}
    arms = {"SL": "barlow", "40 epochs": "barlow", "80 epochs": "barlow"}
    named = {"SL": "tune", "40 epochs": "tune", "80 epochs": "tune_80"}
    study = recipe({"protocols": protocols}, rows=rows, arms=arms, protocol=named, runs=None, tests=[])
    scores = [{"arm": "barlow", "protocol": "tune", "mean": 0.5}, {"arm": "barlow", "protocol": "tune_80", "mean": 0.6}]
    summary = pd.DataFrame([each | {"metric": "accuracy", "std": 0.02, "n": 5} for each in scores])
    text = render(ReportData("s", summary=summary, published=published_tables(study)))["report.md"].decode()
    assert "| SL | 0.657 | barlow | 0.500 ± 0.020 |" in text
    assert "| 40 epochs | 0.358 ± 0.018 | barlow | 0.500 ± 0.020 |" in text
    assert "| 80 epochs | 0.365 ± 0.021 | barlow | 0.600 ± 0.020 |" in text
    assert "prints it, beside this study's." in text and "runs" not in text.split("prints it,")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"SSLL": "barlow"}}, "no row is named 'SSLL'"),
        ({"arms": {"SSL": "barlo"}}, "names arm 'barlo': did you mean 'barlow'"),
        ({"protocol": None}, "protocol has to say whose scores"),
        ({"protocol": "tuned"}, "names protocol 'tuned': did you mean 'tune'"),
        ({"protocol": {"SL": "tune"}}, "protocol has to say whose scores row 'SSL' shows"),
        ({"protocol": {"SSL": "tuned"}}, "names protocol 'tuned': did you mean 'tune'"),
        ({"protocol": {"SSL": "tune", "SSLL": "tune"}}, "no row is named 'SSLL'"),
        ({"runs": None}, "tests are of means over several runs: give runs"),
        ({"runs": 1}, "tests are of means over several runs: give runs"),
        ({"rows": {name: row[:2] for name, row in TABLE_4.items()} | {"SL": 0.657}}, "row 'SL' has no standard deviation"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy'"),
        ({"tests": [{"first": "SSL", "second": "SL", "p": "below 0.1"}]}, "write a value as 0.05 or a bound"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(**changes)
