"""Can the probabilities be believed, and what would acting on them be worth: reliability, temperature, prior, net benefit.

Labels are of classes (N,) or of findings (N, F), as in `medssl.metrics`; of findings, all that are known count together.

Shapes: N images, K classes or F findings, B bins, T thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy  # its parts load with their first use, which most processes never come to
from numpy.typing import NDArray

from medssl.metrics import Float, Int, confidence_bins, known_pairs

_SMALLEST = 1e-12
"""Probabilities below this are taken for it where a logarithm is taken."""


@dataclass(frozen=True)
class Reliability:
    """How often predictions of a confidence are right, by bins of confidence; bins without an image are left out."""

    confidence_B: NDArray[np.float64]
    """Mean probability of the predicted class."""
    accuracy_B: NDArray[np.float64]
    images_B: NDArray[np.int64]

    @property
    def expected_error(self) -> float:
        """Expected calibration error (Guo et al. 2017): the mean over images of |accuracy - confidence| of their bin."""
        gaps_B = np.abs(self.accuracy_B - self.confidence_B)
        return float((gaps_B * self.images_B).sum() / self.images_B.sum())

    @classmethod
    def of_counts(cls, counts_3B: NDArray[np.float64]) -> Reliability:
        """From :func:`reliability_counts`, of one classifier or added up over several."""
        there_3B = counts_3B[:, counts_3B[2] > 0]
        return cls(there_3B[0] / there_3B[2], there_3B[1] / there_3B[2], there_3B[2].round().astype(np.int64))


def reliability(probabilities_NK: Float, labels_N: Int, bins: int = 15) -> Reliability:
    """Confidence and accuracy in bins of equal width between 0 and 1, open below as in Guo et al. 2017.

    Raises:
        ValueError: no image, or fewer than one bin.
    """
    return Reliability.of_counts(reliability_counts(probabilities_NK, labels_N, bins))


def reliability_counts(probabilities_NK: Float, labels_N: Int, bins: int = 15) -> NDArray[np.float64]:
    """By bin of confidence (3, B): sum of confidences, images named rightly, images. ValueError as for :func:`reliability`."""
    if bins < 1 or not len(labels_N):
        raise ValueError(f"{bins} bins and {len(labels_N)} images: one of each is needed")
    confidence_N, right_N, bin_N = confidence_bins(probabilities_NK, labels_N, bins)
    return np.stack([np.bincount(bin_N, weights, bins) for weights in (confidence_N, right_N, np.ones(len(bin_N)))])


def brier_score(probabilities_NK: Float, labels_N: Int) -> float:
    """Brier score (1950), lower is better: the mean over images of the squared distance of the probabilities from the label.

    The sum over classes of (probability - 1 for the label, 0 for the others) squared: 0 where all are sure and right, 2 where
    all are sure and wrong. Of findings half of that: (probability - label) squared. ValueError without an image.
    """
    if not len(labels_N):
        raise ValueError("there is no image to score")
    if labels_N.ndim == 2:
        return brier_score(*known_pairs(probabilities_NK.astype(np.float64), labels_N)) / 2
    wide_NK = probabilities_NK.astype(np.float64)
    right_N = wide_NK[np.arange(len(labels_N)), labels_N]
    return float(((wide_NK**2).sum(axis=1) - 2 * right_N + 1).mean())


def fit_temperature(probabilities_NK: Float, labels_N: Int) -> float:
    """The temperature that makes these labels most likely (Guo et al. 2017); above 1 where predictions are too sure.

    To be fitted on validation images and applied to others (:func:`apply_temperature`): the predicted classes stay.
    Between 0.01 and 100.
    """
    if labels_N.ndim == 2:  # a sigmoid is a softmax over (0, logit)
        return fit_temperature(*known_pairs(probabilities_NK.astype(np.float64), labels_N))
    logits_NK = np.log(np.maximum(probabilities_NK.astype(np.float64), _SMALLEST))

    def loss(log_temperature: float) -> float:
        scaled_NK = logits_NK / np.exp(log_temperature)
        return float((scipy.special.logsumexp(scaled_NK, axis=1) - scaled_NK[np.arange(len(labels_N)), labels_N]).mean())

    found = scipy.optimize.minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def apply_temperature(probabilities_NK: Float, temperature: float, *, findings: bool = False) -> NDArray[np.float64]:
    """Probabilities (N, K) with their logits divided by `temperature`; ValueError unless that is above 0.

    Of findings every probability by itself, of classes so that each image's sum to 1.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    if findings:
        odds_NF = scipy.special.logit(np.clip(probabilities_NK.astype(np.float64), _SMALLEST, 1 - _SMALLEST))
        found: NDArray[np.float64] = scipy.special.expit(odds_NF / temperature)
        return found
    logits_NK = np.log(np.maximum(probabilities_NK.astype(np.float64), _SMALLEST)) / temperature
    scaled: NDArray[np.float64] = scipy.special.softmax(logits_NK, axis=1)
    return scaled


def change_prior(probabilities_NK: Float, prior_K: Float, new_prior_K: Float) -> NDArray[np.float64]:
    """Probabilities (N, K) for a place where the classes are as frequent as `new_prior_K`, by Bayes' rule.

    Right where images of a class look alike in both places (label shift; Saerens et al. 2002). Probabilities below 1e-12 are
    taken for it, so that votes of 0 can be weighed.

    Args:
        prior_K: frequencies that the classifier was trained with; what class weights or over-sampling made of them, where
            it had either. Of findings (F, 2): how frequent it is that an image does not have each, and that it has.
        new_prior_K: frequencies there; either may be counts.

    Raises:
        ValueError: a frequency is negative, or one of the trained ones is 0.
    """
    prior, new = np.asarray(prior_K, np.float64), np.asarray(new_prior_K, np.float64)
    if prior.min() <= 0 or new.min() < 0 or new.sum() == 0:
        raise ValueError(f"priors {prior.tolist()} and {new.tolist()}: trained ones above 0, new ones 0 or more and not all 0")
    if prior.ndim == 2:
        both = ((np.stack([1 - p_N, p_N], axis=1), *given) for p_N, *given in zip(probabilities_NK.T, prior, new, strict=True))
        return np.stack([change_prior(*each)[:, 1] for each in both], axis=1)
    weighted_NK = np.maximum(probabilities_NK.astype(np.float64), _SMALLEST) * (new / new.sum()) / (prior / prior.sum())
    changed: NDArray[np.float64] = weighted_NK / weighted_NK.sum(axis=1, keepdims=True)
    return changed


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit of acting on a probability (Vickers & Elkin 2006), in true positives per image."""

    thresholds_T: NDArray[np.float64]
    model_T: NDArray[np.float64]
    """Acting where the probability is the threshold or more."""
    all_T: NDArray[np.float64]
    """Acting on everyone; acting on nobody is 0."""


def decision_curve(probability_N: Float, positive_N: NDArray[np.bool_], thresholds_T: Float) -> DecisionCurve:
    """Net benefit at each threshold: true positives less false positives times the odds of the threshold, over N.

    Raises:
        ValueError: a threshold that is not between 0 and 1, or no image.
    """
    thresholds = np.asarray(thresholds_T, np.float64)
    if thresholds.min() <= 0 or thresholds.max() >= 1 or not len(positive_N):
        raise ValueError(f"thresholds lie in {thresholds.min()} to {thresholds.max()}: between 0 and 1, for one image or more")
    odds_T = thresholds / (1 - thresholds)
    acted_TN = probability_N[None, :] >= thresholds[:, None]
    hits_T, alarms_T = (acted_TN & positive_N).mean(axis=1), (acted_TN & ~positive_N).mean(axis=1)
    share = float(np.mean(positive_N))
    return DecisionCurve(thresholds, hits_T - alarms_T * odds_T, share - (1 - share) * odds_T)
