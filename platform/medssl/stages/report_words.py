"""The plain-language part of a report: what was found, for whom it holds, and what to be careful about."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from medssl.metrics import LOWER_IS_BETTER
from medssl.stages.report_comparisons import ADDED, KEYS, claims, corrected_tests, is_planned, margin_of, same_against_same
from medssl.stages.report_data import (
    BOOTSTRAP,
    EQUIVALENCE,
    NO_LABEL,
    NOT_REPORTED,
    SAME_AGAINST_SAME,
    WELCH,
    DatasetFacts,
    ReportData,
    arm_kind,
    arm_order,
    complete,
    protocol_order,
)
from medssl.stages.report_meanings import meaning
from medssl.stages.report_page import Text
from medssl.stages.report_tables import on_edge
from medssl.stages.report_text import (
    as_float,
    count,
    interval,
    metric_title,
    number3,
    p_value,
    plural,
    signed3,
    some,
    title_of,
)

FEW_REPEATS = 3
"""Fewer pretraining seeds or label draws than this are called few."""
COLLAPSED_STD, COLLAPSED_RANK = 0.02, 1.5
"""At the end of a pretraining, a standard deviation or an effective rank no larger than this is a collapse, as in the loop."""

_WITHOUT_SEEDS = ("colour", "outside")
"""Kinds of arms that have no pretraining to be repeated."""
FEW_LOOK_ALIKES = 0.01
"""Share of the judged images up to which look-alikes in other splits are counted without a caution."""


def verdicts(data: ReportData) -> list[Text]:
    """One statement a comparison on the main metric with a bootstrap interval; one saying so where there is none."""
    frame = complete(data.comparisons, "comparisons")
    rows = frame[(frame["test"] == BOOTSTRAP) & (frame["metric"] == data.main_metric)]
    said = [_verdict(data, row) for p in protocol_order(data) for _, row in rows[rows["protocol"] == p].iterrows()]
    said += [_verdict(data, row) for _, row in rows[~rows["protocol"].isin(protocol_order(data))].iterrows()]
    if said:
        return said
    if complete(data.summary, "summary").empty:
        return [Text("The study holds no scores.", "No result yet.", "unclear")]
    why = (
        f"No comparison of arms by {metric_title(data.main_metric)} with an interval over repeats and patients was "
        "made, so no arm is called better. The table below gives the scores as they were measured."
    )
    return [Text(why, "No claim.", "unclear")]


def _verdict(data: ReportData, row: pd.Series) -> Text:
    better, than, protocol = str(row["better"]), str(row["than"]), str(row["protocol"])
    low, high, difference = as_float(row["low"]), as_float(row["high"]), as_float(row["difference"])
    sign = -1 if data.main_metric in LOWER_IS_BETTER else 1
    first, second = mean_of(data, better, protocol), mean_of(data, than, protocol)
    title = metric_title(data.main_metric)
    means = f"{number3(first)} against {number3(second)}, a " if math.isfinite(first) and math.isfinite(second) else ""
    measured = f"{title[0].upper()}{title[1:]}: {means}difference of {signed3(difference)}"
    span = f"({data.interval_level:.0%} interval {interval(low, high)})"
    where = title_of(protocol)
    if not (math.isfinite(low) and math.isfinite(high)):
        text = f"{measured}. No interval could be computed, so nothing is claimed."
        return Text(text, f"{better} against {than} ({where}): no claim.", "unclear")
    text = f"{measured} {span}."
    if low * high > 0:
        return _apart(data, row, text + _in_hundred(data, first, second, better, than), sign * low > 0)
    few, same = _few(data, better, than, protocol) + _late(row), _shown_equivalence(data, row)
    text += " The interval includes no difference"
    if same is not None:
        head = f"{better} and {than} differ by less than {margin_of(same)} ({where})"
        if _from_one(data, row):
            return Text(f"{text}.{_immaterial(data, same)}{few}", f"{head}, from a single pretraining.", "unclear")
        return Text(f"{text}.{_immaterial(data, same)}{few}", f"{head}.", "good")
    tried = _equivalence_of(data, row)
    equal = "nor that they are equally good" if tried is None else f"nor that they differ by less than {margin_of(tried)}"
    text += f": these data do not show which of the two is better, {equal}."
    return Text(text + few, f"Not enough evidence: {better} against {than} ({where}).", "unclear")


def _apart(data: ReportData, row: pd.Series, text: str, is_better: bool) -> Text:
    """The statement where the interval leaves out no difference."""
    better, than, protocol = str(row["better"]), str(row["than"]), str(row["protocol"])
    higher, where = "better" if is_better else "worse", title_of(protocol)
    same = _shown_equivalence(data, row)
    text += "" if same is None else _immaterial(data, same)
    text += _few(data, better, than, protocol) + _late(row)
    if _from_one(data, row):
        return Text(text, f"{better} scored {higher} than {than} ({where}), from a single pretraining.", "unclear")
    if as_float(row["p_holm"]) >= 1 - data.interval_level:
        tests = corrected_tests(data.comparisons)
        text += f" Corrected for the {tests} tests of this study (Holm), p is {p_value(row['p_holm'])}."
        head = f"{better} scored {higher} than {than} ({where}), but not beyond what so many tests find by chance."
        return Text(text, head, "unclear")
    return Text(text, f"{better} is {higher} than {than} ({where}).", "good")


def _from_one(data: ReportData, row: pd.Series) -> bool:
    """Whether one of the two arms has a single pretraining."""
    return any(_single_pretraining(data, str(row[arm]), str(row["protocol"])) for arm in ("better", "than"))


def _equivalence_of(data: ReportData, row: pd.Series) -> pd.Series | None:
    """The equivalence test of a claim, where the recipe has a margin for it."""
    frame = complete(data.comparisons, "comparisons")
    rows = frame[(frame["test"] == EQUIVALENCE) & (frame[list(KEYS)] == list(row[list(KEYS)])).all(axis=1)]
    return None if rows.empty else rows.iloc[0]


def _shown_equivalence(data: ReportData, row: pd.Series) -> pd.Series | None:
    """The same where it says that the two differ by less than the margin, corrected for the study's other tests too."""
    same = _equivalence_of(data, row)
    ps = [] if same is None else [p for p in (as_float(same["p"]), as_float(same["p_holm"])) if math.isfinite(p)]
    return same if ps and max(ps) < 1 - data.interval_level else None


def _immaterial(data: ReportData, same: pd.Series) -> str:
    """That a difference is smaller than what the recipe calls immaterial."""
    late = f" (a margin {ADDED})" if is_planned(same["planned"]) is False else ""
    return (
        f" It is smaller than the margin of {margin_of(same)} that the recipe calls immaterial{late}: the "
        f"{2 * data.interval_level - 1:.0%} interval {interval(same['low'], same['high'])} lies within it."
    )


def _late(row: pd.Series) -> str:
    return f" This comparison was {ADDED}." if is_planned(row["planned"]) is False else ""


def about_plan(data: ReportData) -> Text | None:
    """When the list of comparisons was fixed, which were added later, and which were dropped; None where nobody knows."""
    if data.first_list is None:
        return None
    before = data.first_list.evaluated_before
    text = f"The comparisons were fixed when this study was first run (recipe {data.first_list.recipe[:12]})"
    text += (
        ", before any of its evaluations." if not before
        else f". By then {plural(before, 'evaluation')} of its arms had been made in this store, so the list may have been "
        "chosen with their scores in view."
    )  # fmt: skip
    added, dropped = [], []
    for (better, than, protocol, metric), by_test in claims(complete(data.comparisons, "comparisons")):
        name = f"{better} over {than} ({title_of(protocol)}, {metric_title(metric)})"
        late = [test for test, row in by_test.items() if is_planned(row["planned"]) is False]
        if BOOTSTRAP in late:
            added.append(name)
        elif late:
            added.append(f"the margin of {margin_of(by_test[late[0]])} for {name}")
        if NOT_REPORTED in by_test:
            margin = f"the margin of {margin_of(by_test[NOT_REPORTED])} for " if BOOTSTRAP in by_test else ""
            dropped.append(margin + name)
    text += f" {ADDED[0].upper()}{ADDED[1:]}: {'; '.join(added)}." if added else ""
    text += f" {NOT_REPORTED[0].upper()}{NOT_REPORTED[1:]}: {'; '.join(dropped)}." if dropped else ""
    return Text(text, tone="warning" if added or dropped or before else "plain")


def _in_hundred(data: ReportData, first: float, second: float, better: str, than: str) -> str:
    drawn = {"accuracy": "images", "balanced_accuracy": "images drawn evenly from all classes"}.get(data.main_metric)
    if drawn is None or data.findings or not (math.isfinite(first) and math.isfinite(second)):
        return ""
    of = 100 if round(100 * first) != round(100 * second) else 1000
    named = f"{better} names about {of * first:.0f} correctly and {than} about {of * second:.0f}"
    return f" Of {of:,} {data.judged} {drawn}, {named}."


def _few(data: ReportData, better: str, than: str, protocol: str) -> str:
    """The reservation that too few repeats call for; empty where there are enough."""
    lacking = [r for arm in (better, than) if (r := few_repeats(data, arm, protocol))]
    return f" Few repeats: {'; '.join(lacking)}; the interval may be too narrow." if lacking else ""


def _single_pretraining(data: ReportData, arm: str, protocol: str) -> bool:
    """Whether an arm with an encoder has one pretraining seed, which tells of that encoder and not of the method."""
    return arm_kind(data, arm) not in _WITHOUT_SEEDS and _repeats(data, arm, protocol)[0] == 1


def _repeats(data: ReportData, arm: str, protocol: str) -> tuple[float, float]:
    """Pretraining seeds and label draws of an arm; NaN where the summary has none."""
    summary = complete(data.summary, "summary")
    rows = summary[(summary["arm"] == arm) & (summary["protocol"] == protocol)]
    if rows.empty:
        return math.nan, math.nan
    return as_float(rows["n_pretraining"].iloc[0]), as_float(rows["n_draw"].iloc[0])


def few_repeats(data: ReportData, arm: str, protocol: str) -> str:
    """Which repeats of an arm are fewer than FEW_REPEATS, in words; empty where none is known to be."""
    seeds, draws = _repeats(data, arm, protocol)
    words = []
    kind = arm_kind(data, arm)
    if seeds < FEW_REPEATS and kind not in _WITHOUT_SEEDS:
        words.append(plural(int(seeds), "pretraining seed"))
    if draws < FEW_REPEATS and kind != "outside":
        words.append(plural(int(draws), "draw") + " of the labels")
    return f"{arm} has {' and '.join(words)}" if words else ""


def mean_of(data: ReportData, arm: str, protocol: str) -> float:
    """Mean of the main metric of an arm; NaN where the summary has none."""
    summary = complete(data.summary, "summary")
    here = (summary["arm"] == arm) & (summary["protocol"] == protocol) & (summary["metric"] == data.main_metric)
    return as_float(summary[here]["mean"].iloc[0]) if here.any() else math.nan


def basis(data: ReportData) -> list[Text]:
    """On how many images and patients the scores were measured, what the metric means, what the interval covers."""
    tested = [facts for facts in data.datasets if facts.evaluated and facts.judged_images]
    texts = [Text(_measured_on(data, facts)) for facts in tested]
    said = meaning(data.main_metric, findings=data.findings)
    classes = max((_class_number(f, data.split) for f in data.datasets if f.evaluated), default=0)
    if said and data.main_metric == "balanced_accuracy" and classes > 1 and not data.findings:
        said += f" Guessing among {classes} classes gives {number3(1 / classes)}."
    if not complete(data.comparisons, "comparisons").empty:
        said += (
            " An interval allows for chance in the pretraining, in which images were labelled, in the start of the "
            "classifier, and in which patients were judged, as far as the study repeats each."
        )
    texts += [Text(said.strip())] if said else []
    return [*texts, Text("A research result; not for decisions about patients.")]


def _class_number(facts: DatasetFacts, split: str) -> int:
    return sum(number > 0 for name, number in facts.counts.get(split, {}).items() if name != NO_LABEL)


def _measured_on(data: ReportData, facts: DatasetFacts) -> str:
    who = f" of {plural(facts.judged_patients, 'patient')}" if facts.judged_patients else ""
    apart = (
        "" if facts.leakage_allowed or data.leaks
        else ", none of whom is known to be among the training images" if who and facts.unknown_patients
        else ", none of whom is among the training images" if who
        else ", apart from the training images"
    )  # fmt: skip
    measured = f"Measured on {plural(facts.judged_images, f'{data.judged} image')}{who}{apart} (dataset {facts.name})."
    if data.searches.empty:
        return measured
    which = "other images" if data.split == "test" else "these images too, so the scores are a little too good"
    return f"{measured} Learning rate and weight decay were chosen on {which}."


def cautions(data: ReportData) -> list[Text]:
    """All warnings: leaks that were allowed, those of the caller, and those that the data themselves call for."""
    leaks, texts = list(data.leaks), list(data.warnings)
    for facts in data.datasets:
        if facts.leakage_allowed:
            leaks.append(
                f"Dataset {facts.name}: {plural(facts.leakage_patients, 'patient')} with images in two splits, allowed "
                "by the user at ingest. Scores may be too high."
            )
        texts += _look_alikes(data, facts)
        if facts.synthetic:
            texts.append(
                f"The images of {facts.name} are synthetic, drawn by a program: the scores show that the platform "
                "works and say nothing about patients."
            )
    texts += [*_below_colour(data), *_collapses(data), *_edges(data), *_all_few(data)]
    red = [Text(text, "Leakage.", "leak") for text in leaks]
    return [*red, *(Text(text, "Caution.", "warning") for text in dict.fromkeys(texts))]


def _look_alikes(data: ReportData, facts: DatasetFacts) -> list[str]:
    """Where copies or many look-alikes of judged images were trained on."""
    if not facts.copies and facts.look_alikes <= FEW_LOOK_ALIKES * facts.judged_images:
        return []
    return [
        f"Dataset {facts.name}: {plural(facts.look_alikes, f'{data.judged} image')} of {count(facts.judged_images)} "
        f"{'looks' if facts.look_alikes == 1 else 'look'} nearly like images of other splits, {count(facts.copies)} of them byte "
        "for byte. Scores may be too high; `medssl inspect` lists them."
    ]


def _below_colour(data: ReportData) -> list[str]:
    sign = -1 if data.main_metric in LOWER_IS_BETTER else 1
    texts = []
    for protocol in protocol_order(data):
        floors = [(mean_of(data, a, protocol), a) for a in arm_order(data) if arm_kind(data, a) == "colour"]
        for floor, colour in floors:
            for arm in arm_order(data):
                mean = mean_of(data, arm, protocol)
                if arm_kind(data, arm) == "pretrained" and sign * mean <= sign * floor:
                    texts.append(
                        f"{arm} ({number3(mean)}) does not beat {colour} ({number3(floor)}) by "
                        f"{metric_title(data.main_metric)} ({title_of(protocol)}): its features are worth no more "
                        "than the image's colours."
                    )
    return texts


def _collapses(data: ReportData) -> list[str]:
    texts = []
    for arm, history in data.histories.items():
        groups = history.groupby("seed", sort=True) if "seed" in history else [("", history)]
        found = [(f"seed {seed}: " if seed != "" else "", _collapse(part)) for seed, part in groups]
        lost = [who + measures for who, measures in found if measures]
        if lost:
            texts.append(
                f"{arm}: the embedding collapsed (at the end of the pretraining, {'; '.join(lost)}). Where all images get about "
                "one feature, or features along one direction, nothing tells them apart: these scores say that the training "
                "failed, not what its method is worth."
            )
    return texts


def _collapse(history: pd.DataFrame) -> str:
    """The last measures of one pretraining where either says that it collapsed; empty where they do not, or are not there."""
    limits = {"embedding_std": COLLAPSED_STD, "effective_rank": COLLAPSED_RANK}
    names = {"embedding_std": "standard deviation", "effective_rank": "effective rank"}
    last = {}
    for column in limits:
        values = pd.to_numeric(history.get(column, pd.Series(dtype=float)), errors="coerce").to_numpy(dtype=float)
        known = values[np.isfinite(values)]
        if known.size:
            last[column] = float(known[-1])
    if not any(value <= limits[column] for column, value in last.items()):
        return ""
    return ", ".join(f"{names[column]} {number3(value)}" for column, value in last.items())


def _edges(data: ReportData) -> list[str]:
    frame = complete(data.searches, "searches")
    rows = frame[frame["best"].fillna(False).astype(bool)] if len(frame) else frame
    places = [f"{row['arm']} ({title_of(str(row['protocol']))})" for _, row in rows.iterrows() if on_edge(row)]
    if not places:
        return []
    return [
        f"The best point of the search lies on the edge of its space for {some(list(dict.fromkeys(places)), ', ')}: a "
        "wider space may give a better one."
    ]


def _all_few(data: ReportData) -> list[str]:
    """Few repeats where no verdict says so already (no comparison with an interval)."""
    frame = complete(data.comparisons, "comparisons")
    covered = set(frame[(frame["test"] == BOOTSTRAP) & (frame["metric"] == data.main_metric)]["protocol"].astype(str))
    words = [
        f"{few} ({title_of(p)})"
        for p in protocol_order(data) if p not in covered
        for a in arm_order(data) if (few := few_repeats(data, a, p))
    ]  # fmt: skip
    return [f"Few repeats: {some(words, '; ')}. Differences between the arms may be chance."] if words else []


def about_welch(data: ReportData) -> Text | None:
    """Why the tests over head seeds prove nothing by themselves, with this study's own A/A line where there is one."""
    frame = complete(data.comparisons, "comparisons")
    if not frame["test"].isin([WELCH, SAME_AGAINST_SAME]).any():
        return None
    text = (
        f"The papers' test ({WELCH}) only asks whether these very encoders, on these very labels, differ: two encoders "
        "that are both random differ too."
    )
    p = same_against_same(frame)
    counted = [s for s in data.same_against_same if s.pairs > 0 and math.isfinite(s.share_significant)]
    for same in counted:
        text += (
            f" The A/A line asks it about {same.arm} against {same.arm} ({title_of(same.protocol)}, "
            f"{metric_title(same.metric)}): p < {same.threshold:g} in {round(same.share_significant * same.pairs)} of "
            f"{plural(same.pairs, 'pair')} that differ in nothing but their seed."
        )
    if len(p) and not counted:
        small, tests = int((p < 0.05).sum()), plural(len(p), "test")
        text += f" The A/A line asks it about random against random: p < 0.05 in {small} of {tests}."
    elif not counted:
        text += " No A/A line (random against random) was measured in this study."
    return Text(f"{text} A small p in that column is therefore no evidence for a pretraining method; the interval is.")


def notes(data: ReportData) -> Sequence[Text]:
    """The caller's notes."""
    return [Text(text) for text in data.notes]
