"""Grids of a report: searches, confusion matrices, sheets of augmented views; None where there is nothing to draw."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup

from medssl.stages import report_svg as svg
from medssl.stages.report_data import Confusion, ReportData, arm_order, complete, protocol_order
from medssl.stages.report_page import Figure
from medssl.stages.report_text import as_float, metric_title, number3, title_of

_SHEET_BYTES = 400_000
_SHEETS_BYTES = 1_600_000
_MATRIX_CELLS, _MATRIX_CLASSES = 6_000, 40


def search_grids(data: ReportData) -> Figure | None:
    """The searches: a grid of learning rate by weight decay where the points fill one, else a scatter of the points."""
    frame = complete(data.searches, "searches")
    if frame.empty:
        return None
    frame["stopped"] = frame["stopped"].eq(True)
    panels = []
    for protocol in dict.fromkeys(str(p) for p in frame["protocol"]):
        for arm in arm_order(data) + sorted({str(a) for a in frame["arm"]} - set(arm_order(data))):
            part = frame[(frame["arm"] == arm) & (frame["protocol"] == protocol)]
            if not part.empty:
                panels.append(_search_panel(part, f"{svg.clipped(arm, 24)}, {title_of(protocol)}"))
    caption = (
        f"Search over learning rate and weight decay: {searched_metrics(data)} on the validation split; "
        "darker is higher within its panel. The framed point is the one used. Test images played no part in it."
    )
    if frame["stopped"].any():
        caption += " A point that is struck through was stopped before its end: its score is the last that it had."
    return Figure(caption, panels)


def searched_metrics(data: ReportData) -> str:
    """What the searches judged by, in words; by protocol where they differ."""
    frame = complete(data.searches, "searches")
    by = {str(p): metric_title(data.search_metrics.get(str(p), "balanced_accuracy")) for p in dict.fromkeys(frame["protocol"])}
    if len(set(by.values())) == 1:
        return next(iter(by.values()))
    return ", ".join(f"{title} ({title_of(protocol)})" for protocol, title in by.items())


def _search_panel(part: pd.DataFrame, title: str) -> Markup:
    places = [(as_float(d), as_float(r)) for d, r in zip(part["weight_decay"], part["learning_rate"], strict=True)]
    scores: dict[tuple[float, float], list[float]] = {}
    for place, score in zip(places, part["score"], strict=True):
        scores.setdefault(place, []).append(as_float(score))
    means = {place: float(np.mean(found)) for place, found in sorted(scores.items())}
    best = {place for place, chosen in zip(places, part["best"], strict=True) if chosen}
    stopped = {place for place, early in zip(places, part["stopped"], strict=True) if early}
    rates, decays = sorted({r for _, r in places}), sorted({d for d, _ in places})
    known = [v for v in means.values() if math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    shades = {k: 0.08 + 0.84 * ((v - low) / (high - low) if high > low else 0.5) for k, v in means.items()}
    points = _Points(means, shades, best, stopped, rates, decays)
    grid = len(means) >= 0.5 * len(rates) * len(decays) and len(rates) <= 12 and len(decays) <= 12
    draw = _search_grid if grid else _search_scatter
    return draw(title, points)


@dataclass(frozen=True)
class _Points:
    """The points of one search by (weight decay, learning rate): scores, shades in 0..1, chosen and stopped ones, both axes."""

    means: Mapping[tuple[float, float], float]
    shades: Mapping[tuple[float, float], float]
    best: set[tuple[float, float]]
    stopped: set[tuple[float, float]]
    rates: Sequence[float]
    decays: Sequence[float]

    def name(self, place: tuple[float, float]) -> str:
        """What is read on a point that is pointed at."""
        early = ", stopped before its end" if place in self.stopped else ""
        return f"learning rate {svg.short(place[1])}, weight decay {svg.short(place[0])}: {number3(self.means[place])}{early}"


def _search_grid(title: str, points: _Points) -> Markup:
    means, shades, best, rates, decays = points.means, points.shades, points.best, points.rates, points.decays
    width, left, top = 360.0, 58.0, 42.0
    cell, row = min(70.0, (width - left - 8) / len(rates)), 30.0
    panel = svg.Panel(width, top + row * len(decays) + 42, f"search of {title}")
    panel.text(4, 14, title, size=12, bold=True)
    panel.text(4, top - 9, "weight decay", size=11, fill=svg.SOFT)
    frames = []
    for j, decay in enumerate(decays):
        y = top + row * j
        panel.text(left - 6, y + row / 2 + 4, svg.short(decay), size=11, anchor="end", fill=svg.SOFT)
        for i, rate in enumerate(rates):
            x, score = left + cell * i, means.get((decay, rate))
            if score is None:
                continue
            fill, ink = svg.shade(shades[(decay, rate)] if math.isfinite(score) else 0)
            panel.rect((x, y, cell, row), fill, "#ffffff", title=points.name((decay, rate)))
            if (decay, rate) in points.stopped:
                panel.line((x + 3, y + row - 3, x + cell - 3, y + 3), ink)
            if cell >= 34:
                panel.text(x + cell / 2, y + row / 2 + 4, number3(score), size=11, anchor="middle", fill=ink)
            if (decay, rate) in best:
                frames.append((x, y))
    for x, y in frames:
        panel.rect((x + 1.5, y + 1.5, cell - 3, row - 3), "none", svg.COLOURS[1], line=3)
    bottom = top + row * len(decays)
    for i, rate in enumerate(rates):
        panel.text(left + cell * (i + 0.5), bottom + 15, svg.short(rate), size=11, anchor="middle", fill=svg.SOFT)
    panel.text(left + cell * len(rates) / 2, bottom + 33, "learning rate", size=11.5, anchor="middle", fill=svg.SOFT)
    return panel.svg()


def _search_scatter(title: str, points: _Points) -> Markup:
    means, shades, best, rates, decays = points.means, points.shades, points.best, points.rates, points.decays
    width, height, left, top, bottom = 360.0, 250.0, 58.0, 42.0, 208.0
    panel = svg.Panel(width, height, f"search of {title}")
    panel.text(4, 14, title, size=12, bold=True)
    panel.text(4, top - 9, "weight decay", size=11, fill=svg.SOFT)
    positive = [d for d in decays if d > 0]
    floor = min(positive) / 10 if positive else 1e-6  # zero has no place on a log axis: it stands below the smallest
    lift = {d: d if d > 0 else floor for d in decays}
    xs = svg.Scale(min(rates) / 1.3, max(rates) * 1.3, left, width - 10, True)
    ys = svg.Scale(min(lift.values()) / 1.5, max(lift.values()) * 1.5, bottom, top, True)
    for tick in ys.ticks():
        if not positive or tick >= min(positive) * 0.5:
            panel.line((left, ys(tick), width - 10, ys(tick)), svg.GRID)
            panel.text(left - 6, ys(tick) + 4, svg.short(tick), size=11, anchor="end", fill=svg.SOFT)
    if 0.0 in lift:
        panel.text(left - 6, ys(floor) + 4, "0", size=11, anchor="end", fill=svg.SOFT)
    panel.x_axis(xs, top, bottom, "learning rate")
    for (decay, rate), score in means.items():
        fill, ink = svg.shade(shades[(decay, rate)] if math.isfinite(score) else 0)
        chosen = (decay, rate) in best
        box = (xs(rate) - 6, ys(lift[decay]) - 6, 12.0, 12.0)
        frame, line = (svg.COLOURS[1], 3) if chosen else ("#777777", 0.7)
        panel.rect(box, fill, frame, line=line, title=points.name((decay, rate)))
        if (decay, rate) in points.stopped:
            panel.line((box[0], box[1] + 12, box[0] + 12, box[1]), ink)
        if chosen:
            side = "end" if xs(rate) > width - 70 else "start"
            panel.text(xs(rate) + (-11 if side == "end" else 11), ys(lift[decay]) + 4, number3(score), anchor=side)
    return panel.svg()


def confusion_matrices(data: ReportData) -> Figure | None:
    """One matrix an arm and protocol, shaded by the share of the true class; none where too large to read."""
    order = [(a, p) for p in protocol_order(data) for a in arm_order(data)]
    keys = [k for k in order if k in data.confusions] + sorted(k for k in data.confusions if k not in order)
    cells = sum(len(data.confusions[k].classes) ** 2 for k in keys)
    if not keys or cells > _MATRIX_CELLS or max(len(data.confusions[k].classes) for k in keys) > _MATRIX_CLASSES:
        return None
    panels = [_confusion(data.confusions[k], f"{svg.clipped(k[0], 24)}, {title_of(k[1])}") for k in keys]
    caption = (
        f"Confusion matrices on the {data.judged} split, averaged over all repeats. Row: true class; column: predicted class; "
        "number and shade: percent of the row's images; the framed diagonal is recall."
    )
    return Figure(caption, panels)


def _confusion(matrix: Confusion, title: str) -> Markup:
    names, counts_KK = [str(c) for c in matrix.classes], np.asarray(matrix.counts, dtype=float)
    size, width = len(names), 360.0
    length = 14
    left = 14 + 6.6 * min(length, max(len(n) for n in names))
    cell = min(54.0, (width - left - 6) / size)
    tall = 10 + 6.0 * min(length, max(len(n) for n in names))
    top = 24 + tall
    panel = svg.Panel(width, top + cell * size + 8, f"confusion matrix of {title}")
    panel.text(4, 14, title, size=12, bold=True)
    font = min(11.5, max(6.5, cell * 0.75))
    for i, name in enumerate(names):
        middle = cell * (i + 0.5)
        panel.text(left - 6, top + middle + font * 0.35, svg.clipped(name, length), size=font, anchor="end")
        panel.text(left + middle + font * 0.35, top - 6, svg.clipped(name, length), size=font, turn=-90)
        total = counts_KK[i].sum()
        for j, other in enumerate(names):
            share = counts_KK[i, j] / total if total > 0 else math.nan
            fill, ink = svg.shade(share)
            text = f"{share:.0%}" if math.isfinite(share) else "no images"
            label = f"true {name}, predicted {other}: {text}, {counts_KK[i, j]:.1f} images"
            panel.rect((left + cell * j, top + cell * i, cell, cell), fill, "#dddddd", line=0.5, title=label)
            if cell >= 20 and math.isfinite(share):
                panel.text(left + cell * (j + 0.5), top + cell * (i + 0.5) + 4, f"{100 * share:.0f}",
                           size=min(11.5, cell * 0.4), anchor="middle", fill=ink)  # fmt: skip
    for i in range(size):
        box = (left + cell * i + 0.7, top + cell * i + 0.7, cell - 1.4, cell - 1.4)
        panel.rect(box, "none", svg.COLOURS[1], line=1.4)
    return panel.svg()


def view_sheets(data: ReportData) -> Figure | None:
    """The sheets of augmented views; large ones are made smaller, and what is no picture is left out."""
    arms = [a for a in arm_order(data) if a in data.view_sheets] + sorted(set(data.view_sheets) - set(arm_order(data)))
    budget = min(_SHEET_BYTES, _SHEETS_BYTES // max(1, len(arms)))
    panels = []
    for arm in arms:
        picture = _picture(data.view_sheets[arm], budget)
        if picture is not None:
            kind, content = picture
            source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
            panels.append(
                Markup('<p class="caption">{}</p><img alt="augmented views of {}" src="{}">').format(arm, arm, source)
            )
    if not panels:
        return None
    caption = "Augmented views as the pretraining saw them. Where they hide what matters, milder ones are needed."
    return Figure(caption, panels, wide=True)


def _picture(data: bytes, budget: int) -> tuple[str, bytes] | None:
    """Media type and bytes of a picture of at most about `budget` bytes; None if it cannot be read."""
    from PIL import Image  # not needed where a study has no sheet

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.format == "PNG" and len(data) <= budget:
                return "image/png", data
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None
    side, content = 1400, b""
    while side >= 200:
        smaller = picture.copy()
        smaller.thumbnail((side, side))
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=82)
        content = buffer.getvalue()
        if len(content) <= budget:
            break
        side = side * 3 // 4
    return "image/jpeg", content
