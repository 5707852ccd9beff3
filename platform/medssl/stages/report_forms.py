"""The report's section of tables and figures in a paper's form, filled with the study's own scores."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from markupsafe import Markup
from numpy.typing import NDArray

from medssl.forms import OF_TWO, FigureForm, FormColumn, FormRow, TableForm
from medssl.shifted import judged_as
from medssl.stages import report_svg as svg
from medssl.stages.report_data import ReportData, complete
from medssl.stages.report_page import Block, Column, Figure, Key, Table
from medssl.stages.report_text import NONE, as_float, count, metric_title
from medssl.statistics import welch


def forms(data: ReportData) -> list[Block | None]:
    """All tables, then all figures, in the recipe's order."""
    tables: list[Block | None] = [_class_report(data, form) if form.class_report else _table(data, form) for form in data.tables]
    return [*tables, *(_figure(data, form) for form in data.figures)]


def _table(data: ReportData, form: TableForm) -> Table:
    heads = [Column(head) for head in form.heads]
    columns = [Column(column.title, column.unit, True) for column in form.columns]
    lines = []
    for row in form.rows:
        blank = [""] * (len(form.heads) - len(row.cells))
        values = ["" if row.arm is None else _value(data, row, column) for column in form.columns]
        lines.append([*row.cells, *blank, *values])
    return Table(form.title, [*heads, *columns], lines)


def _value(data: ReportData, row: FormRow, column: FormColumn) -> str:
    protocol = judged_as(row.protocol or column.protocol, column.shifted)
    mine = _runs(data, str(row.arm), protocol, column.metric, column.dataset)
    if column.value in OF_TWO:
        return _of_two(mine, _runs(data, str(row.than), protocol, column.metric, column.dataset), row, column)
    if not len(mine):
        return NONE
    mean, std = (_text(value, column) for value in (mine.mean(), mine.std(ddof=1) if len(mine) > 1 else math.nan))
    both = mean if std == NONE else f"{mean} ± {std}"
    return {"n": count(len(mine)), "mean": mean, "std": std, "mean_std": both}[column.value]


def _of_two(mine: NDArray[np.floating], theirs: NDArray[np.floating], row: FormRow, column: FormColumn) -> str:
    if column.value == "difference" and len(mine) and len(theirs):
        difference = float(mine.mean() - theirs.mean())
        return f"{'−' if difference < 0 else '+'}{_text(abs(difference), column)}"
    if column.value == "difference" or min(len(mine), len(theirs)) < 2:
        return NONE
    p = welch(mine, theirs, one_sided=row.alternative == "greater").p
    return f"{p:.5f}" if p >= 1e-4 else f"{p:.1e}"


def _runs(data: ReportData, arm: str, protocol: str, metric: str, dataset: str | None = None) -> NDArray[np.floating]:
    """Scores of all runs of an arm, of the study or of one dataset's."""
    frame = complete(data.scores if dataset is None else data.by_dataset[dataset], "scores")
    chosen = (frame["arm"] == arm) & (frame["protocol"] == protocol) & (frame["metric"] == metric)
    values: NDArray[np.floating] = frame.loc[chosen, "value"].to_numpy(dtype=float)
    finite: NDArray[np.floating] = values[np.isfinite(values)]
    return finite


def _text(value: float, column: FormColumn) -> str:
    """A mean, standard deviation or size of a difference."""
    return f"{value * (100 if column.percent else 1):.{column.decimals}f}" if math.isfinite(value) else NONE


def _class_report(data: ReportData, form: TableForm) -> Table:
    """As scikit-learn's classification report: classes, then accuracy, plain and weighted means."""
    row = form.class_report
    assert row is not None and form.protocol is not None
    frame = complete(data.class_scores, "class_scores")
    mine = frame[(frame["arm"] == row.arm) & (frame["protocol"] == form.protocol)]
    measures = ("precision", "recall", "f1")
    lines = [[str(r["class"]), *(_two(r[name]) for name in measures), count(r["images"])] for _, r in mine.iterrows()]
    images = mine["images"].to_numpy(dtype=float)
    if len(images):
        accuracy = _runs(data, str(row.arm), form.protocol, "accuracy")
        lines.append(["accuracy", "", "", _two(accuracy.mean()) if len(accuracy) else NONE, count(images.sum())])
        for title, weights in (("macro average", np.ones(len(images))), ("weighted average", images)):
            means = [_weighted(mine[name], weights) for name in measures]
            lines.append([title, *(_two(mean) for mean in means), count(images.sum())])
    columns = [Column("class"), *(Column(name, "", True) for name in ("precision", "recall", "F1-score", "support"))]
    return Table(form.title, columns, lines)


def _weighted(values: pd.Series, weights: NDArray[np.floating]) -> float:
    numbers = values.to_numpy(dtype=float)
    known = np.isfinite(numbers)
    return float(np.average(numbers[known], weights=weights[known])) if known.any() else math.nan


def _two(value: float) -> str:
    return f"{as_float(value):.2f}" if math.isfinite(as_float(value)) else NONE


# -------------------------------------------------------------------------------------------------------------- figures


def _figure(data: ReportData, form: FigureForm) -> Figure | None:
    """A line for each of the form's lines, a panel for each dataset; bars are one standard deviation over all runs."""
    keys = [Key(title, svg.swatch(svg.colour(i), line=True)) for i, title in enumerate(form.lines.values())]
    scores = {title: _points(data, form, name) for name, title in form.panels.items()} or {"": _points(data, form, None)}
    panels = [_panel(form, found, title) for title, found in scores.items() if found]
    return Figure(form.title, panels, keys) if panels else None


def _points(data: ReportData, form: FigureForm, dataset: str | None) -> dict[str, list[tuple[int, float, float]]]:
    """Place, mean and standard deviation by line."""
    scale = 100 if form.percent else 1
    found: dict[str, list[tuple[int, float, float]]] = {}
    for line, title in form.lines.items():
        for place, point in enumerate(form.points):
            protocol = judged_as(point.protocol or form.protocol, point.shifted)
            runs = scale * _runs(data, point.arm.replace("{line}", line), protocol, form.metric, dataset)
            if len(runs):
                spread = float(runs.std(ddof=1)) if len(runs) > 1 else 0.0
                found.setdefault(title, []).append((place, float(runs.mean()), spread))
    return found


def _panel(form: FigureForm, found: dict[str, list[tuple[int, float, float]]], title: str) -> Markup:
    width, height, left, top = 360.0, 240.0, 50.0, 28.0
    bottom = height - 38
    ends = [mean + sign * spread for points in found.values() for _, mean, spread in points for sign in (-1, 1)]
    pad = max((max(ends) - min(ends)) * 0.05, 1e-3)
    unit = f"{metric_title(form.metric)}{' (%)' if form.percent else ''}"
    panel = svg.Panel(width, height, f"{unit} by {form.x_title}")
    xs = svg.Scale(-0.4, len(form.points) - 0.6, left, width - 10)
    ys = svg.Scale(min(ends) - pad, max(ends) + pad, bottom, top)
    panel.text(4, 14, f"{title}: {unit}" if title else unit, size=12, bold=True)
    panel.y_axis(ys, left, width - 10)
    for place, point in enumerate(form.points):
        panel.text(xs(place), bottom + 15, svg.clipped(point.label, 14), size=11, anchor="middle", fill=svg.SOFT)
    panel.text((left + width - 10) / 2, bottom + 32, form.x_title, size=11.5, anchor="middle", fill=svg.SOFT)
    for i, name in enumerate(form.lines.values()):
        points = found.get(name, [])
        aside = (i - (len(form.lines) - 1) / 2) * 3
        for place, mean, spread in points:
            if spread > 0:
                x = xs(place) + aside
                panel.line((x, ys(mean - spread), x, ys(mean + spread)), svg.colour(i))
        places = [(xs(place) + aside, ys(mean)) for place, mean, _ in points]
        panel.curve([places], svg.colour(i))
        panel.dots(places, svg.colour(i), size=6, opacity=1)
    return panel.svg()
