"""How much each image moves a score: the derivative of the score by the image's weight, at weight 1 for all.

The error of a score over patients follows from it without resampling. Hampel (1974) calls the derivative the influence curve;
summing it over a patient's images and taking the spread over patients is Jaeckel's (1972) infinitesimal jackknife, which is
what the bootstrap over patients tends to with ever more replicates where the score is smooth (Efron 1982, chapter 6). The
mean of a score over runs has the mean of their influences, so that 315 runs cost no more than their sorting.

Shapes: N images, K classes, M models (runs), G groups of images with equal probability.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medssl.metrics import SCORES, Float, Int

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
    right_N = probabilities_NK.argmax(axis=1) == labels_N
    slopes: Slopes = (right_N - right_N.mean()) / len(labels_N)
    return slopes


def balanced_accuracy_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of the mean recall over the classes that have images: an image moves the recall of its class."""
    right_N = probabilities_NK.argmax(axis=1) == labels_N
    support_K = np.bincount(labels_N, minlength=probabilities_NK.shape[1])
    recall_K = np.bincount(labels_N, right_N, len(support_K)) / np.maximum(support_K, 1)
    slopes: Slopes = (right_N - recall_K[labels_N]) / support_K[labels_N] / np.count_nonzero(support_K)
    return slopes


def f1_macro_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of the mean F1 over the classes that have images or are predicted."""
    _, total_K = _f1(probabilities_NK, labels_N)
    share_K = (total_K > 0) / np.count_nonzero(total_K)
    return _f1_slopes(probabilities_NK, labels_N, share_K)


def f1_weighted_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of F1 averaged by support, whose shares move too."""
    f1_K, _ = _f1(probabilities_NK, labels_N)
    share_K = np.bincount(labels_N, minlength=len(f1_K)) / len(labels_N)
    moved_N = (f1_K[labels_N] - (share_K * f1_K).sum()) / len(labels_N)
    slopes: Slopes = _f1_slopes(probabilities_NK, labels_N, share_K) + moved_N
    return slopes


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
    for k in range(probabilities_NK.shape[1]):
        positive, negative = np.flatnonzero(labels_N == k), np.flatnonzero(labels_N != k)
        if min(len(positive), len(negative)) == 0:
            continue
        scores_N = probabilities_NK[:, k]
        ranks_N = stats.rankdata(scores_N)
        above = (ranks_N[positive] - stats.rankdata(scores_N[positive])) / len(negative)
        below = 1 - (ranks_N[negative] - stats.rankdata(scores_N[negative])) / len(positive)
        slopes[positive] += (above - above.mean()) / len(positive)
        slopes[negative] += (below - below.mean()) / len(negative)
        known += 1
    return slopes / known if known else np.full(len(labels_N), np.nan)


def average_precision_slopes(probabilities_NK: Float, labels_N: Int) -> Slopes:
    """Of the average precision, mean over the classes that have images."""
    slopes, known = np.zeros(len(labels_N)), 0
    for k in range(probabilities_NK.shape[1]):
        positive_N = labels_N == k
        if positive_N.any():
            slopes += _average_precision_slopes(probabilities_NK[:, k], positive_N)
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
