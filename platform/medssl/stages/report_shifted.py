"""The report's section on shifted sets: what was judged of each, and how the scores there stand beside those at home."""

from __future__ import annotations

from medssl.stages.report_data import ReportData, arm_order, complete, metric_order, protocol_order
from medssl.stages.report_page import Block, Column, Fold, Table, Text
from medssl.stages.report_text import as_float, metric_title, number3, signed3, title_of


def shifted_sets(data: ReportData) -> list[Block | None]:
    """Of each set: its images in words, then a table per protocol; metrics other than the main one folded."""
    frame = complete(data.shifted, "shifted")
    if frame.empty:
        return []
    about = (
        "The classifiers above, applied to other data as they are. A score at home is over the study's own "
        f"{data.judged} images of the classes that the set has, and probabilities are those of these classes alone, as on the "
        "set: the rest of the difference is the other images."
    )
    if data.findings:
        about = (
            "The classifiers above, applied to other data as they are. A score at home is over the study's own "
            f"{data.judged} images and the findings that the set has."
        )
    blocks: list[Block | None] = [Text(about), *(Text(note) for note in data.shifted_notes)]
    metrics = [metric for metric in metric_order(data) if (frame["metric"] == metric).any()]
    tables = [(metric, _table(data, str(name), metric)) for name in frame["set"].unique() for metric in metrics]
    blocks += [table for metric, table in tables if metric == metrics[0]]
    others: list[Block] = [table for metric, table in tables if metric != metrics[0]]
    return [*blocks, Fold("The same for the other metrics", others) if others else None]


def _table(data: ReportData, name: str, metric: str) -> Table:
    frame = complete(data.shifted, "shifted")
    mine = frame[(frame["set"] == name) & (frame["metric"] == metric)]
    found = {(str(row["protocol"]), str(row["arm"])): row for _, row in mine.iterrows()}
    lines = []
    for protocol in protocol_order(data):
        for arm in arm_order(data):
            row = found.get((protocol, arm))
            if row is not None:
                home, away = as_float(row["home"]), as_float(row["away"])
                lines.append([title_of(protocol), arm, number3(home), number3(away), signed3(away - home)])
    columns = [
        Column("protocol"), Column("arm"), Column("at home", "", True), Column(f"on {name}", "", True),
        Column("difference", "", True),
    ]  # fmt: skip
    return Table(f"{metric_title(metric).capitalize()} at home and on {name}, mean over all runs.", columns, lines)
