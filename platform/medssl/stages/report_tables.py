"""The tables of a report, and the same numbers as CSV, for the terminal and for machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from medssl.metrics import LOWER_IS_BETTER
from medssl.stages.report_comparisons import ADDED, all_tests_table, is_planned
from medssl.stages.report_data import COLUMNS, DatasetFacts, ReportData, arm_order, complete, metric_order, protocol_order
from medssl.stages.report_page import Column, Table
from medssl.stages.report_text import (
    NONE,
    as_float,
    cell,
    count,
    mean_std,
    metric_title,
    number3,
    place,
    title_of,
)

_BAG_ROWS = 12
"""Sizes of bags with a row of their own."""


def result_table(data: ReportData, protocol: str) -> Table | None:
    """Mean and standard deviation of every metric, one row an arm, as papers print it."""
    summary = complete(data.summary, "summary")
    rows = summary[summary["protocol"] == protocol]
    if rows.empty:
        return None
    metrics = [m for m in metric_order(data) if (rows["metric"] == m).any()]
    arms = [a for a in arm_order(data) if (rows["arm"] == a).any()]
    found = {(str(r["arm"]), str(r["metric"])): r for _, r in rows.iterrows()}
    lines, means = [], np.full((len(arms), len(metrics)), np.nan)
    for i, arm in enumerate(arms):
        line = [arm]
        for j, metric in enumerate(metrics):
            row = found.get((arm, metric))
            line.append(NONE if row is None else mean_std(row["mean"], row["std"]))
            means[i, j] = math.nan if row is None else as_float(row["mean"])
        first = next(found[(arm, m)] for m in metrics if (arm, m) in found)
        lines.append([*line, repeats(first)])
    bold = set()
    for j, metric in enumerate(metrics):
        if len(arms) > 1 and np.isfinite(means[:, j]).any():
            best = np.nanargmin(means[:, j]) if metric in LOWER_IS_BETTER else np.nanargmax(means[:, j])
            bold.add((int(best), j + 1))
    columns = [Column("arm"), *(Column(metric_title(m), "mean ± std", True) for m in metrics)]
    columns.append(Column("n", "seeds × draws × heads", True))
    caption = (
        f"{title_of(protocol)}, {data.judged} split: mean ± standard deviation over all n scores (pretraining seeds × label "
        "draws × head seeds). Bold: the best mean, which is not yet a claim; the comparisons below say what is."
    )
    caption += " AUC is one-vs-rest, averaged over classes." if "auc" in metrics else ""
    lower = [metric_title(m) for m in metrics if m in LOWER_IS_BETTER]
    caption += f" Lower is better: {', '.join(lower)}." if lower else ""
    return Table(caption, columns, lines, frozenset(bold))


def repeats(row: pd.Series) -> str:
    """`315 (3 × 3 × 35)`, or the number alone where the kinds are not told apart."""
    kinds = [as_float(row.get(k)) for k in ("n_pretraining", "n_draw", "n_head")]
    text = count(row.get("n"))
    return f"{text} ({' × '.join(count(k) for k in kinds)})" if all(math.isfinite(k) for k in kinds) else text


def spread_table(data: ReportData, metric: str) -> Table | None:
    """Standard deviation of one metric over each kind of repeat."""
    summary = complete(data.summary, "summary")
    rows = summary[summary["metric"] == metric]
    kinds = ("std_pretraining", "std_draw", "std_head")
    if rows.empty or not any(math.isfinite(as_float(v)) for kind in kinds for v in rows[kind]):
        return None
    lines = []
    for protocol in protocol_order(data):
        for arm in arm_order(data):
            for _, row in rows[(rows["protocol"] == protocol) & (rows["arm"] == arm)].iterrows():
                spreads = [number3(row[kind]) for kind in kinds]
                lines.append([arm, title_of(protocol), number3(row["mean"]), *spreads])
    columns = [
        Column("arm"), Column("protocol"), Column(f"mean {metric_title(metric)}", "", True),
        Column("pretraining seeds", "std", True), Column("label draws", "std", True), Column("head seeds", "std", True),
    ]  # fmt: skip
    caption = f"Where the scatter of {metric_title(metric)} comes from: standard deviation over each kind of repeat."
    return Table(caption, columns, lines)


def chosen_table(data: ReportData) -> Table | None:
    """What each search chose."""
    frame = complete(data.searches, "searches")
    rows = frame[frame["best"].fillna(False).astype(bool)] if len(frame) else frame
    if rows.empty:
        return None
    lines = []
    for _, row in rows.iterrows():
        tried = int(((frame["arm"] == row["arm"]) & (frame["protocol"] == row["protocol"])).sum())
        rate, decay = (f"{as_float(row[c]):.3g}" for c in ("learning_rate", "weight_decay"))
        metric = metric_title(data.search_metrics.get(str(row["protocol"]), "balanced_accuracy"))
        found = [rate, decay, number3(row["score"]), metric, count(tried), "yes" if on_edge(row) else "no"]
        lines.append([str(row["arm"]), title_of(str(row["protocol"])), *found])
    columns = [
        Column("arm"), Column("protocol"), Column("learning rate", "", True), Column("weight decay", "", True),
        Column("score", "validation", True), Column("which is"), Column("points tried", "", True),
        Column("on the edge", "of the search space"),
    ]  # fmt: skip
    return Table("Learning rate and weight decay that the searches chose on the validation split.", columns, lines)


def on_edge(row: pd.Series) -> bool:
    """Whether a search row is marked as lying on the edge of its search space."""
    value = row.get("on_edge")
    return bool(value) and not (isinstance(value, float) and math.isnan(value))


def per_class(data: ReportData) -> pd.DataFrame:
    """From the confusion counts: arm, protocol, class, images, recall, precision."""
    order = [(a, p) for p in protocol_order(data) for a in arm_order(data)]
    keys = [k for k in order if k in data.confusions] + sorted(k for k in data.confusions if k not in order)
    rows = []
    for arm, protocol in keys:
        matrix = data.confusions[(arm, protocol)]
        counts_KK = np.asarray(matrix.counts, dtype=float)
        for k, name in enumerate(matrix.classes):
            true, predicted, right = counts_KK[k].sum(), counts_KK[:, k].sum(), counts_KK[k, k]
            recall = right / true if true > 0 else math.nan
            precision = right / predicted if predicted > 0 else math.nan
            rows.append((arm, protocol, str(name), float(true), float(recall), float(precision)))
    return pd.DataFrame(rows, columns=["arm", "protocol", "class", "images", "recall", "precision"])


def recall_table(data: ReportData, protocol: str) -> Table | None:
    """Recall of every class, one column an arm."""
    frame = per_class(data)
    frame = frame[frame["protocol"] == protocol]
    if frame.empty:
        return None
    arms = list(dict.fromkeys(frame["arm"]))
    lines = []
    for name in dict.fromkeys(frame["class"]):
        mine = frame[frame["class"] == name]
        recalls = {str(r["arm"]): number3(r["recall"]) for _, r in mine.iterrows()}
        lines.append([str(name), count(mine["images"].iloc[0]), *(recalls.get(a, NONE) for a in arms)])
    columns = [Column("class"), Column(f"{data.judged} images", "", True), *(Column(a, "recall", True) for a in arms)]
    caption = f"{title_of(protocol)}: recall (share of a class's images that were recognised), mean over all repeats."
    return Table(caption, columns, lines)


def counts_table(facts: DatasetFacts) -> Table | None:
    """Images and patients of a dataset by split and class."""
    if not facts.counts:
        return None
    splits = sorted(facts.counts, key=lambda s: (place(("train", "val", "test"), s), s))
    names = sorted({c for split in facts.counts.values() for c in split})
    lines = [[name, *(count(facts.counts[s].get(name, 0)) for s in splits)] for name in names if not facts.findings]
    lines = [[*line, count(sum(facts.counts[s].get(line[0], 0) for s in splits))] for line in lines]
    sums = [sum(facts.counts[s].values()) for s in splits]
    lines.append(["all images", *(count(n) for n in sums), count(sum(sums))])
    if facts.groups:
        groups = [count(facts.groups[s]) if s in facts.groups else NONE for s in splits]
        together = NONE if facts.leakage_allowed else count(sum(facts.groups.values()))  # the same patient twice
        lines.append(["patients", *groups, together])
    what = "" if facts.findings else "class"
    columns = [Column(what), *(Column(s, "images", True) for s in splits), Column("together", "images", True)]
    return Table(f"Dataset {facts.name} ({facts.role}): images by split{' and class' if what else ''}.", columns, lines)


def card_table(facts: DatasetFacts) -> Table:
    """The other facts of a dataset card."""
    leak = "none: no patient is in two splits"
    if facts.leakage_allowed:
        leak = f"ALLOWED by the user: {count(facts.leakage_patients)} patients have images in two splits"
    made = f"made at ingest, patient-disjoint, seed {facts.split_seed}"
    seed = "given by the user" if facts.split_seed is None else made
    rows = [
        ["licence", facts.licence or "not stated"],
        ["synthetic", "yes: drawn by a program, not taken from patients" if facts.synthetic else "no"],
        ["patient leakage", leak],
        *([["judged images with a look-alike in other splits", f"{count(facts.look_alikes)} ({count(facts.copies)} copies)"]]
          if facts.evaluated else []),
        ["images without a patient id", count(facts.unknown_patients)],
        ["images set aside at ingest", count(facts.rejected)],
        ["patient ids", "replaced by keyed hashes" if facts.pseudonymised else "as given"],
        ["splits", seed],
    ]
    rows += [["content digest", facts.digest]] if facts.digest else []
    return Table(f"Dataset card of {facts.name}.", [Column("field"), Column("value")], rows)


def bags_table(facts: DatasetFacts) -> Table | None:
    """How many bags have how many images, where the study pretrains on bags."""
    if not facts.bags:
        return None
    sizes = sorted(facts.bags)
    lines = [[count(size), count(facts.bags[size]), count(size * facts.bags[size])] for size in sizes[:_BAG_ROWS]]
    rest = sizes[_BAG_ROWS:]
    if rest:
        bags, images = sum(facts.bags[size] for size in rest), sum(size * facts.bags[size] for size in rest)
        lines.append([f"{count(rest[0])} to {count(rest[-1])}", count(bags), count(images)])
    lines.append(["all bags", count(sum(facts.bags.values())), count(sum(size * facts.bags[size] for size in sizes))])
    caption = (
        f"Dataset {facts.name}: bags by number of images, for pretraining. Both views of a bag of one image are of that image; "
        "where the bag has more, of two of its images."
    )
    return Table(caption, [Column("images in a bag"), Column("bags", "", True), Column("images", "", True)], lines)


def feeding_table(data: ReportData) -> Table | None:
    """The feeding rates as they were given."""
    frame = data.feeding
    if frame.empty:
        return None
    numeric = [pd.api.types.is_numeric_dtype(frame[c]) and not pd.api.types.is_bool_dtype(frame[c]) for c in frame]
    columns = [Column(title_of(str(c)), "", n) for c, n in zip(frame.columns, numeric, strict=True)]
    lines = [[cell(v) for v in row] for row in frame.itertuples(index=False)]
    return Table("How fast images were fed to the training.", columns, lines)


def csv_files(data: ReportData) -> dict[str, bytes]:
    """The frames as CSV, with all their digits."""
    frames = {name: complete(getattr(data, name), name) for name in COLUMNS}
    frames["per_class"] = per_class(data)
    return {f"{name}.csv": frame.to_csv(index=False, lineterminator="\n").encode() for name, frame in frames.items()}


def result_json(
    study: str, scores: pd.DataFrame, summary: pd.DataFrame, comparisons: pd.DataFrame
) -> dict[str, Any]:
    """The results for machines: `{"study", "arms": [...], "comparisons": [...]}`, numbers unrounded, NaN as null.

    `values` of an arm are its scores ordered by pretraining seed, label draw and head seed.
    """
    scores, summary = complete(scores, "scores"), complete(summary, "summary")
    repeats_of = ["pretraining_seed", "label_draw", "head_seed"]
    arms = []
    for _, row in summary.iterrows():
        mine = scores[(scores[["arm", "protocol", "metric"]] == list(row[["arm", "protocol", "metric"]])).all(axis=1)]
        ordered = mine.sort_values(repeats_of, kind="stable")["value"]
        number = as_float(row["n"])
        arms.append({
            "arm": str(row["arm"]), "protocol": str(row["protocol"]), "metric": str(row["metric"]),
            "mean": _json(row["mean"]), "std": _json(row["std"]),
            "n": int(number) if math.isfinite(number) else len(ordered), "values": [_json(v) for v in ordered],
        })  # fmt: skip
    texts = ("better", "than", "protocol", "metric", "test")
    tests = [
        {c: str(row[c]) if c in texts else is_planned(row[c]) if c == "planned" else _json(row[c])
         for c in COLUMNS["comparisons"]}
        for _, row in complete(comparisons, "comparisons").iterrows()
    ]  # fmt: skip
    return {"study": study, "arms": arms, "comparisons": tests}


def _json(value: Any) -> float | None:
    x = as_float(value)
    return x if math.isfinite(x) else None


def format_result_table(summary: pd.DataFrame, comparisons: pd.DataFrame, *, metric: str | None = None) -> str:
    """The results as aligned plain text for a terminal; `metric` limits the comparisons to one metric."""
    data = ReportData(study="", summary=summary, comparisons=comparisons, main_metric=_first_metric(summary))
    blocks = []
    for protocol in protocol_order(data):
        table = result_table(data, protocol)
        if table is not None:
            heads = [title_of(protocol), *(_short_title(c.title) for c in table.columns[1:])]
            blocks.append(_aligned([heads, *table.rows], [False, *(c.numeric for c in table.columns[1:])]))
    limited = comparisons if metric is None or comparisons.empty else comparisons[comparisons["metric"] == metric]
    tests = all_tests_table(ReportData(study="", summary=summary, comparisons=limited, main_metric=data.main_metric))
    if tests is not None:
        rows = [
            [r[0], r[1], _short_title(r[2]), *r[4:8], f"{r[3]} ({ADDED})" if r[8] == ADDED else r[3]]
            for r in tests.rows
        ]  # fmt: skip
        heads = ["comparison", "protocol", "metric", "difference", tests.columns[5].title, "p", "p, Holm", "test"]
        blocks.append(_aligned([heads, *rows], [False, False, False, True, True, True, True, False]))
    return "\n\n".join(blocks) if blocks else "no results yet"


def _first_metric(summary: pd.DataFrame) -> str:
    return str(summary["metric"].iloc[0]) if len(summary) else "balanced_accuracy"


def _short_title(title: str) -> str:
    return title.replace("balanced accuracy", "bal. accuracy")


def _aligned(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    widths = [max(len(line[c]) for line in lines) for c in range(len(right))]
    texts = [
        "  ".join(f"{t:>{w}}" if r else f"{t:<{w}}" for t, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * max(len(t) for t in texts), *texts[1:]])
