"""The nested bootstrap: an interval for the difference of two arms that varies everything a repeat could vary.

On its result rests the test of equivalence; with two fixed models it is the paired bootstrap over patients.

Labels are of classes (N,) or of findings (N, F), as in `medssl.metrics`.

Shapes: P pretraining seeds, D label draws, S head seeds, M = P*D*S models, N images, K classes or findings, R bootstrap
replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy  # its parts load with their first use, which most processes never come to
from numpy.typing import NDArray

from medssl.metrics import COUNT_METRICS, METRICS, UNKNOWN, Counts, Float, Int
from medssl.statistics.samples import EquivalenceResult

_MODELS_AT_ONCE = 64
"""Models scored together: bounds the memory for one-hot predictions."""


@dataclass(frozen=True)
class BootstrapResult:
    """Difference of two arms' mean scores (first minus second) with an interval over every kind of repeat."""

    metric: str
    difference: float
    low: float
    high: float
    p: float
    """Two-sided: the largest 1 - confidence at which the interval still holds 0."""
    confidence: float
    standard_error: float
    """Standard deviation of the difference over the replicates."""
    degrees_of_freedom: float
    """Of Student's t, by Satterthwaite's rule from the variances of the kinds of repeat."""
    percentile_low: float
    """Plain percentile interval of the replicates; with few seeds it is too short."""
    percentile_high: float
    replicates: int
    variances: dict[str, float]
    """Share of the squared standard error by kind of repeat, each on its own (they need not sum to it)."""
    notes: tuple[str, ...]
    """What the interval does not cover, in words."""


def nested_bootstrap(
    first_PDSNK: Float,
    second_PDSNK: Float,
    labels_N: Int,
    patients_N: Sequence[object] | NDArray[np.generic],
    *,
    metric: str = "balanced_accuracy",
    replicates: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapResult:
    """Interval of mean score(first) - mean score(second) over seeds, draws and patients.

    Each replicate draws pretraining seeds (independently for the two arms), label draws (the same for both), head seeds
    (anew for each drawn cell) and patients (the same for all models; an image counts as often as its patient), and
    recomputes the difference of means. Every level draws n - 1 of its n units with replacement, which makes the
    variance of a mean unbiased where the usual n of n gives (n-1)/n of it, a third too little at 3 seeds (Rao and Wu
    1988). The interval is difference +- t * standard error with Satterthwaite's degrees of freedom, because percentiles
    of 3 seeds cannot reach far enough: plain ones hold the truth less often than they say (tested by simulation). The design
    counts interactions more than once (Owen 2007), so the interval errs to the wide side.

    A kind of repeat with one unit cannot be resampled: the interval then says nothing about it, and `notes` says so.

    Args:
        first_PDSNK, second_PDSNK: class probabilities; P and S may differ between the arms, D, N and K not.
        patients_N: patient of each image; an unknown one (None or NaN) is a patient of its own.

    Raises:
        ValueError: shapes that do not fit, or an unknown metric.
    """
    _check(first_PDSNK, labels_N, metric)
    _check(second_PDSNK, labels_N, metric)
    if first_PDSNK.shape[1] != second_PDSNK.shape[1] or first_PDSNK.shape[3:] != second_PDSNK.shape[3:]:
        raise ValueError(f"arms of shape {first_PDSNK.shape} and {second_PDSNK.shape}: draws, images or classes differ")
    rng = np.random.default_rng(seed)
    images_NR, patients = _resample_patients(patients_N, replicates, rng)
    draws_RD = _resample(replicates, first_PDSNK.shape[1], rng)
    arms = [_scores(arm_PDSNK, labels_N, images_NR, metric) for arm_PDSNK in (first_PDSNK, second_PDSNK)]
    means = [
        np.einsum("pdsr,rpds->r", scores[..., 1:], _resample_models(scores.shape[:3], draws_RD, rng), optimize=True)
        for scores in arms
    ]
    first_PDS, second_PDS = arms[0][..., 0], arms[1][..., 0]
    difference = float(first_PDS.mean() - second_PDS.mean())
    fixed_R = arms[0].mean(axis=(0, 1, 2))[1:] - arms[1].mean(axis=(0, 1, 2))[1:]
    variances, freedom = _variances(first_PDS, second_PDS, fixed_R, patients)
    replicates_R = (means[0] - means[1])[~np.isnan(means[0] - means[1])]
    notes = _notes(first_PDS.shape, second_PDS.shape, patients)
    if len(replicates_R) < replicates:
        notes += (f"{replicates - len(replicates_R)} replicates had too few classes for the score and were dropped",)
    error = float(replicates_R.std(ddof=1)) if len(replicates_R) > 1 else float("nan")
    reach = float(scipy.stats.t.ppf((1 + confidence) / 2, freedom)) * error
    percentiles = np.quantile(replicates_R, [(1 - confidence) / 2, (1 + confidence) / 2]) if len(replicates_R) else None
    return BootstrapResult(
        metric=metric,
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        p=_p_value(difference, error, freedom),
        confidence=confidence,
        standard_error=error,
        degrees_of_freedom=freedom,
        percentile_low=float("nan") if percentiles is None else float(percentiles[0]),
        percentile_high=float("nan") if percentiles is None else float(percentiles[1]),
        replicates=len(replicates_R),
        variances=variances,
        notes=notes,
    )


def paired_bootstrap(
    first_NK: Float,
    second_NK: Float,
    labels_N: Int,
    patients_N: Sequence[object] | NDArray[np.generic],
    *,
    metric: str = "balanced_accuracy",
    replicates: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapResult:
    """Interval of score(first) - score(second) for two sets of predictions on the same images, over patients alone.

    Both models are taken as they are: each replicate draws patients, with all their images, and scores both on them. It is
    the nested bootstrap with one model on each side: n - 1 of n patients, Student's t with n - 1 degrees of freedom; for
    accuracy with one image a patient that is the paired t test's interval. It says which of these two models is better on
    such patients, and nothing about how either was trained.

    Args:
        first_NK, second_NK: class probabilities.
        patients_N: patient of each image; an unknown one (None or NaN) is a patient of its own.

    Raises:
        ValueError: shapes that do not fit, or an unknown metric.
    """
    if first_NK.ndim != 2 or second_NK.ndim != 2:
        raise ValueError(f"predictions of shape {first_NK.shape} and {second_NK.shape}: expected (N, K) of one model each")
    found = nested_bootstrap(
        first_NK[None, None, None], second_NK[None, None, None], labels_N, patients_N,
        metric=metric, replicates=replicates, confidence=confidence, seed=seed,
    )  # fmt: skip
    of_repeats = _notes((1, 1, 1), (1, 1, 1), patients=2)  # said in one line here
    kept = tuple(note for note in found.notes if note not in of_repeats)
    fixed = "both models are fixed: the interval says nothing about how they were trained"
    return replace(found, variances={"patient": found.variances["patient"]}, notes=(fixed, *kept))


def nested_equivalence(found: BootstrapResult, margin: float, *, level: float = 0.05) -> EquivalenceResult:
    """Whether two arms differ by less than `margin`, from the nested bootstrap of their difference.

    Two one-sided t tests (Schuirmann 1987) with the bootstrap's standard error and degrees of freedom: the difference is
    above -margin, and below +margin. Equivalent at `level` exactly when the interval at 1 - 2 * level, which the result
    holds, lies within the margin. What the bootstrap's `notes` leave out, this leaves out too.

    Args:
        margin: the largest difference that does not matter, in units of the metric, chosen before the scores are seen.

    Raises:
        ValueError: a margin that is not above 0, or a level outside 0 to 0.5.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}: give the largest difference that does not matter, above 0")
    if not 0 < level < 0.5:
        raise ValueError(f"level is {level}: it lies between 0 and 0.5, as 0.05")
    difference, error, freedom = found.difference, found.standard_error, found.degrees_of_freedom
    reach = float(scipy.stats.t.ppf(1 - level, freedom)) * error
    if error > 0:
        p = float(scipy.stats.t.sf((margin - abs(difference)) / error, freedom))  # the side nearer its end has the larger p
    else:
        p = float("nan") if np.isnan(error) else float(abs(difference) >= margin)
    return EquivalenceResult(difference, difference - reach, difference + reach, margin, p)


def run_scores(probabilities_PDSNK: Float, labels_N: Int, metric: str) -> Float:
    """Score of every run, (P, D, S)."""
    _check(probabilities_PDSNK, labels_N, metric)
    ones_N1 = np.ones((len(labels_N), 1), np.float32)
    return _scores(probabilities_PDSNK, labels_N, ones_N1, metric)[..., 0]


def _resample(replicates: int, units: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each unit is drawn when n - 1 of n are drawn with replacement, (R, n); a single unit is always kept."""
    return rng.multinomial(max(units - 1, 1), np.full(units, 1 / units), size=replicates)


def _resample_patients(
    patients_N: Sequence[object] | NDArray[np.generic], replicates: int, rng: np.random.Generator
) -> tuple[Float, int]:
    """Image weights (N, R+1), the first column all ones, and the number of patients."""
    codes: dict[object, int] = {}
    groups_N = np.array([codes.setdefault(_patient(p, i), len(codes)) for i, p in enumerate(patients_N)])
    weights_NR = np.ones((len(groups_N), replicates + 1), np.float32)
    weights_NR[:, 1:] = _resample(replicates, len(codes), rng).T[groups_N]
    return weights_NR, len(codes)


def _patient(patient: object, image: int) -> object:
    """The patient's key; an unknown one (None, NaN) is a group of its own."""
    unknown = patient is None or patient != patient  # noqa: PLR0124  NaN differs from itself
    return ("image", image) if unknown else ("patient", str(patient))


def _resample_models(shape: tuple[int, ...], draws_RD: NDArray[np.int64], rng: np.random.Generator) -> Float:
    """Weight of each model in each replicate's mean, (R, P, D, S), summing to 1."""
    p, _, s = shape
    seeds_RP = _resample(len(draws_RD), p, rng)
    cells_RPD = seeds_RP[:, :, None] * draws_RD[:, None, :]
    # A cell drawn c times has its head seeds drawn c times over, each time s - 1 of s.
    models_RPDS = rng.multinomial(cells_RPD * max(s - 1, 1), np.full(s, 1 / s)).astype(np.float64)
    models_RPDS /= models_RPDS.sum(axis=(1, 2, 3), keepdims=True)
    return models_RPDS


def _scores(probabilities_PDSNK: Float, labels_N: Int, weights_NR: Float, metric: str) -> Float:
    """Score of every model under every set of image weights, (P, D, S, R)."""
    shape = probabilities_PDSNK.shape
    flat_MNK = probabilities_PDSNK.reshape(-1, *shape[3:])
    packs = [flat_MNK[i : i + _MODELS_AT_ONCE] for i in range(0, len(flat_MNK), _MODELS_AT_ONCE)]
    if metric == "auc":
        parts = [_auc_scores(pack_MNK, labels_N, weights_NR) for pack_MNK in packs]
    else:
        parts = [_count_scores(pack_MNK, labels_N, weights_NR, metric) for pack_MNK in packs]
    return np.concatenate(parts).reshape(*shape[:3], -1)


def _count_scores(probabilities_MNK: Float, labels_N: Int, weights_NR: Float, metric: str) -> Float:
    """(M, R) by matrix products of one-hot predictions and image weights; float32 counts are exact below 16 million."""
    if labels_N.ndim == 2:
        return COUNT_METRICS[metric](_finding_counts(probabilities_MNK, labels_N, weights_NR))
    predicted_MN, classes = probabilities_MNK.argmax(axis=2), probabilities_MNK.shape[2]
    shape = (len(predicted_MN), weights_NR.shape[1], classes)
    hits, predicted, support = np.empty(shape, np.float32), np.zeros(shape, np.float32), np.empty(shape[1:], np.float32)
    for k in range(classes):
        rows = np.flatnonzero(labels_N == k)
        is_k_MN = (predicted_MN == k).astype(np.float32)
        hits[..., k] = is_k_MN[:, rows] @ weights_NR[rows]
        support[:, k] = weights_NR[rows].sum(axis=0)
        if metric.startswith("f1"):
            predicted[..., k] = is_k_MN @ weights_NR
    return COUNT_METRICS[metric](Counts(hits, predicted, support))


def _finding_counts(probabilities_MNF: Float, labels_NF: Int, weights_NR: Float) -> Counts:
    """(M, R, F) of each finding, over the images of which it is known."""
    models, replicates, findings = len(probabilities_MNF), weights_NR.shape[1], labels_NF.shape[1]
    hits, named = (np.empty((models, replicates, findings), np.float32) for _ in range(2))
    support, known = (np.empty((replicates, findings), np.float32) for _ in range(2))
    for f in range(findings):
        there, rows = np.flatnonzero(labels_NF[:, f] == 1), np.flatnonzero(labels_NF[:, f] != UNKNOWN)
        named_MN = (probabilities_MNF[:, :, f] > 0.5).astype(np.float32)
        hits[..., f], named[..., f] = named_MN[:, there] @ weights_NR[there], named_MN[:, rows] @ weights_NR[rows]
        support[:, f], known[:, f] = weights_NR[there].sum(axis=0), weights_NR[rows].sum(axis=0)
    return Counts(hits, named, support, known)


def _auc_scores(probabilities_MNK: Float, labels_N: Int, weights_NR: Float) -> Float:
    """(M, R) one-vs-rest AUC from DeLong's placement values (DeLong et al. 1988).

    The area is the mean over the positives of the share of negatives below each, and the mean over the negatives of the
    share of positives above each. Weighting both means and adding their deviations is exact for the sample and leaves
    out only the second-order term of a resample, so that matrix products serve here too (against an exact resample the
    standard error agrees to a few per cent; tested).
    """
    total_MR, known_R = np.zeros((len(probabilities_MNK), weights_NR.shape[1])), np.zeros(weights_NR.shape[1])
    for k in range(probabilities_MNK.shape[2]):
        label_N, value = (labels_N[:, k], 1) if labels_N.ndim == 2 else (labels_N, k)
        positive, negative = np.flatnonzero(label_N == value), np.flatnonzero((label_N != value) & (label_N != UNKNOWN))
        if min(len(positive), len(negative)) == 0:
            continue
        both = np.concatenate([positive, negative])
        ranks_MB, first = scipy.stats.rankdata(probabilities_MNK[:, both, k], axis=1), len(positive)
        above_MN = (ranks_MB[:, :first] - scipy.stats.rankdata(probabilities_MNK[:, positive, k], axis=1)) / len(negative)
        under_MN = ranks_MB[:, first:] - scipy.stats.rankdata(probabilities_MNK[:, negative, k], axis=1)
        below_MN = 1 - under_MN / len(positive)
        area_M1 = above_MN.mean(axis=1, keepdims=True)
        weights_R = weights_NR[positive].sum(axis=0), weights_NR[negative].sum(axis=0)
        present_R = (weights_R[0] > 0) & (weights_R[1] > 0)
        moved_MR = (above_MN - area_M1).astype(np.float32) @ weights_NR[positive] / np.maximum(weights_R[0], 1)
        moved_MR += (below_MN - area_M1).astype(np.float32) @ weights_NR[negative] / np.maximum(weights_R[1], 1)
        total_MR += np.where(present_R, area_M1 + moved_MR, 0)
        known_R += present_R
    total_MR[:, known_R == 0] = np.nan
    return total_MR / np.maximum(known_R, 1)


def _variances(first_PDS: Float, second_PDS: Float, patients_R: Float, patients: int) -> tuple[dict[str, float], float]:
    """Variance of the difference by each kind of repeat alone, and Satterthwaite's degrees of freedom of their sum."""
    parts: dict[str, tuple[float, float]] = {}
    for name, scores_PDS in (("first", first_PDS), ("second", second_PDS)):
        p, d, s = scores_PDS.shape
        parts[f"pretraining_seed_{name}"] = (_variance_of_mean(scores_PDS.mean(axis=(1, 2))), p - 1)
        heads = float(scores_PDS.var(axis=2, ddof=1).mean()) / (p * d * s) if s > 1 else 0.0
        parts[f"head_seed_{name}"] = (heads, p * d * (s - 1))
    gaps_D = first_PDS.mean(axis=(0, 2)) - second_PDS.mean(axis=(0, 2))
    parts["label_draw"] = (_variance_of_mean(gaps_D), len(gaps_D) - 1)
    parts["patient"] = (float(np.nanvar(patients_R, ddof=1)) if patients > 1 else 0.0, patients - 1)
    total = sum(variance for variance, _ in parts.values())
    spread = sum(variance**2 / freedom for variance, freedom in parts.values() if freedom > 0)
    freedom = total**2 / spread if spread > 0 else float("inf")
    return {name: variance for name, (variance, _) in parts.items()}, freedom


def _p_value(difference: float, error: float, freedom: float) -> float:
    """Two-sided p of Student's t; without any spread 1 for no difference and 0 for one."""
    if error > 0:
        return float(2 * scipy.stats.t.sf(abs(difference) / error, freedom))
    return float("nan") if np.isnan(error) else float(difference == 0)


def _notes(first: tuple[int, ...], second: tuple[int, ...], patients: int) -> tuple[str, ...]:
    """What cannot be resampled, in words."""
    notes = []
    for arm, (p, _, s) in (("first", first), ("second", second)):
        if p == 1:
            notes.append(f"the {arm} arm has one pretraining seed: the interval says nothing about other seeds")
        if s == 1:
            notes.append(f"the {arm} arm has one head seed: the interval says nothing about other heads")
    if first[1] == 1:
        notes.append("there is one draw of the labelled images: the interval says nothing about other draws")
    if patients == 1:
        notes.append("there is one patient: the interval says nothing about other patients")
    return tuple(notes)


def _variance_of_mean(values: Float) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _check(probabilities_PDSNK: Float, labels_N: Int, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: choose from {', '.join(METRICS)}")
    if probabilities_PDSNK.ndim != 5 or probabilities_PDSNK.shape[3 : 3 + labels_N.ndim] != labels_N.shape:
        shapes = f"probabilities {probabilities_PDSNK.shape} and labels {labels_N.shape}"
        raise ValueError(f"{shapes}: expected (P, D, S, N, K), and (N,) for classes or (N, K) for findings")
    if 0 in probabilities_PDSNK.shape:
        raise ValueError(f"probabilities {probabilities_PDSNK.shape}: no axis may be empty")
