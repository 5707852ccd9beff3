"""How much each kind of repeat moves a score, and an arm against itself.

Shapes: P pretraining seeds, D label draws, S head seeds, N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from medssl.metrics import Float, Int
from medssl.statistics.nested import BootstrapResult, nested_bootstrap, run_scores
from medssl.statistics.samples import WelchResult, welch


@dataclass(frozen=True)
class KindOfRepeat:
    """How much one kind of repeat moves the score."""

    n: int
    std: float
    """Standard deviation (n - 1) of the means over this kind; within the cells for head seeds. NaN for n = 1."""
    component: float
    """The same without what the other kinds leave in those means (analysis of variance, at least 0). NaN for n = 1."""


@dataclass(frozen=True)
class RepeatSummary:
    """Mean of a score over all runs of an arm, and its spread over each kind of repeat."""

    mean: float
    std: float
    """Standard deviation (n - 1) over all runs taken together."""
    pretraining_seed: KindOfRepeat
    label_draw: KindOfRepeat
    head_seed: KindOfRepeat


@dataclass(frozen=True)
class AASummary:
    """An arm against itself: how often the test over head seeds finds a difference where there is none."""

    metric: str
    pairs: int
    """Pairs of pretraining seeds, within each label draw."""
    share_significant: float
    """Share of them with p < `threshold` in Welch's test over head seeds. NaN without a pair."""
    threshold: float
    example_seeds: tuple[int, int] | None
    """Positions of the pretraining seeds of the first pair; None without one."""
    example: WelchResult | None
    nested: BootstrapResult | None
    """The arm's first half of pretraining seeds against its second half, by the nested bootstrap."""


def summarise(scores_PDS: Float) -> RepeatSummary:
    """Mean and spread of one arm's scores over each kind of repeat.

    The components come from the analysis of variance of y = mean + seed + draw + (seed x draw) + head: the mean square
    of a kind less that of the level below it, over the number of runs behind each mean.
    """
    p, d, s = scores_PDS.shape
    cells_PD = scores_PDS.mean(axis=2)
    seeds_P, draws_D, mean = cells_PD.mean(axis=1), cells_PD.mean(axis=0), float(scores_PDS.mean())
    head = float(scores_PDS.var(axis=2, ddof=1).mean()) if s > 1 else float("nan")
    crossed_PD = cells_PD - seeds_P[:, None] - draws_D[None, :] + mean
    if p > 1 and d > 1:
        below = float((crossed_PD**2).sum() / ((p - 1) * (d - 1)))
    else:  # the interaction cannot be told from the level itself: only head seeds are taken off
        below = 0.0 if np.isnan(head) else head / s
    return RepeatSummary(
        mean=mean,
        std=_std(scores_PDS.ravel()),
        pretraining_seed=KindOfRepeat(p, _std(seeds_P), _component(seeds_P, below / d)),
        label_draw=KindOfRepeat(d, _std(draws_D), _component(draws_D, below / p)),
        head_seed=KindOfRepeat(s, float(np.sqrt(head)), float(np.sqrt(head))),
    )


def aa_summary(
    probabilities_PDSNK: Float,
    labels_N: Int,
    patients_N: Sequence[object] | NDArray[np.generic],
    *,
    metric: str = "balanced_accuracy",
    threshold: float = 0.01,
    replicates: int = 2000,
    seed: int = 0,
) -> AASummary:
    """An arm against itself: Welch over head seeds for each pair of pretraining seeds, and the nested bootstrap of
    halves.
    """
    scores_PDS = run_scores(probabilities_PDSNK, labels_N, metric)
    p, d, s = scores_PDS.shape
    tests = [((i, j), welch(scores_PDS[i, k], scores_PDS[j, k])) for i, j in combinations(range(p), 2) for k in range(d) if s > 1]
    nested = None
    if p > 1:
        halves = probabilities_PDSNK[: p // 2], probabilities_PDSNK[p // 2 :]
        nested = nested_bootstrap(*halves, labels_N, patients_N, metric=metric, replicates=replicates, seed=seed)
    return AASummary(
        metric=metric,
        pairs=len(tests),
        share_significant=float(np.mean([test.p < threshold for _, test in tests])) if tests else float("nan"),
        threshold=threshold,
        example_seeds=tests[0][0] if tests else None,
        example=tests[0][1] if tests else None,
        nested=nested,
    )


def _std(values: Float) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _component(means: Float, below: float) -> float:
    """Standard deviation of a kind's own effect: the variance of its means less what the level below leaves in them."""
    return float(np.sqrt(max(float(means.var(ddof=1)) - below, 0.0))) if len(means) > 1 else float("nan")
