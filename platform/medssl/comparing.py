"""The comparisons of a study: from the predictions of all its runs to what they prove.

Everything is computed from the saved per-image predictions of every run, so that patients can be resampled with everything
else. Shapes: P pretraining seeds, D label draws, S head seeds, N images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.claims import Planned
from medssl.comparison import Comparison
from medssl.recipe import Recipe
from medssl.stages.report_data import BOOTSTRAP, EQUIVALENCE, NOT_REPORTED, SAME_AGAINST_SAME, WELCH, SameAgainstSame
from medssl.statistics import aa_summary, effect_size, holm, nested_bootstrap, nested_equivalence, welch


@dataclass(frozen=True, eq=False)
class Runs:
    """All runs of one arm under one protocol."""

    arm: str
    protocol: str
    metrics: dict[str, NDArray[np.float64]]
    """Scores (P, D, S) by metric."""
    probabilities_PDSNK: NDArray[np.float32]
    labels_N: NDArray[np.int64]
    patients_N: list[str | None]
    temperatures_PDS: NDArray[np.float64] | None = None
    """Fitted on each run's validation predictions; NaN where a run has none."""


@dataclass(frozen=True)
class Found:
    """What the comparisons found."""

    rows: list[dict[str, Any]]
    """Rows of the comparisons frame; what a row has not is left out."""
    same: list[SameAgainstSame]
    notes: list[str]


def compare(recipe: Recipe, runs: Mapping[tuple[str, str], Runs], planned: Planned | None = None) -> Found:
    """Tests the recipe's comparisons, and random encoders against each other where a comparison rests on one.

    Args:
        runs: by arm and protocol.
        planned: the comparisons that were fixed before the study was first run; None marks none as planned or added.
    """
    found = Found([], [], [])
    for claim in recipe.comparisons:
        _compare(recipe, claim, runs[claim.better, claim.judged], runs[claim.than, claim.judged], planned, found)
    _correct(found.rows)
    for dropped in planned.dropped(recipe.comparisons) if planned else ():
        found.rows.append(_base(dropped) | {"test": NOT_REPORTED, "margin": dropped.equivalence_margin, "planned": True})
    kinds = {arm.name: arm for arm in recipe.arms}
    for name, protocol, metric in dict.fromkeys((c.than, c.judged, c.metric) for c in recipe.comparisons):
        if name in kinds and kinds[name].is_random:
            _same_against_same(recipe, runs[name, protocol], metric, found)
    return found


def _base(claim: Comparison) -> dict[str, Any]:
    return dict(zip(("better", "than", "protocol", "metric"), claim.claim, strict=True))


def _compare(recipe: Recipe, claim: Comparison, better: Runs, than: Runs, planned: Planned | None, found: Found) -> None:
    base = _base(claim) | {"planned": planned.has(claim) if planned else None}
    # features without chance have one seed; both arms must have the same label draws, of which predictions from a file know none
    outside = [arm.name for arm in recipe.outside]
    draws = min([run.probabilities_PDSNK.shape[1] for run in (better, than) if run.arm not in outside], default=1)
    first_PDSNK, second_PDSNK = (
        np.repeat(run.probabilities_PDSNK, draws, axis=1) if run.arm in outside else run.probabilities_PDSNK[:, :draws]
        for run in (better, than)
    )
    interval = nested_bootstrap(
        first_PDSNK,
        second_PDSNK,
        better.labels_N,
        better.patients_N,
        metric=claim.metric,
        replicates=recipe.bootstrap.replicates,
        confidence=recipe.bootstrap.level,
        seed=recipe.bootstrap.seed,
    )
    size = effect_size(better.metrics[claim.metric][:, :draws], than.metrics[claim.metric][:, :draws])
    found.rows.append(base | _measured(interval) | {"test": BOOTSTRAP, "effect_size": size})
    found.notes.extend(f"{claim.better} against {claim.than} under {claim.judged}: {note}" for note in interval.notes)
    if claim.equivalence_margin is not None:
        same = nested_equivalence(interval, claim.equivalence_margin, level=1 - recipe.bootstrap.level)
        known = {"planned": planned.has_margin(claim) if planned else None, "margin": same.margin}
        found.rows.append(base | _measured(same) | {"test": EQUIVALENCE} | known)
    # the papers' design: one encoder each, one labelled set, runs that differ in the head
    first, second = better.metrics[claim.metric][0, 0], than.metrics[claim.metric][0, 0]
    if min(len(first), len(second)) > 1:
        found.rows.append(base | _measured(welch(first, second)) | {"test": WELCH})


def _measured(test: Any) -> dict[str, float]:
    return {"difference": test.difference, "low": test.low, "high": test.high, "p": test.p}


def _correct(rows: list[dict[str, Any]]) -> None:
    """Holm's p of everything that rests on the nested bootstrap, as one family."""
    family = [row for row in rows if row["test"] in (BOOTSTRAP, EQUIVALENCE)]
    for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
        row["p_holm"] = float(p)


def _same_against_same(recipe: Recipe, run: Runs, metric: str, found: Found) -> None:
    """The papers' test where nothing differs: two random initialisations of the same arm."""
    if run.probabilities_PDSNK.shape[0] < 2 or run.probabilities_PDSNK.shape[2] < 2:
        return
    replicates = recipe.bootstrap.replicates
    same = aa_summary(run.probabilities_PDSNK, run.labels_N, run.patients_N, metric=metric, replicates=replicates)
    if same.example is None:
        return
    base = {"better": run.arm, "than": run.arm, "protocol": run.protocol, "metric": metric}
    found.rows.append(base | _measured(same.example) | {"test": SAME_AGAINST_SAME})
    found.same.append(SameAgainstSame(run.arm, run.protocol, metric, same.pairs, same.share_significant, same.threshold))
