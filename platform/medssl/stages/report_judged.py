"""What a report says of the predictions: scores of each class, of patients or bags, and of subgroups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup

from medssl.metrics import LOWER_IS_BETTER
from medssl.stages import report_svg as svg
from medssl.stages.report_data import ReportData, UnitFacts, arm_order, complete, metric_order, protocol_order
from medssl.stages.report_page import Block, Column, Figure, Fold, Table, Text
from medssl.stages.report_text import NONE, as_float, count, metric_title, number3, plural, title_of
from medssl.stages.report_words import mean_of

_SHOWN_ARMS = 2


def class_tables(data: ReportData) -> list[Block | None]:
    """A table an arm and protocol: the two best arms of each protocol are shown, the others folded."""
    frame = complete(data.class_scores, "class_scores")
    sign = -1 if data.main_metric in LOWER_IS_BETTER else 1
    shown: list[Block | None] = []
    folded: list[Block] = []
    for protocol in protocol_order(data):
        arms = [arm for arm in arm_order(data) if ((frame["arm"] == arm) & (frame["protocol"] == protocol)).any()]
        means = [-sign * mean_of(data, arm, protocol) for arm in arms]
        order = sorted(range(len(arms)), key=[mean if math.isfinite(mean) else math.inf for mean in means].__getitem__)
        for number, arm in enumerate(arms[i] for i in order):
            table = _class_table(data, frame[(frame["arm"] == arm) & (frame["protocol"] == protocol)], arm, protocol)
            (shown if number < _SHOWN_ARMS else folded).append(table)
    how = "finding by finding" if data.findings else "class by class"
    return [*shown, Fold(f"The other arms, {how}", folded) if folded else None]


def _class_table(data: ReportData, mine: pd.DataFrame, arm: str, protocol: str) -> Table:
    names = ("precision", "recall", "f1", "auc", "average_precision", "sensitivity")
    lines = [[str(row["class"]), count(row["images"]), *(number3(row[name]) for name in names)] for _, row in mine.iterrows()]
    columns = [
        Column("finding" if data.findings else "class"),
        Column("images", f"{data.judged}, with it" if data.findings else data.judged, True),
        Column("precision", "", True), Column("recall", "", True),
        Column("F1", "", True), Column("AUC", "", True), Column("average precision", "", True),
        Column("sensitivity", f"at {data.specificity:.4g} specificity", True),
    ]  # fmt: skip
    each = "each finding, in the images of which it is known" if data.findings else "each class against the rest"
    caption = (
        f"{arm}, {title_of(protocol)}: {each}, mean over all runs (precision: over the runs that name the "
        f"{'finding' if data.findings else 'class'} at all)."
    )
    return Table(caption, columns, lines)


# -- patients and bags -------------------------------------------------------------------------------------------


def units(data: ReportData) -> list[Block | None]:
    """For patients and for bags: what was scored and left out in words, and scores per image and per unit side by side."""
    blocks: list[Block | None] = []
    for facts in data.unit_facts:
        blocks.append(Text(_about(data, facts), f"Per {facts.unit}."))
        tables = [_unit_table(data, facts.unit, protocol) for protocol in protocol_order(data)]
        there = [table for table in tables if table is not None]
        blocks += there[:1]
        folded: list[Block] = list(there[1:])
        blocks += [Fold(f"Per {facts.unit} under the other protocols", folded)] if folded else []
    return blocks


def _about(data: ReportData, facts: UnitFacts) -> str:
    several = "has" if facts.several == 1 else "have"
    images = plural(facts.images, f"{data.judged} image")
    what = "" if facts.unit == "patient" else " (a lesion or case each)"
    text = (
        f"{plural(facts.units, facts.unit)}{what} with {images}; {count(facts.several)} {several} more than one. The "
        f"probabilities are averaged over the images of a {facts.unit}, which then counts once."
    )
    if facts.torn:
        text += (
            f" Left out: {plural(facts.torn, facts.unit)} with {plural(facts.torn_images, 'image')} whose labels differ, so that "
            f"no label is the {facts.unit}'s."
        )
    return text


def _unit_table(data: ReportData, unit: str, protocol: str) -> Table | None:
    frame = complete(data.units, "units")
    mine = frame[(frame["unit"] == unit) & (frame["protocol"] == protocol)]
    found = {(str(row["arm"]), str(row["metric"])): row for _, row in mine.iterrows()}
    metrics = [metric for metric in metric_order(data) if any(name == metric for _, name in found)]
    arms = [arm for arm in arm_order(data) if any(name == arm for name, _ in found)]
    if not arms:
        return None
    lines = [
        [arm, metric_title(metric), *(number3(found[arm, metric][part]) for part in ("per_image", "per_unit"))]
        for metric in metrics for arm in arms if (arm, metric) in found
    ]  # fmt: skip
    columns = [Column("arm"), Column("metric"), Column("per image", "", True), Column(f"per {unit}", "", True)]
    caption = f"{title_of(protocol)}: scores per image and per {unit} over the same images, mean over all runs."
    return Table(caption, columns, lines)


# -- subgroups ---------------------------------------------------------------------------------------------------


def subgroups(data: ReportData) -> list[Block | None]:
    """For each column: the main metric by group as a figure and a table, every other metric and protocol folded."""
    frame = complete(data.subgroups, "subgroups")
    if frame.empty:
        return []
    text = (
        f"Scores of parts of the {data.judged} images, mean over all runs. The {data.interval_level:.0%} intervals are over "
        "patients and take the trained classifiers as they are. Of many intervals some leave the truth out, and groups differ in "
        f"how hard their classes are. Groups of fewer than {plural(data.smallest_group, 'image')} are counted, not scored."
    )
    blocks: list[Block | None] = [Text(text)]
    for column in dict.fromkeys(str(name) for name in frame["column"]):
        mine = frame[frame["column"] == column]
        keys = [(m, p) for p in protocol_order(data) for m in metric_order(data)
                if ((mine["metric"] == m) & (mine["protocol"] == p)).any()]  # fmt: skip
        tables = [_group_table(data, mine[(mine["metric"] == m) & (mine["protocol"] == p)], column, m, p) for m, p in keys]
        rest: list[Block] = list(tables[1:])
        blocks += [_group_figure(data, mine[(mine["metric"] == keys[0][0]) & (mine["protocol"] == keys[0][1])], column, *keys[0])]
        blocks += [*tables[:1], Fold(f"By {title_of(column)}: other metrics and protocols", rest) if rest else None]
    return blocks


def _group_table(data: ReportData, mine: pd.DataFrame, column: str, metric: str, protocol: str) -> Table:
    """One row a group, one column an arm."""
    arms = [arm for arm in arm_order(data) if (mine["arm"] == arm).any()]
    lines = []
    for group in dict.fromkeys(str(name) for name in mine["group"]):
        rows = {str(row["arm"]): row for _, row in mine[mine["group"] == group].iterrows()}
        first = next(iter(rows.values()))
        sizes = [count(first[name]) for name in ("images", "patients", "classes")]
        lines.append([group, *sizes, *(_with_interval(rows[arm]) if arm in rows else NONE for arm in arms)])
    columns = [
        Column(title_of(column)), Column("images", "", True), Column("patients", "", True),
        Column("findings" if data.findings else "classes", "present", True),
        *(Column(arm, metric_title(metric), True) for arm in arms),
    ]  # fmt: skip
    return Table(f"{metric_title(metric)} by {title_of(column)}, {title_of(protocol)}.", columns, lines)


def _with_interval(row: pd.Series) -> str:
    score = number3(row["score"])
    ends = number3(row["low"]), number3(row["high"])
    return score if NONE in (score, *ends) else f"{score} ({ends[0]} to {ends[1]})"


def _group_figure(data: ReportData, mine: pd.DataFrame, column: str, metric: str, protocol: str) -> Figure | None:
    """Score and interval of each group, a panel an arm."""
    values = mine[["score", "low", "high"]].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    pad = max(float(known.max() - known.min()) * 0.05, 0.01)
    ends = (max(float(known.min()) - pad, 0.0), min(float(known.max()) + pad, 1.0))
    arms = [arm for arm in arm_order(data) if (mine["arm"] == arm).any()]
    panels = [_group_panel(mine[mine["arm"] == arm], arm, metric, ends) for arm in arms]
    caption = f"{metric_title(metric)} by {title_of(column)}, {title_of(protocol)}: score and interval of each scored group."
    return Figure(caption, panels)


def _group_panel(mine: pd.DataFrame, arm: str, metric: str, ends: Sequence[float]) -> Markup:
    rows = [row for _, row in mine.iterrows() if math.isfinite(as_float(row["score"]))]
    width, top, step = 360.0, 24.0, 38.0
    bottom = top + step * len(rows)
    scale = svg.Scale(ends[0], ends[1], 12, width - 14)
    panel = svg.Panel(width, bottom + 42, f"{metric_title(metric)} of {arm} by group")
    panel.text(4, 14, svg.clipped(arm, 44), size=12, bold=True)
    panel.x_axis(scale, top, bottom, metric_title(metric))
    for i, row in enumerate(rows):
        y = top + step * i
        score, low, high = (as_float(row[name]) for name in ("score", "low", "high"))
        text = f"{svg.clipped(str(row['group']), 26)} ({plural(int(row['images']), 'image')}): {number3(score)}"
        panel.text(12, y + 14, text, size=11.5, halo=True)
        if math.isfinite(low) and math.isfinite(high):
            panel.line((scale(low), y + 26, scale(high), y + 26), svg.colour(0), 2.4)
            for end in (low, high):
                panel.line((scale(end), y + 21, scale(end), y + 31), svg.colour(0), 1.6)
        panel.dots([(scale(score), y + 26)], svg.INK, 9, 1)
    return panel.svg()
