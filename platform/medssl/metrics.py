"""Classification scores: arrays -> numbers, with optional image weights everywhere (the bootstrap resamples with them).

Labels are of one of two kinds, and every score takes either. One class an image: labels (N,), the class's position; the
probabilities (N, K) of a row sum to 1, and a prediction is the most probable class, the first of equals. Several findings an
image: labels (N, F), 1 where an image has a finding, 0 where it has not, UNKNOWN where nobody knows; each probability stands
for itself, and a finding is named where it is above one half. What is not known counts in no score, and a score of findings is
the mean over the findings, as scikit-learn's macro average of multi-label scores where all is known.

Shapes: N images, K classes or F findings, ... any leading axes (models, replicates). Image weights count an image as often as
its weight; an image of weight 0 might as well not be there.

Everything that depends on the prediction alone is written once, in terms of counts per class or finding (`Counts`), so that
`medssl.statistics` can score thousands of resamples from one matrix product with the same definitions as here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating]
Int = NDArray[np.integer]
Metric = Callable[[Float, Int, Float | None], float]

UNKNOWN = -1
"""Label of a finding that is not known of an image."""


@dataclass(frozen=True)
class Counts:
    """Weighted number of images per class or finding, each (..., K); leading axes broadcast against each other."""

    hits: Float
    """Of class k and predicted as k."""
    predicted: Float
    """Predicted as k."""
    support: Float
    """Of class k."""
    known: Float | None = None
    """Of findings: images of which the finding is known, and of which alone the others are. None for classes."""

    @property
    def rejected(self) -> tuple[Float, Float]:
        """Of findings: images without the finding, and those of them of which it is not predicted."""
        assert self.known is not None
        absent = self.known - self.support
        return absent, absent - self.predicted + self.hits


def confusion(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> Float:
    """Confusion matrix (K, K) of weighted counts: row = label, column = prediction. Of classes only."""
    classes = _check(probabilities_NK, labels_N, weights_N)
    if labels_N.ndim == 2:
        raise ValueError("several findings an image have no confusion matrix: their counts say the same")
    matrix = np.zeros((classes, classes))
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N
    np.add.at(matrix, (labels_N, probabilities_NK.argmax(axis=1)), weights)
    return matrix


def counts(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> Counts:
    """The counts per class or finding (K,) of one set of predictions."""
    if labels_N.ndim == 2:
        return _finding_counts(probabilities_NK, labels_N, weights_N)
    matrix = confusion(probabilities_NK, labels_N, weights_N)
    return Counts(np.diagonal(matrix).copy(), matrix.sum(axis=0), matrix.sum(axis=1))


def accuracy_of(counts: Counts) -> Float:
    """Share of images predicted rightly, (...,); NaN where nothing has weight."""
    if counts.known is not None:
        shares = _divide(counts.hits + counts.rejected[1], counts.known, empty=0.0)
        return _mean_over(shares, counts.known > 0)
    return _divide(counts.hits.sum(axis=-1), counts.support.sum(axis=-1), empty=np.nan)


def balanced_accuracy_of(counts: Counts) -> Float:
    """Mean recall over the classes that have images, (...,); NaN where none has.

    Of findings: of the images with the finding and of those without (sensitivity and specificity), mean over the findings.
    """
    if counts.known is not None:
        absent, rejected = counts.rejected
        recalls = _divide(counts.hits, counts.support, empty=0.0) + _divide(rejected, absent, empty=0.0)
        mean = _divide(recalls, (counts.support > 0).astype(float) + (absent > 0), empty=0.0)
        return _mean_over(mean, counts.known > 0)
    recall = _divide(counts.hits, counts.support, empty=0.0)
    return _mean_over(recall, counts.support > 0)


def f1_weighted_of(counts: Counts) -> Float:
    """F1 per class averaged by the classes' support, (...,); a class never hit counts 0; NaN where nothing has weight."""
    return _divide((_f1(counts) * counts.support).sum(axis=-1), counts.support.sum(axis=-1), empty=np.nan)


def f1_macro_of(counts: Counts) -> Float:
    """F1 per class averaged over the classes that have images or are predicted, (...,); NaN where there is none."""
    return _mean_over(_f1(counts), (counts.support > 0) | (counts.predicted > 0))


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
    """Area under the ROC curve of each class against the rest, or of each finding, (K,); NaN without images on one side.

    The area is the weighted share of (positive, negative) pairs in which the positive has the higher probability; ties
    count one half.
    """
    return np.array([_roc_auc(*column) for column in _columns(probabilities_NK, labels_N, weights_N)])


def roc_auc_ovr(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> float:
    """One-vs-rest AUC, mean over the classes that have images on both sides; NaN when no class has."""
    return _mean_of_known(roc_auc_per_class(probabilities_NK, labels_N, weights_N))


def average_precision_per_class(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> Float:
    """Average precision of each class against the rest, (K,): precision at each probability, weighted by the recall gained
    there, without interpolation (scikit-learn's). NaN for a class without images.
    """
    areas = []
    for column in _columns(probabilities_NK, labels_N, weights_N):
        positive, negative = _descending(*column)
        precision = _divide(positive, positive + negative, empty=1.0)
        gained = np.diff(positive, prepend=0.0)
        areas.append(float((precision * gained).sum() / positive[-1]) if positive[-1] > 0 else float("nan"))
    return np.array(areas)


def average_precision(probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None) -> float:
    """Average precision against the rest, mean over the classes that have images (macro); NaN when no class has."""
    return _mean_of_known(average_precision_per_class(probabilities_NK, labels_N, weights_N))


def sensitivity_at_specificity(
    probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None, *, specificity: float = 0.95
) -> Float:
    """The largest sensitivity that each class reaches against the rest at this specificity or more, (K,).

    A threshold is a probability that occurs; between two of them nothing is interpolated. NaN for a class without images on
    one side. ValueError for a specificity outside 0 to 1.
    """
    if not 0 <= specificity <= 1:
        raise ValueError(f"specificity is {specificity}: it lies between 0 and 1")
    found = []
    for column in _columns(probabilities_NK, labels_N, weights_N):
        positive, negative = (np.concatenate([[0.0], c]) for c in _descending(*column))
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

    Of findings the same for every finding that is known of an image, (known ones,): the probability of what was predicted, that
    it is there or that it is not. Bins are of equal width between 0 and 1, open below, as in Guo et al. 2017.
    """
    if labels_N.ndim == 2:
        probabilities_NK, labels_N = known_pairs(probabilities_NK, labels_N)
    confidence_N = probabilities_NK.max(axis=1).astype(np.float64)
    right_N = np.asarray(probabilities_NK.argmax(axis=1) == labels_N)
    return confidence_N, right_N, np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)


def expected_calibration_error(
    probabilities_NK: Float, labels_N: Int, weights_N: Float | None = None, *, bins: int = 15
) -> float:
    """Expected calibration error (Guo et al. 2017), lower is better: the mean over images of |accuracy - mean confidence| of
    their bin of confidence; of findings over all that are known, together. ValueError for fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins: one or more are needed")
    _check(probabilities_NK, labels_N, weights_N)
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N.astype(np.float64)
    if labels_N.ndim == 2:
        weights = np.broadcast_to(weights[:, None], labels_N.shape)[labels_N != UNKNOWN]
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


def known_pairs(probabilities_NF: Float, labels_NF: Int) -> tuple[Float, Int]:
    """Every finding that is known of an image as a question of two classes: probabilities (of not, of being there) (E, 2), and
    labels 0 or 1 (E,), in the order of images, then findings."""
    known_NF = labels_NF != UNKNOWN
    there_E = probabilities_NF[known_NF]
    return np.stack([1 - there_E, there_E], axis=1), labels_NF[known_NF]


def per_patient(
    probabilities_NK: Float, labels_N: Int, patients_N: Sequence[object]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean probabilities and the label of each patient (or bag), in order of appearance; None is a patient of its own.

    A finding is known of a patient where it is of one image.

    Raises:
        ValueError: the images of a patient have different labels.
    """
    _check(probabilities_NK, labels_N, None)
    numbers: dict[object, int] = {}
    group_N = np.array([numbers.setdefault(n if p is None else (p,), len(numbers)) for n, p in enumerate(patients_N)])
    images_G = np.bincount(group_N)
    sums_GK = np.zeros((len(images_G), probabilities_NK.shape[1]))
    np.add.at(sums_GK, group_N, probabilities_NK)
    torn = np.flatnonzero(torn_groups(group_N, labels_N)[group_N])
    if len(torn):
        raise ValueError(f"patient {patients_N[int(torn[0])]!r} has images of two classes: score images, or another grouping")
    label_G = np.full((len(images_G), *labels_N.shape[1:]), UNKNOWN, np.int64)
    np.maximum.at(label_G, group_N, labels_N)
    return sums_GK / images_G[:, None], label_G


def torn_groups(group_N: Int, labels_N: Int) -> NDArray[np.bool_]:
    """Which groups (G,) have images of different labels; of findings, where one that is known of two images differs."""
    groups = int(group_N.max(initial=-1)) + 1
    least_G = np.full((groups, *labels_N.shape[1:]), np.iinfo(np.int64).max)
    most_G = np.full_like(least_G, UNKNOWN)
    np.minimum.at(least_G, group_N, np.where(labels_N == UNKNOWN, np.iinfo(np.int64).max, labels_N))
    np.maximum.at(most_G, group_N, labels_N)
    return np.asarray((least_G < most_G).reshape(groups, -1).any(axis=1), bool)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1_weighted": f1_weighted,
    "f1_macro": f1_macro,
    "auc": roc_auc_ovr,
}
"""Name -> function(probabilities_NK, labels_N, weights_N=None) -> score; higher is better for all, and the nested bootstrap
resamples each of them. Labels of findings are (N, F)."""

SCORES: dict[str, Metric] = {
    **METRICS,
    "average_precision": average_precision,
    "expected_calibration_error": expected_calibration_error,
}
"""All that a study can list in `metrics`."""

LOWER_IS_BETTER = frozenset({"expected_calibration_error"})
"""Names in `SCORES` for which a better classifier has a lower value."""


def _finding_counts(probabilities_NF: Float, labels_NF: Int, weights_N: Float | None) -> Counts:
    _check(probabilities_NF, labels_NF, weights_N)
    weights_N1 = np.ones((len(labels_NF), 1)) if weights_N is None else weights_N[:, None]
    known_NF = (labels_NF != UNKNOWN) * weights_N1
    named_NF, there_NF = probabilities_NF > 0.5, labels_NF == 1
    hits, named, there = ((part * known_NF).sum(axis=0) for part in (named_NF & there_NF, named_NF, there_NF))
    return Counts(hits, named, there, known_NF.sum(axis=0))


def _columns(
    probabilities_NK: Float, labels_N: Int, weights_N: Float | None
) -> Iterator[tuple[Float, NDArray[np.bool_], Float]]:
    """Of each class against the rest, or of each finding: probability, which images have it, and image weights, all (N,)."""
    columns = _check(probabilities_NK, labels_N, weights_N)
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N.astype(np.float64)
    for k in range(columns):
        if labels_N.ndim == 2:
            yield probabilities_NK[:, k], labels_N[:, k] == 1, weights * (labels_N[:, k] != UNKNOWN)
        else:
            yield probabilities_NK[:, k], labels_N == k, weights


def _mean_over(values: Float, there: NDArray[np.bool_]) -> Float:
    """Mean over the last axis of the values that are there; NaN where none is."""
    return _divide((values * there).sum(axis=-1), there.sum(axis=-1), empty=np.nan)


def _mean_of_known(values_K: Float) -> float:
    known = ~np.isnan(values_K)
    return float(values_K[known].mean()) if known.any() else float("nan")


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
    """Number of classes or findings; ValueError when shapes, labels or weights do not fit."""
    expected = probabilities_NK.shape[: labels_N.ndim]
    if probabilities_NK.ndim != 2 or labels_N.ndim not in (1, 2) or labels_N.shape != expected:
        shapes = f"probabilities {probabilities_NK.shape} and labels {labels_N.shape}"
        raise ValueError(f"{shapes}: expected (N, K) and (N,) for classes, or (N, F) both for findings")
    images, classes = probabilities_NK.shape
    if images == 0:
        raise ValueError("there is no image to score")
    least, most = (UNKNOWN, 1) if labels_N.ndim == 2 else (0, classes - 1)
    if labels_N.min() < least or labels_N.max() > most:
        raise ValueError(f"labels lie in {labels_N.min()}..{labels_N.max()}: expected {least}..{most}")
    if not np.isfinite(probabilities_NK).all():
        raise ValueError("probabilities hold NaN or infinite values")
    if weights_N is not None and (weights_N.shape != labels_N.shape[:1] or weights_N.min() < 0):
        raise ValueError(f"image weights {weights_N.shape}: expected {labels_N.shape[:1]}, none negative")
    return int(classes)
