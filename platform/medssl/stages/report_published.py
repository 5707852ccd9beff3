"""The report's section on a paper's tables: its p values beside Welch's from its means, its scores beside the study's."""

from __future__ import annotations

from medssl.stages.report_data import PublishedFacts, ReportData, complete
from medssl.stages.report_page import Block, Column, Table, Text
from medssl.stages.report_text import NONE, mean_std, metric_title, title_of

_AGREES = {"yes": "yes", "nearly": "within 10%", "no": "no"}


def published(data: ReportData) -> list[Block | None]:
    """Of each table a paper prints: scores, then tests."""
    blocks: list[Block | None] = []
    for facts in data.published:
        blocks += [_scores(data, facts), _tests(facts)]
        off = [test for test in facts.tests if test.agreement == "no"]
        if off:
            names = ", ".join(f"{test.published.first} and {test.published.second}" for test in off)
            blocks.append(
                Text(
                    f"Welch's test of the printed means and standard deviations does not give the printed p for {names}: the "
                    "paper's test was another one, or was made from other numbers than it prints."
                )
            )
    return blocks


def _scores(data: ReportData, facts: PublishedFacts) -> Table:
    summary = complete(data.summary, "summary")
    lines = []
    for name, (mean, std) in facts.rows.items():
        arm = facts.arms.get(name)
        mine = summary[(summary["arm"] == arm) & (summary["protocol"] == facts.protocol) & (summary["metric"] == facts.metric)]
        ours = mean_std(mine["mean"].iloc[0], mine["std"].iloc[0]) if len(mine) else NONE
        lines.append([name, mean_std(mean, std), *([arm or NONE, ours] if facts.arms else [])])
    columns = [Column("row"), Column("printed", "mean ± std", True)]
    columns += [Column("arm"), Column("this study", "mean ± std", True)] if facts.arms else []
    what = f"{metric_title(facts.metric)} as {facts.source} prints it, over {facts.runs} runs"
    beside = f", beside this study's ({title_of(facts.protocol)})" if facts.arms and facts.protocol else ""
    return Table(f"{what[0].upper()}{what[1:]}{beside}.", columns, lines)


def _tests(facts: PublishedFacts) -> Table | None:
    if not facts.tests:
        return None
    signs = {"greater": "over", "two-sided": "against"}
    lines = [
        [
            f"{test.published.first} {signs[test.published.alternative]} {test.published.second}",
            "one-sided" if test.published.alternative == "greater" else "two-sided",
            f"{'< ' if test.published.is_bound else ''}{test.published.p:.3g}",
            f"{test.p:.3g}",
            _AGREES[test.agreement],
        ]
        for test in facts.tests
    ]
    columns = [
        Column("rows"), Column("test"), Column("p", "printed", True), Column("p", "Welch, from the printed means", True),
        Column("the same"),
    ]  # fmt: skip
    return Table(f"Tests of {metric_title(facts.metric)} that {facts.source} prints, recomputed.", columns, lines)
