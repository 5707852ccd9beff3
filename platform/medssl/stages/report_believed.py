"""Can the probabilities be believed: reliability plots, calibration errors, scores under another prior, decision curves."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from markupsafe import Markup

from medssl.calibration import Reliability
from medssl.stages import report_svg as svg
from medssl.stages.report_data import DecisionCurves, ReportData, arm_order, complete, metric_order, protocol_order
from medssl.stages.report_page import Block, Column, Figure, Fold, Key, Table, Text
from medssl.stages.report_text import as_float, metric_title, number3, title_of

_CORRECTED = "5 3"


def believed(data: ReportData) -> list[Block | None]:
    """The whole section; empty without predictions."""
    frame = complete(data.calibration, "calibration")
    if frame.empty:
        return []
    back = any(corrected is not None for _, corrected in data.reliabilities.values())
    text = (
        "A probability can be believed where eight of ten images are named rightly that are given 0.8. Confidence above accuracy "
        "is being too sure, below it too unsure."
    )
    if data.findings:
        text += (
            " Here an image counts once for each finding that is known of it: named rightly is a finding that is there and is "
            "said to be, or is not and is said not to be; the probability is that of what is said."
        )
    if back:
        text += (
            " These classifiers were trained with class weights or over-sampling, as if all "
            f"{'' if data.findings else 'classes '}were equally frequent; where they are not, their probabilities cannot fit. "
            "The corrected columns and the dashed lines put the "
            f"{'frequencies of the findings in the' if data.findings else 'class frequencies of the'} "
            "labelled training images back by Bayes' rule, without a look at the judged images."
        )
    return [Text(text), reliability_plots(data), calibration_table(data), *_prior_tables(data), decision_plots(data)]


def _keys_in_order(data: ReportData, keys: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """(arm, protocol) in the order of protocols, then arms, of those in `keys`; what neither order knows comes last."""
    ordered = [(a, p) for p in protocol_order(data) for a in arm_order(data) if (a, p) in keys]
    return ordered + sorted(set(keys) - set(ordered))


def reliability_plots(data: ReportData) -> Figure | None:
    """Accuracy over confidence, a panel an arm and protocol."""
    keys = _keys_in_order(data, data.reliabilities)
    if not keys:
        return None
    named = "what is said" if data.findings else "the named class"
    panels = [_reliability(f"{svg.clipped(arm, 24)}, {title_of(p)}", *data.reliabilities[arm, p], named) for arm, p in keys]
    legend = [Key("as predicted", svg.swatch(svg.colour(0), line=True))]
    if any(corrected is not None for _, corrected in data.reliabilities.values()):
        legend.append(Key("class frequencies put back", svg.swatch(svg.colour(1), _CORRECTED, line=True)))
    legend.append(Key("believable", svg.swatch(svg.SOFT, "2 2", line=True)))
    caption = (
        f"Share of {data.judged} images that are named rightly over the probability of {named}, all runs together in 15 "
        "bins. Bars: share of the images in each bin, as predicted. Points of few images scatter."
    )
    return Figure(caption, panels, legend)


def _reliability(title: str, plain: Reliability, corrected: Reliability | None, named: str) -> Markup:
    width, height, left, top, floor = 360.0, 334.0, 40.0, 40.0, 296.0
    panel = svg.Panel(width, height, f"reliability of {title}")
    panel.text(4, 14, title, size=12, bold=True)
    panel.text(4, 31, "share named rightly", size=11, fill=svg.SOFT)
    xs, ys = svg.Scale(0, 1, left, width - 12), svg.Scale(0, 1, floor, top)
    panel.y_axis(ys, left, width - 12, 5)
    panel.x_axis(xs, top, floor, f"probability of {named}", 5)
    shares_B = plain.images_B / plain.images_B.sum()
    for confidence, share in zip(plain.confidence_B, shares_B, strict=True):
        place, tall = min(math.ceil(confidence * 15), 15) - 1, float(share) * (floor - top) / 2
        box = (xs(place / 15) + 1, floor - tall, (xs(1) - xs(0)) / 15 - 2, tall)
        panel.rect(box, "#d8d8d8", title=f"{share:.1%} of the images")
    panel.line((xs(0), ys(0), xs(1), ys(1)), svg.SOFT, 1, "2 2")
    for found, colour, pattern, size in ((corrected, 1, _CORRECTED, 5.0), (plain, 0, "", 7.0)):
        if found is not None:
            points = [(xs(float(c)), ys(float(a))) for c, a in zip(found.confidence_B, found.accuracy_B, strict=True)]
            panel.curve([points], svg.colour(colour), pattern)
            panel.dots(points, svg.colour(colour), size, 1)
    return panel.svg()


def calibration_table(data: ReportData) -> Table | None:
    """Confidence, accuracy, calibration error and Brier score, one row an arm and protocol."""
    frame = complete(data.calibration, "calibration")
    found = {(str(row["arm"]), str(row["protocol"])): row for _, row in frame.iterrows()}
    keys = _keys_in_order(data, found)
    if not keys:
        return None
    corrected = any(math.isfinite(as_float(row["ece_corrected"])) for row in found.values())
    scaled = any(math.isfinite(as_float(row["temperature"])) for row in found.values())
    names = ["confidence", "accuracy", "ece", "brier", *(["ece_corrected", "brier_corrected"] if corrected else [])]
    names += ["temperature", "ece_scaled", "brier_scaled"] if scaled else []
    lines = [[arm, title_of(protocol), *(number3(found[arm, protocol][name]) for name in names)] for arm, protocol in keys]
    columns = [
        Column("arm"), Column("protocol"), Column("confidence", "mean", True), Column("accuracy", "", True),
        Column("calibration error", "ECE", True), Column("Brier score", "", True),
        *([Column("calibration error", "ECE, corrected", True), Column("Brier score", "corrected", True)] if corrected else []),
        *([Column("temperature", "mean", True), Column("calibration error", "ECE, scaled", True),
           Column("Brier score", "scaled", True)] if scaled else []),
    ]  # fmt: skip
    caption = (
        "Calibration, mean over all runs. ECE: distance of accuracy from confidence, mean over images in 15 bins. Brier score: "
        f"squared distance of the probabilities from the label, 0 to {1 if data.findings else 2}. Lower is better for both."
    )
    if scaled:
        caption += (
            " Scaled: logits divided by the temperature that fits each run's validation predictions, which leaves the named "
            "classes as they are; `medssl predict --calibrated` does the same."
        )
    return Table(caption, columns, lines)


def _prior_tables(data: ReportData) -> list[Block | None]:
    """Scores where classes are as frequent as in deployment, a table a protocol; those but the main one folded."""
    frame = complete(data.priors, "priors")
    if frame.empty:
        return []
    shares = ", ".join(f"{name} {share:.1%}" for name, share in data.deployment_prior.items())
    said = Text(
        f"Where the classes are as frequent as {shares}: each image counts by how much more frequent its class is there. This "
        "assumes that images of a class look alike in both places, and only how many there are of each differs (label shift); "
        "other cameras or other patients are not in it.",
        "Another place.",
    )
    tables = [_prior_table(data, protocol) for protocol in protocol_order(data) if (frame["protocol"] == protocol).any()]
    rest: list[Block] = list(tables[1:])
    return [said, tables[0], Fold("The same under the other protocols", rest) if rest else None]


def _prior_table(data: ReportData, protocol: str) -> Table:
    frame = complete(data.priors, "priors")
    found = {
        (str(row["arm"]), str(row["metric"])): row for _, row in frame.iterrows() if str(row["protocol"]) == protocol
    }  # fmt: skip
    lines = [
        [arm, metric_title(metric), *(number3(found[arm, metric][name]) for name in ("measured", "as_it_is", "corrected"))]
        for metric in metric_order(data) for arm in arm_order(data) if (arm, metric) in found
    ]  # fmt: skip
    columns = [
        Column("arm"), Column("metric"), Column(f"{data.judged} split", "as measured", True),
        Column("there", "probabilities as they are", True), Column("there", "probabilities corrected", True),
    ]  # fmt: skip
    caption = (
        f"{title_of(protocol)}: scores here and there, mean over all runs. Corrected: the class frequencies of the training are "
        "exchanged for those by Bayes' rule, so that more images are named as the common classes: accuracy tends to rise with "
        "it, balanced accuracy to fall."
    )
    return Table(caption, columns, lines)


def decision_plots(data: ReportData) -> Figure | None:
    """Net benefit over the threshold, a panel a protocol, a line an arm."""
    curves = data.decisions
    keys = _keys_in_order(data, curves.models) if curves is not None else []
    if curves is None or not keys:
        return None
    arms = list(dict.fromkeys(arm for arm, _ in keys))
    panels = [_decision_panel(data, curves, protocol, arms) for protocol in dict.fromkeys(p for _, p in keys)]
    legend = [Key(arm, svg.swatch(svg.colour(i), svg.dash(i), line=True)) for i, arm in enumerate(arms)]
    legend.append(Key("act on every image", svg.swatch(svg.SOFT, "1 2", line=True)))
    caption = (
        f"Decision curves (Vickers and Elkin 2006) for acting on '{curves.class_name}', which {curves.share:.1%} of the "
        f"{data.judged} images are. The threshold is the probability from which one would act: 0.1 says that nine needless "
        "actions cost as much as one that was needed is worth. Net benefit: images rightly acted on, less the needless ones at "
        "that rate, per image; mean over all runs; where the training had class weights or over-sampling, with the class "
        "frequencies of the labelled images put back. A classifier is of use where its line is above "
        "both acting on every image and 0, which is acting on none."
    )
    return Figure(caption, panels, legend)


def _decision_panel(data: ReportData, curves: DecisionCurves, protocol: str, arms: list[str]) -> Markup:
    width, height, left, top = 360.0, 254.0, 50.0, 40.0
    bottom = height - 40
    thresholds_T = np.asarray(curves.thresholds_T, dtype=float)
    mine = {arm: np.asarray(curves.models[arm, protocol], dtype=float) for arm in arms if (arm, protocol) in curves.models}
    high = max(float(curves.share), *(float(line.max()) for line in mine.values())) * 1.05
    low = -0.3 * high
    xs, ys = svg.Scale(0, 1, left, width - 10), svg.Scale(low, high, bottom, top)
    panel = svg.Panel(width, height, f"decision curves for {curves.class_name}, {title_of(protocol)}")
    panel.text(4, 14, f"{svg.clipped(curves.class_name, 24)}, {title_of(protocol)}", size=12, bold=True)
    panel.text(4, 31, "net benefit per image", size=11, fill=svg.SOFT)
    panel.y_axis(ys, left, width - 10)
    panel.x_axis(xs, top, bottom, "threshold")
    panel.line((xs(0), ys(0), xs(1), ys(0)), svg.INK, 1.2)
    lines = [(np.asarray(curves.all_T, dtype=float), svg.SOFT, "1 2")]
    lines += [(line, svg.colour(arms.index(arm)), svg.dash(arms.index(arm))) for arm, line in mine.items()]
    for line_T, stroke, pattern in lines:
        seen_T = line_T >= low  # what falls out of the picture below is no use, however little
        stretches = np.split(np.flatnonzero(seen_T), np.flatnonzero(np.diff(np.flatnonzero(seen_T)) > 1) + 1)
        panel.curve([[(xs(float(thresholds_T[t])), ys(float(line_T[t]))) for t in part] for part in stretches], stroke, pattern)
    return panel.svg()
