"""How much an image moves a score: against finite differences of the score itself, and against the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.influence import SLOPES, mean_influence
from medssl.metrics import LOWER_IS_BETTER, SCORES


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, K) and labels (N,); every third case has ties, every fourth a class without images."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 6))
    logits = rng.normal(size=(60, classes)) * 1.5
    logits = np.round(logits) if seed % 3 == 0 else logits
    labels = rng.integers(0, classes - (1 if seed % 4 == 0 and classes > 2 else 0), size=60)
    logits[np.arange(60), labels] += 1
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), labels


def test_every_score_but_the_calibration_error_has_its_derivative() -> None:
    assert set(SLOPES) == set(SCORES) - LOWER_IS_BETTER
    with pytest.raises(ValueError, match="metric 'acc' of 1 models: choose from accuracy"):
        mean_influence(np.ones((1, 2, 2)) / 2, np.array([0, 1]), "acc")


@pytest.mark.parametrize("metric", sorted(SLOPES))
@pytest.mark.parametrize("seed", range(12))
def test_derivative_equals_finite_differences(metric: str, seed: int) -> None:
    probabilities, labels = case(seed)
    slopes, step = SLOPES[metric](probabilities, labels), 1e-5
    assert slopes.sum() == pytest.approx(0, abs=1e-12)  # all images twice give the same score
    for n in range(0, 60, 7):
        ends = []
        for sign in (1, -1):
            weights = np.ones(60)
            weights[n] += sign * step
            ends.append(SCORES[metric](probabilities, labels, weights))
        assert slopes[n] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8), n


@pytest.mark.parametrize("metric", sorted(SLOPES))
def test_spread_over_patients_is_the_bootstraps(metric: str) -> None:
    """Three runs, 150 patients of one to four images that fare alike: resampled by copying, scored by the plain functions."""
    rng = np.random.default_rng(3)
    patient = np.repeat(np.arange(150), rng.integers(1, 5, 150))
    labels = rng.integers(0, 3, 150)[patient]
    logits = rng.normal(0, 1, (3, len(labels), 3)) + rng.normal(0, 1, (150, 3))[patient]
    logits[:, np.arange(len(labels)), labels] += 1.5
    runs = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    score, slopes = mean_influence(runs, labels, metric)
    assert score == pytest.approx(np.mean([SCORES[metric](run, labels, None) for run in runs]), abs=1e-12)
    ours = np.sqrt((np.bincount(patient, slopes) ** 2).sum() * 150 / 149)
    found = []
    for _ in range(400):
        weights = np.bincount(rng.integers(0, 150, 149), minlength=150)[patient].astype(float)
        found.append(np.mean([SCORES[metric](run, labels, weights) for run in runs]))
    assert ours == pytest.approx(np.std(found, ddof=1), rel=0.12)  # 400 replicates know it to 3.5%
