"""Charts of a report: scores over seeds, differences, training curves; None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup

from medssl.stages import report_svg as svg
from medssl.stages.report_comparisons import KEYS
from medssl.stages.report_data import (
    BOOTSTRAP,
    EQUIVALENCE,
    ReportData,
    arm_kind,
    arm_order,
    metric_order,
    protocol_order,
)
from medssl.stages.report_page import Figure, Key
from medssl.stages.report_text import metric_title, number3, signed3, title_of

CURVES = {
    "loss": "loss",
    "invariance": "invariance term of the loss",
    "redundancy": "redundancy term of the loss",
    "embedding_std": "standard deviation of the embedding",
    "effective_rank": "effective rank of the embedding",
    "alignment": "alignment (distance of two views)",
    "uniformity": "uniformity (smaller: more even)",
    "learning_rate": "learning rate",
    "gradient_norm": "norm of the gradient",
    "images_per_second": "images per second",
    "data_wait_share": "share of time waiting for data",
}
"""Columns of a history in the order in which they are drawn, with their titles."""

MONITOR_CURVES = {
    "knn_balanced_accuracy": "balanced accuracy of kNN, validation",
    "knn_accuracy": "accuracy of kNN, validation",
}
"""Columns of what a monitor measured, with their titles; all are drawn over epochs."""

_NOT_CURVES = {"seed", "step", "epoch", "rank", "worker", "steps", "seconds", "time", "pretraining_seed"}
_CURVE_POINTS = 240
_DOTS = 20_000
_STRIP_WIDTH = 430.0
_NO_PRETRAINING = "#777777"
_GIVEN_UP = 4.0
"""Times its smallest value at which a range test's loss leaves the picture."""
_FROM_ZERO = {"data_wait_share", "images_per_second", "learning_rate"}


def distributions(data: ReportData, metric: str) -> Figure | None:
    """Every score of a metric: one panel a protocol, one strip an arm, one lane and colour a pretraining seed."""
    scores = data.scores
    if scores.empty:
        return None
    chosen = scores[(scores["metric"] == metric) & np.isfinite(pd.to_numeric(scores["value"], errors="coerce"))]
    if chosen.empty:
        return None
    chosen = chosen.assign(seed=[_seed(s) for s in chosen["pretraining_seed"]])
    seeds = sorted(chosen["seed"].unique(), key=_seed_order)
    lanes = chosen.groupby(["arm", "protocol", "seed"]).size()
    most = max(20, _DOTS // len(lanes))
    low, high = float(chosen["value"].min()), float(chosen["value"].max())
    margin = max((high - low) * 0.05, 0.005)
    scale = svg.Scale(low - margin, high + margin, 10, _STRIP_WIDTH - 12)
    panels = []
    for protocol in protocol_order(data):
        frame = chosen[chosen["protocol"] == protocol]
        if not frame.empty:
            panels.append(_strips(data, frame, metric=metric, seeds=seeds, scale=scale, most=most))
    keys = [Key(f"pretraining seed {s}", svg.swatch(svg.colour(i))) for i, s in enumerate(seeds)]
    if any(arm_kind(data, str(arm)) == "colour" for arm in chosen["arm"].unique()):
        keys.append(Key("no pretraining", svg.swatch(_NO_PRETRAINING)))
    caption = (
        f"Each dot is one score: {metric_title(metric)} of one head seed with one draw of the labels and one "
        "pretraining seed (one lane each). Box: middle half of the arm's scores and their median; diamond: their mean. "
        "Dots of one lane share a pretraining, so their number says nothing about the method."
    )
    caption += f" At most {most} scores of a lane are drawn, evenly over their ranks." if lanes.max() > most else ""
    return Figure(caption, panels, keys, wide=True)


def _strips(
    data: ReportData, frame: pd.DataFrame, *, metric: str, seeds: Sequence[str], scale: svg.Scale, most: int
) -> Markup:
    protocol = str(frame["protocol"].iloc[0])
    arms = [arm for arm in arm_order(data) if (frame["arm"] == arm).any()]
    groups = [(arm, frame[frame["arm"] == arm]) for arm in arms]
    lanes = [part["seed"].nunique() for _, part in groups]
    lane_height = 15.0 if max(lanes) <= 8 else 7.0
    heights = [44 + lane_height * count for count in lanes]
    top, width = 26.0, _STRIP_WIDTH
    panel = svg.Panel(width, top + sum(heights) + 44, f"{metric_title(metric)} of each arm, {title_of(protocol)}")
    panel.text(10, 15, title_of(protocol), size=13, bold=True)
    panel.x_axis(scale, top, top + sum(heights), f"{metric_title(metric)}, {data.judged} split", 6)
    y = top
    for (arm, part), height in zip(groups, heights, strict=True):
        values = part["value"].to_numpy(dtype=float)
        mean = float(values.mean())
        label = f"{svg.clipped(arm, 40)}: mean {number3(mean)}"
        panel.text(10, y + 17, label, size=12, bold=True, halo=True)
        _box(panel, scale, values, y + 29)
        for lane, seed in enumerate(sorted(part["seed"].unique(), key=_seed_order)):
            mine = part[part["seed"] == seed]
            ordered = mine.sort_values(["label_draw", "head_seed"], kind="stable")["value"].to_numpy(dtype=float)
            if len(ordered) > most:
                ordered = np.sort(ordered)[np.linspace(0, len(ordered) - 1, most).round().astype(int)]
            middle = y + 44 + lane_height * lane
            spread = lane_height * 0.34
            # Low-discrepancy offsets: dots keep apart, and the same scores always give the same picture.
            points = [(scale(v), middle + spread * (2 * ((i * 0.618034) % 1) - 1)) for i, v in enumerate(ordered)]
            fill = _NO_PRETRAINING if arm_kind(data, arm) == "colour" else svg.colour(seeds.index(seed))
            panel.dots(points, fill, 4.4 if len(ordered) > 20 else 6)
        y += height
        panel.line((10, y, width - 12, y), "#bdbdbd", 0.7)
    return panel.svg()


def _box(panel: svg.Panel, scale: svg.Scale, values: np.ndarray, y: float) -> None:
    first, median, third = (scale(float(q)) for q in np.percentile(values, [25, 50, 75]))
    panel.line((scale(float(values.min())), y, scale(float(values.max())), y), svg.SOFT, 1)
    panel.rect((first, y - 5, max(third - first, 0.5), 10), "#ffffff", svg.INK)
    panel.line((median, y - 5, median, y + 5), svg.INK, 2)
    x = scale(float(values.mean()))
    points = f"M{svg.number(x - 5)} {svg.number(y)}l5 -5 5 5 -5 5z"
    panel.parts.append(f'<path d="{points}" fill="{svg.INK}" stroke="#ffffff" stroke-width="1"/>')


def _seed(value: object) -> str:
    """A seed as it is named: integers without decimals, missing ones as `none`."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value is pd.NA:
        return "none"
    return str(int(value)) if isinstance(value, (float, np.floating)) and float(value).is_integer() else str(value)


def _seed_order(name: str) -> tuple[int, str]:
    """Seeds in order of their number, before what is no number."""
    return (int(name), "") if name.lstrip("-").isdigit() else (2**63, name)


def differences(data: ReportData, metric: str) -> Figure | None:
    """The comparisons with a nested bootstrap interval: difference and interval against the line of no difference."""
    frame = data.comparisons
    if frame.empty:
        return None
    rows = frame[(frame["test"] == BOOTSTRAP) & (frame["metric"] == metric)]
    rows = rows[np.isfinite(pd.to_numeric(rows["difference"], errors="coerce"))]
    if rows.empty:
        return None
    ends = np.concatenate([pd.to_numeric(rows[c], errors="coerce").to_numpy(dtype=float) for c in ("low", "high")])
    immaterial = _margins(frame, rows)
    reach = [*immaterial, *(-wide for wide in immaterial), 0.0]
    known = np.concatenate([ends[np.isfinite(ends)], rows["difference"].to_numpy(dtype=float), reach])
    low, high = float(known.min()), float(known.max())
    margin = max((high - low) * 0.08, 0.004)
    width, step, top = _STRIP_WIDTH, 46.0, 8.0
    bottom = top + step * len(rows)
    panel = svg.Panel(width, bottom + 42, f"differences in {metric_title(metric)} with intervals")
    scale = svg.Scale(low - margin, high + margin, 14, width - 14)
    panel.x_axis(scale, top, bottom, f"difference in {metric_title(metric)} (right of 0: the first arm is higher)", 6)
    for i, wide in enumerate(immaterial):
        if wide > 0:
            panel.rect((scale(-wide), top + step * i + 21, scale(wide) - scale(-wide), 20), "#e3e3e3")
    panel.line((scale(0), top, scale(0), bottom), svg.INK, 1.4)
    for i, row in enumerate(rows.itertuples(index=False)):
        y = top + step * i
        name = f"{svg.clipped(str(row.better), 26)} − {svg.clipped(str(row.than), 26)}, {title_of(str(row.protocol))}"
        panel.text(14, y + 16, f"{svg.clipped(name, 52)}: {signed3(float(row.difference))}", size=12, halo=True)
        clear = bool(row.low > 0 or row.high < 0)
        stroke = svg.colour(0) if clear else "#6b6b6b"
        if math.isfinite(float(row.low)) and math.isfinite(float(row.high)):
            panel.line((scale(float(row.low)), y + 31, scale(float(row.high)), y + 31), stroke, 3)
            for end in (float(row.low), float(row.high)):
                panel.line((scale(end), y + 25, scale(end), y + 37), stroke, 2)
        panel.dots([(scale(float(row.difference)), y + 31)], stroke, 11, 1)
    caption = (
        f"Differences between arms with {data.interval_level:.0%} intervals from the nested bootstrap (over "
        "pretraining seeds, label draws, head seeds and patients). Blue: the interval leaves out 0. Grey: it does not."
    )
    caption += " Grey band: differences within the recipe's margin, which do not matter." if any(immaterial) else ""
    return Figure(caption, [panel.svg()], wide=True)


def _margins(frame: pd.DataFrame, rows: pd.DataFrame) -> list[float]:
    """Equivalence margin of each comparison in `rows`; 0 where it has none."""
    tested = frame[frame["test"] == EQUIVALENCE]
    known = {tuple(row[k] for k in KEYS): float(row["margin"]) for _, row in tested.iterrows()}
    return [known.get(tuple(row[k] for k in KEYS), 0.0) for _, row in rows.iterrows()]


def training_curves(data: ReportData) -> Figure | None:
    """All curves of the histories: one panel a quantity, one colour an arm, one dash pattern a pretraining seed."""
    order = [arm for arm in arm_order(data) if arm in data.histories]
    histories = {arm: data.histories[arm] for arm in order if not data.histories[arm].empty}
    if not histories:
        return None
    present = list(dict.fromkeys(str(c) for h in histories.values() for c in h.columns))
    extra = [c for c in present if c not in CURVES and c not in _NOT_CURVES and _is_numeric(histories, c)]
    seeds = _history_seeds(histories)
    drawn = [curve_panel(histories, seeds, c, CURVES.get(c, title_of(c))) for c in [*CURVES, *extra] if c in present]
    panels = [panel for panel in [*_monitor_panels(data, list(histories), seeds), *drawn] if panel]
    if not panels:
        return None
    keys = [Key(arm, svg.swatch(svg.colour(i), line=True)) for i, arm in enumerate(histories)]
    keys += _seed_keys(seeds)
    caption = (
        "Pretraining, step by step. Embedding standard deviation or effective rank falling towards the floor would "
        f"mean collapse. Curves of more than {_CURVE_POINTS} points show means over equal stretches."
    )
    if any(len(data.monitors.get(arm, ())) for arm in histories):
        caption += (
            " kNN: validation images named by the class-balanced votes of the most similar labelled training images, in the "
            "features of the encoder as it then was."
        )
    return Figure(caption, panels, keys)


def _monitor_panels(data: ReportData, arms: Sequence[str], seeds: Sequence[str]) -> list[Markup | None]:
    """What was measured every few epochs; an arm that was not watched keeps its colour."""
    monitors = {arm: data.monitors.get(arm, pd.DataFrame()) for arm in arms}
    present = list(dict.fromkeys(str(c) for m in monitors.values() for c in m.columns))
    extra = [c for c in present if c not in MONITOR_CURVES and c not in _NOT_CURVES and _is_numeric(monitors, c)]
    wanted = [c for c in [*MONITOR_CURVES, *extra] if c in present]
    return [curve_panel(monitors, seeds, c, MONITOR_CURVES.get(c, title_of(c)), "epoch") for c in wanted]


def _seed_keys(seeds: Sequence[str]) -> list[Key]:
    """Dash patterns of the seeds, where there is more than one."""
    keys = [Key(f"seed {seed}", svg.swatch("#555555", svg.dash(i), line=True)) for i, seed in enumerate(seeds)]
    return keys if len(keys) > 1 else []


def _history_seeds(histories: Mapping[str, pd.DataFrame]) -> list[str]:
    names = {_seed(s) for history in histories.values() if "seed" in history for s in history["seed"].unique()}
    return sorted(names, key=_seed_order)


def _is_numeric(histories: Mapping[str, pd.DataFrame], column: str) -> bool:
    return all(pd.api.types.is_numeric_dtype(h[column]) for h in histories.values() if column in h)


def curve_panel(
    histories: Mapping[str, pd.DataFrame], seeds: Sequence[str], column: str, title: str, over: str = "step"
) -> Markup | None:
    """A column over steps or epochs; a row without a value (most measures are taken at some steps only) is passed over."""
    lines: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    for i, history in enumerate(histories.values()):
        if column not in history:
            continue
        names = [_seed(s) for s in history["seed"]] if "seed" in history else ["none"] * len(history)
        steps = history[over] if over in history else pd.Series(range(len(history)))
        for name in dict.fromkeys(names):
            mine = np.array([n == name for n in names])
            x = pd.to_numeric(steps, errors="coerce").to_numpy(dtype=float)[mine]
            y = pd.to_numeric(history[column], errors="coerce").to_numpy(dtype=float)[mine]
            x, y = x[np.isfinite(x) & np.isfinite(y)], y[np.isfinite(x) & np.isfinite(y)]
            order = np.argsort(x, kind="stable")
            x, y = _thin(x[order], y[order])
            lines.append((svg.colour(i), svg.dash(seeds.index(name)) if name in seeds else "", x, y))
    known = np.concatenate([y for *_, y in lines] or [np.empty(0)])
    if not known.size:
        return None
    low, high = float(known.min()), float(known.max())
    log = low > 0 and high / low > 20 and column not in _FROM_ZERO
    low = min(low, 0.0) if column in _FROM_ZERO else low
    pad = 0.0 if log else max((high - low) * 0.05, abs(high) * 1e-3, 1e-9)
    width, height, left, top = 360.0, 220.0, 50.0, 28.0
    unit = "optimiser step" if over == "step" else "epoch"
    panel = svg.Panel(width, height, f"{title} over {unit}s")
    across = np.concatenate([x for _, _, x, _ in lines])
    xs = svg.Scale(float(across.min()), max(float(across.max()), float(across.min()) + 1), left, width - 10)
    bottom = height - 38
    floor = low / 1.05 if log else low if column in _FROM_ZERO else low - pad
    ys = svg.Scale(floor, high * 1.05 if log else high + pad, bottom, top, log)
    panel.text(4, 14, f"{title}{' (log axis)' if log else ''}", size=12, bold=True)
    panel.y_axis(ys, left, width - 10)
    panel.x_axis(xs, bottom, bottom, unit if over == "step" else "epochs done")
    for stroke, pattern, x, y in lines:
        panel.curve([[(xs(float(a)), ys(float(b))) for a, b in zip(x, y, strict=True)]], stroke, pattern)
    return panel.svg()


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_CURVE_POINTS` points, each the mean of an equal stretch."""
    if len(x) <= _CURVE_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _CURVE_POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def range_tests(data: ReportData) -> Figure | None:
    """The learning-rate finder: loss against learning rate, one panel an arm, the chosen rate of each seed marked."""
    arms = [arm for arm in arm_order(data) if any(name == arm for name, _ in data.range_tests)]
    if not arms:
        return None
    seeds = sorted({seed for _, seed in data.range_tests})
    panels = [_range_panel(data, arm, seeds) for arm in arms]
    keys = _seed_keys(list(map(str, seeds)))
    caption = (
        "Learning-rate finder: the smoothed loss while the learning rate rises from step to step, from the weights that the "
        "pretraining then starts from. The dot marks the rate that was taken for it: half-way down the longest fall of the "
        f"loss. A loss above {_GIVEN_UP:g} times the smallest is drawn at the upper edge."
    )
    return Figure(caption, panels, keys)


def _range_panel(data: ReportData, arm: str, seeds: Sequence[int]) -> Markup:
    tests = {seed: data.range_tests[arm, seed] for seed in seeds if (arm, seed) in data.range_tests}
    losses = np.concatenate([np.array(test.losses, dtype=float) for test in tests.values()])
    rates = np.concatenate([np.array(test.learning_rates, dtype=float) for test in tests.values()])
    low, high = float(losses.min()), float(losses.max())
    high = min(high, _GIVEN_UP * low) if low > 0 else high
    pad = max((high - low) * 0.05, abs(high) * 1e-3, 1e-9)
    width, height, left, top = 360.0, 220.0, 50.0, 28.0
    bottom = height - 38
    xs = svg.Scale(float(rates.min()), max(float(rates.max()), float(rates.min()) * 1.01), left, width - 10, log=True)
    ys = svg.Scale(low - pad, high + pad, bottom, top)
    panel = svg.Panel(width, height, f"loss of {arm} over the learning rate, chosen rate marked")
    chosen = ", ".join(svg.short(test.chosen) for test in tests.values())
    panel.text(4, 14, svg.clipped(f"{svg.clipped(arm, 24)}, taken: {chosen}", 52), size=12, bold=True)
    panel.y_axis(ys, left, width - 10)
    panel.x_axis(xs, top, bottom, "learning rate (log axis)")
    curves = [name for name in arm_order(data) if name in data.histories]
    stroke = svg.colour(curves.index(arm) if arm in curves else 0)  # the arm's colour in the curves above
    for seed, test in tests.items():
        points = [(xs(rate), ys(min(loss, high))) for rate, loss in zip(test.learning_rates, test.losses, strict=True)]
        panel.curve([points], stroke, svg.dash(seeds.index(seed)))
        marked = points[int(np.argmin(np.abs(np.log(np.array(test.learning_rates) / test.chosen))))]
        panel.line((marked[0], top, marked[0], bottom), svg.SOFT, 1, "2 3")
        panel.dots([marked], svg.INK, 9, 1)
    return panel.svg()


def other_metrics(data: ReportData) -> list[str]:
    """Metrics besides the main one that have scores; none where so many dots would make the page large."""
    if len(data.scores) > 2 * _DOTS:
        return []
    have = set() if data.scores.empty else {str(m) for m in data.scores["metric"]}
    return [m for m in metric_order(data) if m != data.main_metric and m in have]
