"""What a report says of findings: how often each is there and known, AUC by finding, and what was told rightly and wrongly."""

from __future__ import annotations

from medssl.stages.report_data import DatasetFacts, ReportData, arm_order, complete, protocol_order
from medssl.stages.report_page import Block, Column, Fold, Table
from medssl.stages.report_text import count, number3, place, title_of


def auc_table(data: ReportData, protocol: str) -> Table | None:
    """AUC of every finding and their mean, one column an arm: the form of paper 004's chest X-ray tables."""
    frame = complete(data.class_scores, "class_scores")
    frame = frame[frame["protocol"] == protocol]
    if frame.empty or not data.findings:
        return None
    arms = [arm for arm in arm_order(data) if (frame["arm"] == arm).any()]
    areas = frame.pivot(index="class", columns="arm", values="auc").astype(float)
    images = frame[frame["arm"] == arms[0]].set_index("class")["images"]
    lines = [[str(name), count(images[name]), *(number3(areas.loc[name, arm]) for arm in arms)] for name in images.index]
    lines.append(["mean", "", *(number3(areas[arm].mean()) for arm in arms)])
    columns = [Column("finding"), Column(f"{data.judged} images", "with it", True), *(Column(arm, "AUC", True) for arm in arms)]
    return Table(f"{title_of(protocol)}: AUC of every finding, mean over all repeats.", columns, lines)


def call_tables(data: ReportData) -> list[Block | None]:
    """Images of which each finding was told rightly and wrongly, a table an arm and protocol, folded."""
    frame = complete(data.finding_calls, "finding_calls")
    tables: list[Block] = []
    for protocol in protocol_order(data):
        for arm in arm_order(data):
            mine = frame[(frame["arm"] == arm) & (frame["protocol"] == protocol)]
            if mine.empty:
                continue
            names = ("hits", "misses", "false_alarms", "rejections")
            lines = [[str(row["finding"]), *(count(row[name]) for name in names)] for _, row in mine.iterrows()]
            columns = [
                Column("finding"), Column("there", "and named", True), Column("there", "not named", True),
                Column("not there", "but named", True), Column("not there", "not named", True),
            ]  # fmt: skip
            caption = f"{arm}, {title_of(protocol)}: {data.judged} images of which the finding is known, mean over all runs."
            tables.append(Table(caption, columns, lines))
    return [Fold("What was told rightly and wrongly, finding by finding", tables)] if tables else []


def known_table(facts: DatasetFacts) -> Table | None:
    """Images with each finding, without it, and of which it is not known, by split."""
    if not facts.findings:
        return None
    splits = sorted(facts.findings, key=lambda s: (place(("train", "val", "test"), s), s))
    names = list(facts.findings[splits[0]])
    lines = [[name, *(count(number) for split in splits for number in facts.findings[split][name])] for name in names]
    columns = [
        Column("finding"),
        *(Column(split, what, True) for split in splits for what in ("with it", "without", "not known")),
    ]  # fmt: skip
    return Table(f"Findings in dataset {facts.name}, uncertain and missing ones counted as the recipe says.", columns, lines)
