"""How much each image moves a score: the derivative of the score by the image's weight, at weight 1 for all.

The error of a score over patients follows from it without resampling. Hampel (1974) calls the derivative the influence curve;
summing it over a patient's images and taking the spread over patients is Jaeckel's (1972) infinitesimal jackknife, which is
what the bootstrap over patients tends to with ever more replicates where the score is smooth (Efron 1982, chapter 6). The
mean of a score over runs has the mean of their influences, so that 315 runs cost no more than their sorting.

Labels are of classes (N,) or of findings (N, F), as in `medssl.metrics`. Shapes: N images, K classes or F findings, M models
(runs), G groups of images with equal probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import scipy  # its parts load with their first use, which most processes never come to
from numpy.typing import NDArray

from medssl.metrics import SCORES, UNKNOWN, Counts, Float, Int, counts, known_pairs

Slopes = NDArray[np.float64]


def mean_influence(probabilities_MNK: Float, labels_N: Int, metric: str) -> tuple[float, Slopes]:
    """Mean score over the models, and its derivative by each image's weight (N,), which sums to 0.

    NaN where the score is not defined: no class has images on both sides (auc).

    Raises:
        ValueError: an unknown metric, or no model.
    """
    if metric not in SLOPES or not len(probabilities_MNK):
        known = ", ".join(SLOPES)
        raise ValueError(f"metric {metric!r} of {len(probabilities_MNK)} models: choose from {known}, for one model or more")
    score, slope = SCORES[metric], SLOPES[metric]
    wide_NK = [model_NK.astype(np.float64) for model_NK in probabilities_MNK]
    scores_M = [score(model_NK, labels_N, None) for model_NK in wide_NK]
    return float(np.mean(scores_M)), np.mean([slope(model_NK, labels_N) for model_NK in wide_NK], axis=0)


def accuracy_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of the share of images predicted rightly."""
    if labels_N.ndim == 2:
        return _of_findings(accuracy_slopes, probabilities_NK, labels_N)
    right_N = probabilities_NK.argmax(axis=1) == labels_N
    slopes: Slopes = (right_N - right_N.mean()) / len(labels_N)
    return slopes


def balanced_accuracy_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of the mean recall over the classes that have images: an image moves the recall of its class."""
    if labels_N.ndim == 2:
        return _of_findings(balanced_accuracy_slopes, probabilities_NK, labels_N)
    right_N = probabilities_NK.argmax(axis=1) == labels_N
    support_K = np.bincount(labels_N, minlength=probabilities_NK.shape[1])
    recall_K = np.bincount(labels_N, right_N, len(support_K)) / np.maximum(support_K, 1)
    slopes: Slopes = (right_N - recall_K[labels_N]) / support_K[labels_N] / np.count_nonzero(support_K)
    return slopes


def f1_macro_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of the mean F1 over the classes that have images or are predicted."""
    if labels_N.ndim == 2:
        found, slopes_NF = _f1_of_findings(probabilities_NK, labels_N)
        there_F = (found.support + found.predicted) > 0
        return np.asarray((slopes_NF * there_F).sum(axis=1) / np.count_nonzero(there_F))
    _, total_K = _f1(probabilities_NK, labels_N)
    share_K = (total_K > 0) / np.count_nonzero(total_K)
    return _f1_slopes(probabilities_NK, labels_N, share_K)


def f1_weighted_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of F1 averaged by support, whose shares move too."""
    if labels_N.ndim == 2:
        found, slopes_NF = _f1_of_findings(probabilities_NK, labels_N)
        f1_F = 2 * found.hits / np.maximum(found.support + found.predicted, 1)
        share_F = found.support / found.support.sum()
        gained_NF = (labels_N == 1) * (f1_F - (share_F * f1_F).sum()) / found.support.sum()
        return np.asarray((slopes_NF * share_F + gained_NF).sum(axis=1))
    f1_K, _ = _f1(probabilities_NK, labels_N)
    share_K = np.bincount(labels_N, minlength=len(f1_K)) / len(labels_N)
    moved_N = (f1_K[labels_N] - (share_K * f1_K).sum()) / len(labels_N)
    slopes: Slopes = _f1_slopes(probabilities_NK, labels_N, share_K) + moved_N
    return slopes


def _of_findings(slopes: Callable[[Float, Int], Slopes], probabilities_NF: Float, labels_NF: Int) -> Slopes:
    """Mean over the findings of the slopes of a score of two classes, over the images of which each is known."""
    total_N, findings = np.zeros(len(labels_NF)), 0
    for f in range(labels_NF.shape[1]):
        known = np.flatnonzero(labels_NF[:, f] != UNKNOWN)
        if len(known):
            total_N[known] += slopes(*known_pairs(probabilities_NF[known, f : f + 1], labels_NF[known, f : f + 1]))
            findings += 1
    return total_N / max(findings, 1)


def _f1_of_findings(probabilities_NF: Float, labels_NF: Int) -> tuple[Counts, Slopes]:
    """Counts, and the slopes (N, F) of F1 = 2 hits / (support + predicted) of each finding."""
    found = counts(probabilities_NF, labels_NF)
    total_F = np.maximum(found.support + found.predicted, 1)
    f1_F, known_NF = 2 * found.hits / total_F, labels_NF != UNKNOWN
    there_NF, named_NF = labels_NF == 1, probabilities_NF > 0.5
    slopes_NF = (2.0 * (there_NF & named_NF) - f1_F * (there_NF.astype(float) + named_NF)) / total_F
    return found, slopes_NF * known_NF


def _sides(labels_N: Int, columns: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Images of each class (with each finding) and the others of which that is known."""
    for k in range(columns):
        label_N, value = (labels_N[:, k], 1) if labels_N.ndim == 2 else (labels_N, k)
        yield np.flatnonzero(label_N == value), np.flatnonzero((label_N != value) & (label_N != UNKNOWN))


def _f1(probabilities_NK: Float, labels_N: Int) -> tuple[Slopes, NDArray[np.int64]]:
    """F1 of each class, and its denominator: images of the class plus images predicted as it."""
    predicted_N, classes = probabilities_NK.argmax(axis=1), probabilities_NK.shape[1]
    total_K = np.bincount(labels_N, minlength=classes) + np.bincount(predicted_N, minlength=classes)
    hits_K = np.bincount(labels_N[predicted_N == labels_N], minlength=classes)
    return 2 * hits_K / np.maximum(total_K, 1), total_K


def _f1_slopes(probabilities_NK: Float, labels_N: Int, share_K: Float) -> Slopes:
    """Of the sum of share times F1 = 2 hits / total over classes: an image is in the totals of its label and its prediction."""
    f1_K, total_K = _f1(probabilities_NK, labels_N)
    predicted_N = probabilities_NK.argmax(axis=1)
    each_K = share_K / np.maximum(total_K, 1)
    slopes: Slopes = 2 * each_K[labels_N] * (predicted_N == labels_N)
    slopes -= each_K[labels_N] * f1_K[labels_N] + each_K[predicted_N] * f1_K[predicted_N]
    return slopes


def auc_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of the one-vs-rest AUC, from DeLong's placement values (DeLong et al. 1988)."""
    slopes, known = np.zeros(len(labels_N)), 0
    for k, (positive, negative) in enumerate(_sides(labels_N, probabilities_NK.shape[1])):
        if min(len(positive), len(negative)) == 0:
            continue
        scores_N, first = probabilities_NK[:, k], len(positive)
        ranks = scipy.stats.rankdata(scores_N[np.concatenate([positive, negative])])
        above = (ranks[:first] - scipy.stats.rankdata(scores_N[positive])) / len(negative)
        below = 1 - (ranks[first:] - scipy.stats.rankdata(scores_N[negative])) / len(positive)
        slopes[positive] += (above - above.mean()) / len(positive)
        slopes[negative] += (below - below.mean()) / len(negative)
        known += 1
    return slopes / known if known else np.full(len(labels_N), np.nan)


def average_precision_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of the average precision, mean over the classes that have images."""
    slopes, known = np.zeros(len(labels_N)), 0
    for k, (positive, negative) in enumerate(_sides(labels_N, probabilities_NK.shape[1])):
        if len(positive):
            both = np.concatenate([positive, negative])
            slopes[both] += _average_precision_slopes(probabilities_NK[both, k], np.arange(len(both)) < len(positive))
            known += 1
    return slopes / max(known, 1)


def _average_precision_slopes(scores_N: Float, positive_N: NDArray[np.bool_]) -> Slopes:
    """Of sum over g of gained[g] * precision[g], over all positives.

    An image with the h-th largest probability adds to what is gained at h, and moves the precision at h and at every lower
    probability: by (1 - precision) / images there if it is positive, by -precision / images if not.
    """
    _, group_N = np.unique(-scores_N, return_inverse=True)
    gained_G, images_G = np.bincount(group_N, positive_N), np.bincount(group_N)
    taken_G = np.cumsum(images_G)
    precision_G = np.cumsum(gained_G) / taken_G
    rise_G = np.cumsum((gained_G / taken_G)[::-1])[::-1]
    fall_G = np.cumsum((gained_G * precision_G / taken_G)[::-1])[::-1]
    positives = gained_G.sum()
    area = (gained_G * precision_G).sum() / positives
    slopes: Slopes = (positive_N * (precision_G[group_N] + rise_G[group_N] - area) - fall_G[group_N]) / positives
    return slopes


SLOPES: dict[str, Callable[[Float, Int], Slopes]] = {
    "accuracy": accuracy_slopes,
    "balanced_accuracy": balanced_accuracy_slopes,
    "f1_weighted": f1_weighted_slopes,
    "f1_macro": f1_macro_slopes,
    "auc": auc_slopes,
    "average_precision": average_precision_slopes,
}
"""Name of a score -> its derivative: function(probabilities_NK, labels_N) -> (N,). The expected calibration error has none: it
is too large by chance, the more so the fewer the images (Nixon et al. 2019), and no interval around it holds the truth."""
