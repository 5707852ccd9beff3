"""Classification scores: arrays -> numbers, with optional image weights everywhere (the bootstrap resamples with them).

Shapes: N images, K classes, ... any leading axes (models, replicates). A prediction is the most probable class, the
first of equals. Image weights count an image as often as its weight; an image of weight 0 might as well not be there.

Everything that depends on the predicted class alone is written once, in terms of three counts per class (`Counts`), so
that `medssl.statistics` can score thousands of resamples from one matrix product with the same definitions as here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating]
Int = NDArray[np.integer]
Metric = Callable[[Float, Int, Float | None], float]


@dataclass(frozen=True)
class Counts:
    """Weighted number of images per class, each (..., K); leading axes broadcast against each other."""

    hits: Float
    """Of class k and predicted as k."""
    predicted: Float
    """Predicted as k."""
    support: Float
    """Of class k."""


def confusion(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> Float:
    """Confusion matrix (K, K) of weighted counts: row = label, column = prediction."""
    classes = _check(probabilities_NK, labels_N, weights_N)
    matrix = np.zeros((classes, classes))
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N
    np.add.at(matrix, (labels_N, probabilities_NK.argmax(axis=1)), weights)
    return matrix


def counts(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> Counts:
    """The counts per class (K,) of one set of predictions."""
    matrix = confusion(probabilities_NK, labels_N, weights_N)
    return Counts(np.diagonal(matrix).copy(), matrix.sum(axis=0), matrix.sum(axis=1))


def accuracy_of(counts: Counts) -> Float:
    """Share of images predicted rightly, (...,); NaN where nothing has weight."""
    return _divide(counts.hits.sum(axis=-1), counts.support.sum(axis=-1), empty=np.nan)


def balanced_accuracy_of(counts: Counts) -> Float:
    """Mean recall over the classes that have images, (...,); NaN where none has."""
    recall = _divide(counts.hits, counts.support, empty=0.0)
    present = counts.support > 0
    return _divide((recall * present).sum(axis=-1), present.sum(axis=-1), empty=np.nan)


def f1_weighted_of(counts: Counts) -> Float:
    """F1 per class averaged by the classes' support, (...,); a class never hit counts 0; NaN where nothing has weight."""
    return _divide((_f1(counts) * counts.support).sum(axis=-1), counts.support.sum(axis=-1), empty=np.nan)


def f1_macro_of(counts: Counts) -> Float:
    """F1 per class averaged over the classes that have images or are predicted, (...,); NaN where there is none."""
    present = (counts.support > 0) | (counts.predicted > 0)
    return _divide((_f1(counts) * present).sum(axis=-1), present.sum(axis=-1), empty=np.nan)


COUNT_METRICS: dict[str, Callable[[Counts], Float]] = {
    "accuracy": accuracy_of,
    "balanced_accuracy": balanced_accuracy_of,
    "f1_weighted": f1_weighted_of,
    "f1_macro": f1_macro_of,
}
"""Scores that need the predicted class only."""


def accuracy(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> float:
    """Share of images predicted rightly."""
    return float(accuracy_of(counts(probabilities_NK, labels_N, weights_N)))


def balanced_accuracy(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> float:
    """Mean recall over the classes that have images."""
    return float(balanced_accuracy_of(counts(probabilities_NK, labels_N, weights_N)))


def f1_weighted(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> float:
    """F1 per class averaged by support (the papers' F1)."""
    return float(f1_weighted_of(counts(probabilities_NK, labels_N, weights_N)))


def f1_macro(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> float:
    """F1 per class, unweighted mean."""
    return float(f1_macro_of(counts(probabilities_NK, labels_N, weights_N)))


def roc_auc_per_class(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> Float:
    """Area under the ROC curve of each class against the rest, (K,); NaN for a class without images on one side.

    The area is the weighted share of (positive, negative) pairs in which the positive has the higher probability; ties
    count one half.
    """
    classes = _check(probabilities_NK, labels_N, weights_N)
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N.astype(np.float64)
    return np.array([_roc_auc(probabilities_NK[:, k], labels_N == k, weights) for k in range(classes)])


def roc_auc_ovr(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> float:
    """One-vs-rest AUC, mean over the classes that have images on both sides; NaN when no class has."""
    areas_K = roc_auc_per_class(probabilities_NK, labels_N, weights_N)
    known = ~np.isnan(areas_K)
    return float(areas_K[known].mean()) if known.any() else float("nan")


def average_precision_per_class(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> Float:
    """Average precision of each class against the rest, (K,): precision at each probability, weighted by the recall gained
    there, without interpolation (scikit-learn's). NaN for a class without images.
    """
    classes = _check(probabilities_NK, labels_N, weights_N)
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N.astype(np.float64)
    areas = []
    for k in range(classes):
        positive, negative = _descending(probabilities_NK[:, k], labels_N == k, weights)
        precision = _divide(positive, positive + negative, empty=1.0)
        gained = np.diff(positive, prepend=0.0)
        areas.append(float((precision * gained).sum() / positive[-1]) if positive[-1] > 0 else float("nan"))
    return np.array(areas)


def average_precision(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> float:
    """Average precision against the rest, mean over the classes that have images (macro); NaN when no class has."""
    areas_K = average_precision_per_class(probabilities_NK, labels_N, weights_N)
    known = ~np.isnan(areas_K)
    return float(areas_K[known].mean()) if known.any() else float("nan")


def sensitivity_at_specificity(
    probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None, *, specificity: float = 0.95
) -> Float:
    """The largest sensitivity that each class reaches against the rest at this specificity or more, (K,).

    A threshold is a probability that occurs; between two of them nothing is interpolated. NaN for a class without images on
    one side. ValueError for a specificity outside 0 to 1.
    """
    if not 0 <= specificity <= 1:
        raise ValueError(f"specificity is {specificity}: it lies between 0 and 1")
    classes = _check(probabilities_NK, labels_N, weights_N)
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N.astype(np.float64)
    found = []
    for k in range(classes):
        positive, negative = (np.concatenate([[0.0], c]) for c in _descending(probabilities_NK[:, k], labels_N == k, weights))
        if positive[-1] == 0 or negative[-1] == 0:
            found.append(float("nan"))
            continue
        allowed = 1 - negative / negative[-1] >= specificity - 1e-12  # of a specificity that is met exactly
        found.append(float(positive[allowed].max() / positive[-1]))
    return np.array(found)


def confidence_bins(
    probabilities_NK: Float, labels_N: Int, bins: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Probability of the predicted class, whether it is the right one, and the bin of that probability, all (N,).

    Bins are of equal width between 0 and 1, open below, as in Guo et al. 2017.
    """
    confidence_N = probabilities_NK.max(axis=1).astype(np.float64)
    right_N = probabilities_NK.argmax(axis=1) == labels_N
    return confidence_N, right_N, np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)


def expected_calibration_error(
    probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None, *, bins: int = 15
) -> float:
    """Expected calibration error (Guo et al. 2017), lower is better: the mean over images of |accuracy - mean confidence| of
    their bin of confidence. ValueError for fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins: one or more are needed")
    _check(probabilities_NK, labels_N, weights_N)
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N.astype(np.float64)
    confidence_N, right_N, bin_N = confidence_bins(probabilities_NK, labels_N, bins)
    gaps_B = np.bincount(bin_N, weights * (right_N - confidence_N), bins)
    return float(_divide(np.abs(gaps_B).sum(), weights.sum(), empty=np.nan))


@dataclass(frozen=True)
class ClassScores:
    """Scores of each class, all (K,); NaN where they are not defined."""

    precision: Float
    recall: Float
    f1: Float
    support: Float


def class_scores(counts: Counts) -> ClassScores:
    """Precision (NaN for a class that was never predicted), recall (NaN for one without images), F1 (0 for both), support."""
    return ClassScores(
        _divide(counts.hits, counts.predicted, empty=np.nan),
        _divide(counts.hits, counts.support, empty=np.nan),
        _f1(counts),
        np.asarray(counts.support, np.float64),
    )


def per_patient(
    probabilities_NK: Float, labels_N: Int, patients_N: Sequence[object]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean probabilities and the label of each patient (or bag), in order of appearance; None is a patient of its own.

    Raises:
        ValueError: the images of a patient have different labels.
    """
    _check(probabilities_NK, labels_N, None)
    numbers: dict[object, int] = {}
    group_N = np.array([numbers.setdefault(n if p is None else (p,), len(numbers)) for n, p in enumerate(patients_N)])
    images_G = np.bincount(group_N)
    sums_GK = np.zeros((len(images_G), probabilities_NK.shape[1]))
    np.add.at(sums_GK, group_N, probabilities_NK)
    label_G = np.full(len(images_G), -1, np.int64)
    label_G[group_N] = labels_N
    torn = np.flatnonzero(label_G[group_N] != labels_N)
    if len(torn):
        raise ValueError(f"patient {patients_N[int(torn[0])]!r} has images of two classes: score images, or another grouping")
    return sums_GK / images_G[:, None], label_G


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1_weighted": f1_weighted,
    "f1_macro": f1_macro,
    "auc": roc_auc_ovr,
}
"""Name -> function(probabilities_NK, labels_N, weights_N=None) -> score; higher is better for all, and the nested bootstrap
resamples each of them."""

SCORES: dict[str, Metric] = {
    **METRICS,
    "average_precision": average_precision,
    "expected_calibration_error": expected_calibration_error,
}
"""All that a study can list in `metrics`."""

LOWER_IS_BETTER = frozenset({"expected_calibration_error"})
"""Names in `SCORES` for which a better classifier has a lower value."""


def _f1(counts: Counts) -> Float:
    """2 hits / (support + predicted) per class, 0 where there is neither."""
    return _divide(2 * counts.hits, counts.support + counts.predicted, empty=0.0)


def _roc_auc(scores_N: Float, positive_N: NDArray[np.bool_], weights_N: Float) -> float:
    """Weighted AUC of one score; NaN where one side has no weight.

    In the order of the scores, a group of tied images wins its positive weight times (the negative weight before it +
    half of its own).
    """
    order = np.argsort(scores_N, kind="stable")
    ordered_N = scores_N[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered_N[1:] != ordered_N[:-1]]))
    positive = np.add.reduceat(weights_N[order] * positive_N[order], starts)
    negative = np.add.reduceat(weights_N[order] * ~positive_N[order], starts)
    pairs = positive.sum() * negative.sum()
    won = (positive * (np.cumsum(negative) - negative / 2)).sum()
    return float(won / pairs) if pairs > 0 else float("nan")


def _descending(scores_N: Float, positive_N: NDArray[np.bool_], weights_N: Float) -> tuple[Float, Float]:
    """Weight of positives and of negatives at or above each score that occurs, from the largest score down."""
    order = np.argsort(-scores_N, kind="stable")
    ordered_N = scores_N[order]
    ends = np.flatnonzero(np.concatenate([ordered_N[1:] != ordered_N[:-1], [True]]))
    return np.cumsum(weights_N[order] * positive_N[order])[ends], np.cumsum(weights_N[order] * ~positive_N[order])[ends]


def _divide(numerator: Float, denominator: Float, *, empty: float) -> Float:
    """numerator / denominator in float64, and `empty` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    out: Float = np.full(denominator.shape, empty)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def _check(probabilities_NK: Float, labels_N: Int, weights_N: Float | None) -> int:
    """Number of classes; ValueError when shapes, labels or weights do not fit."""
    if probabilities_NK.ndim != 2 or labels_N.shape != probabilities_NK.shape[:1]:
        shapes = f"probabilities {probabilities_NK.shape} and labels {labels_N.shape}"
        raise ValueError(f"{shapes}: expected (N, K) and (N,)")
    images, classes = probabilities_NK.shape
    if images == 0:
        raise ValueError("there is no image to score")
    if labels_N.min() < 0 or labels_N.max() >= classes:
        raise ValueError(f"labels lie in {labels_N.min()}..{labels_N.max()}: expected 0..{classes - 1}")
    if not np.isfinite(probabilities_NK).all():
        raise ValueError("probabilities hold NaN or infinite values")
    if weights_N is not None and (weights_N.shape != labels_N.shape or weights_N.min() < 0):
        raise ValueError(f"image weights {weights_N.shape}: expected {labels_N.shape}, none negative")
    return int(classes)
