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
        arm, protocol = facts.arms.get(name), facts.protocols.get(name)
        mine = summary[(summary["arm"] == arm) & (summary["protocol"] == protocol) & (summary["metric"] == facts.metric)]
        ours = mean_std(mine["mean"].iloc[0], mine["std"].iloc[0]) if len(mine) else NONE
        lines.append([name, mean_std(mean, std), *([arm or NONE, ours] if facts.arms else [])])
    spread = "mean ± std" if any(std is not None for _, std in facts.rows.values()) else "mean"
    columns = [Column("row"), Column("printed", spread, True)]
    columns += [Column("arm"), Column("this study", "mean ± std", True)] if facts.arms else []
    over = "" if facts.runs is None else f", over {facts.runs} runs"
    return Table(f"{_first_up(metric_title(facts.metric))} as {facts.source} prints it{over}{_beside(facts)}.", columns, lines)


def _first_up(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _beside(facts: PublishedFacts) -> str:
    if not facts.arms:
        return ""
    judged = set(facts.protocols.values())
    return ", beside this study's" + (f" ({title_of(judged.pop())})" if len(judged) == 1 else "")


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
