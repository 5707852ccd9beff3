"""The report's section on label curves: what each arm scores with how many labelled images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from medssl.stages import report_svg as svg
from medssl.stages.report_data import ReportData, arm_order, complete
from medssl.stages.report_page import Block, Column, Figure, Key, Table
from medssl.stages.report_text import NONE, as_float, count, mean_std, metric_title, title_of

_LOG_FROM = 8
"""Largest over smallest number of labels from which the axis is logarithmic."""


def label_curves(data: ReportData) -> list[Block | None]:
    """Of each curve a drawing and a table of the main metric."""
    blocks: list[Block | None] = []
    for name, points in data.label_curves.items():
        found = _scores(data, points)
        if found:
            blocks += [_figure(data, name, points, found), _table(data, name, points, found)]
    return blocks


def _scores(data: ReportData, points: Mapping[str, int]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over all runs, by arm and protocol."""
    summary = complete(data.summary, "summary")
    mine = summary[(summary["metric"] == data.main_metric) & summary["protocol"].isin(list(points))]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for arm in arm_order(data):
        for _, row in mine[mine["arm"] == arm].iterrows():
            found.setdefault(arm, {})[str(row["protocol"])] = as_float(row["mean"]), as_float(row["std"])
    return found


def _table(
    data: ReportData, name: str, points: Mapping[str, int], found: Mapping[str, Mapping[str, tuple[float, float]]]
) -> Table:
    columns = [Column("arm"), *(Column(count(number), "labelled images", True) for number in points.values())]
    lines = [[arm, *(mean_std(*scores[p]) if p in scores else NONE for p in points)] for arm, scores in found.items()]
    what = f"{title_of(name)}: {metric_title(data.main_metric)} by number of labelled images"
    return Table(f"{what}, mean ± standard deviation over all runs.", columns, lines)


def _figure(
    data: ReportData, name: str, points: Mapping[str, int], found: Mapping[str, Mapping[str, tuple[float, float]]]
) -> Figure:
    caption = (
        f"{title_of(name)}: {metric_title(data.main_metric)} ({data.judged} split) against the number of labelled images; bars: "
        "one standard deviation over all runs to either side. A draw of fewer images given as a share is part of the larger ones."
    )
    keys = [Key(arm, svg.swatch(svg.colour(i), line=True)) for i, arm in enumerate(found)]
    return Figure(caption, [_panel(data, name, points, found)], keys)


def _panel(
    data: ReportData, name: str, points: Mapping[str, int], found: Mapping[str, Mapping[str, tuple[float, float]]]
) -> Markup:
    ends = [(mean - sign * np.nan_to_num(std)) for each in found.values() for mean, std in each.values() for sign in (-1, 1)]
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    pad = max((high - low) * 0.05, 1e-3)
    numbers = list(points.values())
    first, last = float(min(numbers)), float(max(numbers))
    log = last / first >= _LOG_FROM
    width, height, left, top = 360.0, 240.0, 50.0, 28.0  # as wide as every panel
    panel = svg.Panel(width, height, f"{metric_title(data.main_metric)} of {title_of(name)} by number of labelled images")
    margin = 1.1 if log else 0.0
    room = 0.04 * (last - first) or 1.0
    xs = svg.Scale(first / margin if log else first - room, last * margin if log else last + room, left, width - 10, log)
    bottom = height - 38
    ys = svg.Scale(low - pad, high + pad, bottom, top)
    panel.text(4, 14, f"{title_of(name)}{' (log axis)' if log else ''}", size=12, bold=True)
    panel.y_axis(ys, left, width - 10)
    panel.x_axis(xs, bottom, bottom, "labelled images in one draw", 4)
    for i, scores in enumerate(found.values()):
        places = [(xs(points[p]), *scores[p]) for p in points if p in scores and np.isfinite(scores[p][0])]
        aside = (i - (len(found) - 1) / 2) * 3  # bars of several arms beside each other
        for x, mean, std in places:
            if std > 0:
                panel.line((x + aside, ys(mean - std), x + aside, ys(mean + std)), svg.colour(i))
        panel.curve([[(x + aside, ys(mean)) for x, mean, _ in places]], svg.colour(i))
        panel.dots([(x + aside, ys(mean)) for x, mean, _ in places], svg.colour(i), size=6, opacity=1)
    return panel.svg()
