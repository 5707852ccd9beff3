"""Calibration against plain loops, scikit-learn and simulations in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from medssl.calibration import (
    Reliability,
    apply_temperature,
    brier_score,
    change_prior,
    decision_curve,
    fit_temperature,
    reliability,
    reliability_counts,
)
from medssl.metrics import expected_calibration_error

RNG = np.random.default_rng(0)


def drawn(images: int, classes: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels that follow them exactly."""
    probabilities = np.exp(RNG.normal(0, spread, (images, classes)))
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = (RNG.random((images, 1)) > probabilities.cumsum(1)).sum(1).clip(max=classes - 1)
    return probabilities, labels


def test_expected_error_by_its_definition() -> None:
    probabilities, labels = drawn(700, 4)
    found = reliability(probabilities, labels, bins=10)
    error, images = 0.0, 0
    for low in range(10):
        inside = [n for n in range(700) if low / 10 < probabilities[n].max() <= (low + 1) / 10]
        if inside:
            right = sum(probabilities[n].argmax() == labels[n] for n in inside) / len(inside)
            error += abs(right - sum(probabilities[n].max() for n in inside) / len(inside)) * len(inside) / 700
            images += len(inside)
    assert found.expected_error == pytest.approx(error, abs=1e-12) and found.images_B.sum() == images == 700
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert reliability(sure, np.array([0, 1, 2, 1])).expected_error == pytest.approx(0.25)
    assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(error, abs=1e-12)
    with pytest.raises(ValueError, match="0 bins"):
        reliability(probabilities, labels, bins=0)


def test_counts_of_several_classifiers_add_up() -> None:
    first, second = drawn(300, 3), drawn(500, 3, spread=0.4)
    added = Reliability.of_counts(reliability_counts(*first) + reliability_counts(*second))
    together = reliability(np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]]))
    for name in ("confidence_B", "accuracy_B", "images_B"):
        np.testing.assert_allclose(getattr(added, name), getattr(together, name))


@pytest.mark.parametrize("classes", [2, 5])
def test_brier_score_equals_scikit_learns(classes: int) -> None:
    probabilities, labels = drawn(400, classes)
    distance = ((probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1).mean()
    assert brier_score(probabilities, labels) == pytest.approx(distance, abs=1e-12)
    if classes == 2:  # scikit-learn's for two classes counts the second alone
        assert brier_score(probabilities, labels) == pytest.approx(2 * brier_score_loss(labels, probabilities[:, 1]), abs=1e-12)
    assert brier_score(np.eye(3), np.array([0, 1, 2])) == 0 and brier_score(np.eye(3), np.array([1, 2, 0])) == 2
    with pytest.raises(ValueError, match="no image"):
        brier_score(np.ones((0, 2)), np.zeros(0, int))


def test_the_curve_equals_scikit_learns_for_two_classes() -> None:
    probabilities, labels = drawn(2000, 2)
    right = probabilities.argmax(1) == labels
    theirs_accuracy, theirs_confidence = calibration_curve(right, probabilities.max(1), n_bins=12)
    ours = reliability(probabilities, labels, bins=12)
    np.testing.assert_allclose(ours.accuracy_B, theirs_accuracy)
    np.testing.assert_allclose(ours.confidence_B, theirs_confidence)


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_the_temperature_that_was_put_in_is_found(true: float) -> None:
    honest, labels = drawn(20_000, 5)
    too_sure = apply_temperature(honest, 1 / true)
    found = fit_temperature(too_sure, labels)
    assert found == pytest.approx(true, rel=0.03)
    mended = apply_temperature(too_sure, found)
    np.testing.assert_array_equal(mended.argmax(1), too_sure.argmax(1))
    assert reliability(mended, labels).expected_error < 0.015
    losses = [log_loss(labels, apply_temperature(too_sure, t)) for t in (found * 0.97, found, found * 1.03)]
    assert losses[1] == min(losses)
    with pytest.raises(ValueError, match="temperature is 0"):
        apply_temperature(honest, 0)


def test_a_changed_prior_is_bayes_rule() -> None:
    """Two normal distributions: the posterior under either prior is known."""
    values = RNG.normal(0, 2, 500)
    density = np.stack([np.exp(-((values - m) ** 2) / 2) for m in (-1, 1)], 1)

    def posterior(prior: list[float]) -> np.ndarray:
        joint = density * prior
        return joint / joint.sum(1, keepdims=True)

    np.testing.assert_allclose(change_prior(posterior([0.5, 0.5]), np.array([10, 10]), np.array([9, 1])), posterior([0.9, 0.1]))
    same = posterior([0.3, 0.7])
    np.testing.assert_allclose(change_prior(same, np.array([3, 7]), np.array([0.3, 0.7])), same)
    np.testing.assert_allclose(change_prior(same, np.array([3, 7]), np.array([1, 0]))[:, 0], 1)
    votes = change_prior(np.array([[0.0, 1.0]]), np.array([1, 1]), np.array([1, 0]))
    np.testing.assert_allclose(votes, [[1, 0]])  # a vote of 0 does not outweigh that the other class does not occur
    with pytest.raises(ValueError, match="trained ones above 0"):
        change_prior(same, np.array([0, 1]), np.array([1, 1]))


def test_net_benefit_by_counting() -> None:
    probability, positive = RNG.random(300), RNG.random(300) < 0.3
    curve = decision_curve(probability, positive, np.array([0.05, 0.3, 0.8]))
    for number, threshold in enumerate((0.05, 0.3, 0.8)):
        hits = sum(p >= threshold and t for p, t in zip(probability, positive, strict=True))
        alarms = sum(p >= threshold and not t for p, t in zip(probability, positive, strict=True))
        assert curve.model_T[number] == pytest.approx((hits - alarms * threshold / (1 - threshold)) / 300)
        assert curve.all_T[number] == pytest.approx((positive.sum() - (~positive).sum() * threshold / (1 - threshold)) / 300)
    perfect = decision_curve(positive.astype(float), positive, np.linspace(0.01, 0.99, 9))
    np.testing.assert_allclose(perfect.model_T, positive.mean())
    with pytest.raises(ValueError, match="between 0 and 1"):
        decision_curve(probability, positive, np.array([0.0, 0.5]))
