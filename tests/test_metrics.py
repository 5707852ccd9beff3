"""Scores against scikit-learn, on random cases with ties, missing classes and image weights."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from medssl import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")

CASES = range(60)


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Probabilities (N, K), labels (N,) and weights (N,) or None; odd cases have ties, some miss classes."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 8))
    images = int(rng.integers(8, 200))
    logits = rng.normal(size=(images, classes)) * 2
    if seed % 2:
        logits = np.round(logits)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = rng.integers(0, classes - (1 if seed % 5 == 0 and classes > 2 else 0), size=images)
    weights = None
    if seed % 3 == 1:
        weights = rng.integers(0, 4, size=images).astype(float)
        weights[0] = 1.0
    if seed % 3 == 2:
        weights = rng.random(images)
    return probabilities, labels, weights


@pytest.mark.parametrize("seed", CASES)
def test_scores_of_the_predicted_class_equal_scikit_learn(seed: int) -> None:
    probabilities, labels, weights = random_case(seed)
    kept = np.ones(len(labels), bool) if weights is None else weights > 0
    truth, predicted = labels[kept], probabilities.argmax(axis=1)[kept]
    sample_weight = None if weights is None else weights[kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes without images
        expected = {
            "accuracy": sklearn_metrics.accuracy_score(truth, predicted, sample_weight=sample_weight),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(truth, predicted, sample_weight=sample_weight),
            "f1_weighted": sklearn_metrics.f1_score(
                truth, predicted, average="weighted", sample_weight=sample_weight, zero_division=0
            ),
            "f1_macro": sklearn_metrics.f1_score(truth, predicted, average="macro", sample_weight=sample_weight, zero_division=0),
        }
    for name, value in expected.items():
        assert metrics.METRICS[name](probabilities, labels, weights) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("seed", CASES)
def test_auc_per_class_equals_scikit_learn(seed: int) -> None:
    probabilities, labels, weights = random_case(seed)
    areas = metrics.roc_auc_per_class(probabilities, labels, weights)
    kept = np.ones(len(labels), bool) if weights is None else weights > 0
    for k, area in enumerate(areas):
        if len(np.unique(labels[kept] == k)) < 2:
            assert np.isnan(area)
            continue
        expected = sklearn_metrics.roc_auc_score(labels == k, probabilities[:, k], sample_weight=weights)
        assert area == pytest.approx(expected, abs=1e-12)
    assert metrics.roc_auc_ovr(probabilities, labels, weights) == pytest.approx(np.nanmean(areas), abs=1e-12)


@pytest.mark.parametrize("seed", CASES)
def test_confusion_equals_scikit_learn(seed: int) -> None:
    probabilities, labels, weights = random_case(seed)
    expected = sklearn_metrics.confusion_matrix(
        labels, probabilities.argmax(axis=1), labels=range(probabilities.shape[1]), sample_weight=weights
    )
    np.testing.assert_allclose(metrics.confusion(probabilities, labels, weights), expected, atol=1e-12)


@pytest.mark.parametrize("name", sorted(metrics.SCORES))
def test_whole_weights_equal_repeated_images(name: str) -> None:
    probabilities, labels, _ = random_case(7)
    repeats = np.random.default_rng(1).integers(0, 4, size=len(labels))
    metric = metrics.SCORES[name]
    weighted = metric(probabilities, labels, repeats.astype(float))
    repeated = metric(np.repeat(probabilities, repeats, axis=0), np.repeat(labels, repeats), None)
    assert weighted == pytest.approx(repeated, abs=1e-12)


def test_missing_classes_are_left_out_and_not_counted_as_zero() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]])
    labels = np.array([0, 1, 1])
    assert metrics.balanced_accuracy(probabilities, labels) == pytest.approx(0.75)
    assert metrics.f1_macro(probabilities, labels) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert metrics.roc_auc_ovr(probabilities, labels) == pytest.approx(1.0)
    assert np.isnan(metrics.roc_auc_ovr(probabilities[:1], labels[:1]))


@pytest.mark.parametrize(
    ("probabilities", "labels", "weights", "message"),
    [
        (np.ones((3, 2)) / 2, np.zeros(2, int), None, "expected"),
        (np.ones((2, 2)) / 2, np.array([0, 2]), None, "0..1"),
        (np.array([[np.nan, 1.0]]), np.array([0]), None, "NaN"),
        (np.ones((2, 2)) / 2, np.array([0, 1]), np.array([1.0, -1.0]), "weights"),
        (np.ones((0, 2)), np.zeros(0, int), None, "no image"),
    ],
)
def test_unusable_input_is_refused(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.accuracy(probabilities, labels, weights)


@pytest.mark.parametrize("seed", CASES)
def test_average_precision_and_sensitivity_equal_scikit_learn(seed: int) -> None:
    probabilities, labels, weights = random_case(seed)
    precision = metrics.average_precision_per_class(probabilities, labels, weights)
    sensitivity = metrics.sensitivity_at_specificity(probabilities, labels, weights, specificity=0.8)
    kept = np.ones(len(labels), bool) if weights is None else weights > 0
    sample_weight = None if weights is None else weights[kept]
    for k in range(probabilities.shape[1]):
        truth, scores = labels[kept] == k, probabilities[kept, k]
        if not truth.any():
            assert np.isnan(precision[k]) and np.isnan(sensitivity[k])
            continue
        expected = sklearn_metrics.average_precision_score(truth, scores, sample_weight=sample_weight)
        assert precision[k] == pytest.approx(expected, abs=1e-9)
        if truth.all():
            assert np.isnan(sensitivity[k])
            continue
        fpr, tpr, _ = sklearn_metrics.roc_curve(truth, scores, sample_weight=sample_weight, drop_intermediate=False)
        assert sensitivity[k] == pytest.approx(tpr[fpr <= 0.2 + 1e-12].max(), abs=1e-9)
    present = [k for k in range(probabilities.shape[1]) if (labels[kept] == k).any()]
    each = [
        sklearn_metrics.average_precision_score(labels == k, probabilities[:, k], sample_weight=weights) for k in present
    ]
    assert metrics.average_precision(probabilities, labels, weights) == pytest.approx(np.mean(each), abs=1e-9)


@pytest.mark.parametrize("seed", CASES)
def test_class_scores_equal_scikit_learn(seed: int) -> None:
    probabilities, labels, weights = random_case(seed)
    found = metrics.class_scores(metrics.counts(probabilities, labels, weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
            labels, probabilities.argmax(axis=1),
            labels=range(probabilities.shape[1]), sample_weight=weights, zero_division=np.nan,
        )
    np.testing.assert_allclose(found.precision, precision, atol=1e-9)
    np.testing.assert_allclose(found.recall, recall, atol=1e-9)
    defined = ~np.isnan(f1)
    np.testing.assert_allclose(found.f1[defined], f1[defined], atol=1e-9)
    ones = np.ones(len(labels)) if weights is None else weights
    np.testing.assert_allclose(found.support, np.bincount(labels, ones, probabilities.shape[1]))


def test_patients_are_scored_by_the_mean_of_their_images() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3], [0.1, 0.9]])
    means, labels = metrics.per_patient(probabilities, np.array([0, 1, 0, 1, 1]), ["a", None, "a", None, "b"])
    np.testing.assert_allclose(means, [[0.65, 0.35], [0.2, 0.8], [0.7, 0.3], [0.1, 0.9]])
    assert labels.tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="patient 'a' has images of two classes"):
        metrics.per_patient(probabilities, np.array([0, 1, 1, 1, 1]), ["a", None, "a", None, "b"])
    with pytest.raises(ValueError, match="specificity is 2"):
        metrics.sensitivity_at_specificity(probabilities, np.array([0, 1, 0, 1, 1]), specificity=2)


@pytest.mark.parametrize("seed", CASES)
def test_calibration_error_by_its_definition(seed: int) -> None:
    probabilities, labels, weights = random_case(seed)
    counted = np.ones(len(labels)) if weights is None else weights
    error = 0.0
    for low in range(15):
        inside = [n for n in range(len(labels)) if low / 15 < probabilities[n].max() <= (low + 1) / 15]
        share = sum(counted[n] for n in inside)
        if share:
            right = sum(counted[n] for n in inside if probabilities[n].argmax() == labels[n]) / share
            error += abs(right - sum(counted[n] * probabilities[n].max() for n in inside) / share) * share / counted.sum()
    assert metrics.expected_calibration_error(probabilities, labels, weights) == pytest.approx(error, abs=1e-9)
    with pytest.raises(ValueError, match="0 bins"):
        metrics.expected_calibration_error(probabilities, labels, weights, bins=0)
