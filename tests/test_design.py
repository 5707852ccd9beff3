"""What a design can show, against closed forms, scipy's own tests on simulated runs, and the nested bootstrap itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from medssl.statistics import (
    BootstrapResult,
    Scatter,
    nested,
    nested_bootstrap,
    nested_equivalence,
    smallest_detectable_difference,
    smallest_equivalence_margin,
)

NONE = {"pretraining_seed": 0.0, "label_draw": 0.0, "head_seed": 0.0, "patient": 0.0}


def scatter(**stds: float) -> Scatter:
    return Scatter(**(NONE | stds))


@pytest.mark.parametrize(("draws", "power", "level"), [(3, 0.8, 0.05), (10, 0.9, 0.01), (2, 0.5, 0.2)])
def test_draws_alone_give_the_paired_t_tests_power(draws: int, power: float, level: float) -> None:
    error, critical = 0.02 / math.sqrt(draws), stats.t.ppf(1 - level / 2, draws - 1)

    def missing(difference: float) -> float:
        shift = difference / error
        return float(stats.nct.sf(critical, draws - 1, shift) + stats.nct.cdf(-critical, draws - 1, shift) - power)

    expected = optimize.brentq(missing, 0, 10)
    ours = smallest_detectable_difference((1, 1), draws, (1, 1), 1, scatter=scatter(label_draw=0.02), power=power, level=level)
    assert ours == pytest.approx(expected, rel=0.02)


def test_many_patients_alone_give_the_normal_formula() -> None:
    alone = scatter(patient=0.6)
    ours = smallest_detectable_difference((1, 1), 1, (1, 1), 5000, scatter=alone)
    assert ours == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * 0.6 / math.sqrt(5000), rel=0.002)
    margin = smallest_equivalence_margin((1, 1), 1, (1, 1), 5000, scatter=alone)
    assert margin == pytest.approx((stats.norm.ppf(0.95) + stats.norm.ppf(0.9)) * 0.6 / math.sqrt(5000), rel=0.002)


@pytest.mark.parametrize("seeds", [(3, 3), (2, 6), (12, 4)])
def test_pretraining_seeds_alone_give_welchs_power(seeds: tuple[int, int]) -> None:
    """Satterthwaite's t of two kinds is Welch's test: scipy's on runs drawn at the smallest detectable difference."""
    difference = smallest_detectable_difference(seeds, 1, (1, 1), 1, scatter=scatter(pretraining_seed=0.01))
    rng = np.random.default_rng(0)
    first, second = (rng.normal(mean, 0.01, (20_000, n)) for mean, n in zip((difference, 0.0), seeds, strict=True))
    assert (stats.ttest_ind(first, second, axis=1, equal_var=False).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.012)


def test_the_estimates_are_the_bootstraps_own() -> None:
    """Scores drawn at the smallest detectable difference, judged by the bootstrap's variances and degrees of freedom.

    Heads scatter most here, and few of them stand behind each encoder and draw: what they leave in those means counts too.
    """
    stds = Scatter(pretraining_seed=0.01, label_draw=0.01, head_seed=0.05, patient=0.1)
    shapes = ((3, 3, 2), (4, 3, 3))
    difference = smallest_detectable_difference((3, 4), 3, (2, 3), 50, scatter=stds)
    rng, hits = np.random.default_rng(2), 0
    for _ in range(3000):
        arms = [
            mean + rng.normal(0, 0.01, (p, 1, 1)) + rng.normal(0, 0.01 / math.sqrt(2), (1, d, 1)) + rng.normal(0, 0.05, (p, d, s))
            for mean, (p, d, s) in zip((difference, 0.0), shapes, strict=True)
        ]
        people = rng.normal(0, 0.1, 50)
        parts, freedom = nested._variances(*arms, people / math.sqrt(50), 50)  # what resampled patients would give
        gap = arms[0].mean() - arms[1].mean() + people.mean()
        hits += 2 * stats.t.sf(abs(gap) / math.sqrt(sum(parts.values())), freedom) < 0.05
    assert hits / 3000 == pytest.approx(0.8, abs=0.025)


def simulated(rng: np.random.Generator, truth: float, design: dict[str, Any], stds: Scatter) -> BootstrapResult:
    """A study of two arms whose accuracies scatter as told; the patients' part is that of two independent coins."""
    draws, patients = design["label_draws"], design["patients"]
    arms = []
    for mean, p, s in zip((0.5 + truth / 2, 0.5 - truth / 2), design["pretraining_seeds"], design["head_seeds"], strict=True):
        share_PDS = mean + rng.normal(0, stds.pretraining_seed, (p, 1, 1)) + rng.normal(0, stds.head_seed, (p, draws, s))
        share_PDS = share_PDS + rng.normal(0, stds.label_draw / math.sqrt(2), (1, draws, 1))
        hits = (rng.random(patients) < share_PDS[..., None]).astype(np.float32)
        arms.append(np.stack([hits, 1 - hits], axis=-1))
    seed = int(rng.integers(2**31))
    labels = np.zeros(patients, int)
    return nested_bootstrap(*arms, labels, np.arange(patients), metric="accuracy", replicates=100, seed=seed)


def test_the_nested_bootstrap_has_the_power_that_was_asked_for() -> None:
    design: dict[str, Any] = {"pretraining_seeds": (3, 4), "label_draws": 3, "head_seeds": (2, 2), "patients": 250}
    stds = Scatter(pretraining_seed=0.03, label_draw=0.03, head_seed=0.01, patient=math.sqrt(0.5))
    difference = smallest_detectable_difference(**design, scatter=stds)
    margin = smallest_equivalence_margin(**design, scatter=stds)
    rng = np.random.default_rng(1)
    apart = [simulated(rng, difference, design, stds) for _ in range(300)]
    alike = [simulated(rng, 0.0, design, stds) for _ in range(300)]
    assert np.mean([s.p < 0.05 for s in apart]) == pytest.approx(0.8, abs=0.07)
    assert np.mean([nested_equivalence(s, margin).p < 0.05 for s in alike]) == pytest.approx(0.8, abs=0.07)
    assert np.mean([s.p < 0.05 for s in alike]) < 0.09


def test_more_of_anything_shows_smaller_differences() -> None:
    stds = Scatter(head_seed=0.05)
    few = smallest_detectable_difference((3, 3), 3, (2, 2), 500, scatter=stds)
    for more in (((6, 3), 3, (2, 2), 500), ((3, 3), 6, (2, 2), 500), ((3, 3), 3, (2, 9), 500), ((3, 3), 3, (2, 2), 2000)):
        assert smallest_detectable_difference(*more, scatter=stds) < 0.99 * few
    assert smallest_detectable_difference((3, 3), 3, (2, 2), 500, scatter=stds, power=0.9) > 1.01 * few
    assert smallest_detectable_difference((3, 3), 3, (2, 2), 500, scatter=stds, level=0.01) > 1.01 * few
    assert smallest_detectable_difference((3, 3), 3, (2, 2), 500, scatter=stds) == few


def test_a_single_encoder_or_draw_is_left_out() -> None:
    wild = Scatter(pretraining_seed=9.0, label_draw=9.0, head_seed=0.0, patient=0.6)
    alone = smallest_detectable_difference((1, 1), 1, (1, 1), 5000, scatter=scatter(patient=0.6))
    assert smallest_detectable_difference((1, 1), 1, (9, 9), 5000, scatter=wild) == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretraining_seeds": (3, 0)}, "each is 1 or more"),
        ({"power": 1.0}, "power is 1.0"),
        ({"power": 0.04}, "power is 0.04"),
        ({"level": 0.0}, "level is 0.0"),
        ({"scatter": scatter(head_seed=-0.1)}, "0 or more"),
        ({"pretraining_seeds": (1, 1), "label_draws": 1, "head_seeds": (1, 1), "patients": 1}, "nothing repeats"),
    ],
)
def test_designs_that_are_refused(changes: dict[str, Any], words: str) -> None:
    design = {"pretraining_seeds": (3, 3), "label_draws": 3, "head_seeds": (5, 5), "patients": 100} | changes
    for function in (smallest_detectable_difference, smallest_equivalence_margin):
        with pytest.raises(ValueError, match=words):
            function(**design)
