"""What a design can show, before anyone runs it: the smallest difference that its nested bootstrap would find.

Shapes: S simulated studies, V kinds of repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load with their first use, which most processes never come to
from numpy.typing import NDArray

_STUDIES = 20_000
"""Simulated sets of variance estimates: the power is right to about 0.002."""


@dataclass(frozen=True)
class Scatter:
    """Standard deviations of a score, in units of the metric, by kind of repeat.

    The defaults are of the balanced accuracy of a linear probe on HAM10000 (7 classes, 1,000 labels a draw, ResNet-18 at 64
    pixels, 2,241 lesions in the test split). The bootstrap of a study's own comparisons measures the same quantities; other
    data, metrics and numbers of labels scatter otherwise.
    """

    pretraining_seed: float = 0.010
    """Of an arm, over pretraining seeds. Measured over 8 random initialisations; pretrained encoders may differ."""
    label_draw: float = 0.019
    """Of the difference of two arms, over label draws that they share. Measured: 0.018 between two random encoders, 0.020
    between a random encoder and colour statistics."""
    head_seed: float = 0.003
    """Of an arm, over head seeds within one encoder and draw."""
    patient: float = 0.014 * 2241**0.5
    """Of the difference of two arms, for a single patient: the standard error over patients times the root of their number.
    Measured at 2,241 lesions: 0.015 for random encoders against colour statistics, 0.006 against each other."""


def smallest_detectable_difference(
    pretraining_seeds: tuple[int, int],
    label_draws: int,
    head_seeds: tuple[int, int],
    patients: int,
    *,
    scatter: Scatter | None = None,
    power: float = 0.8,
    level: float = 0.05,
) -> float:
    """The smallest true difference of two arms' means that the nested bootstrap finds with this power.

    Found means p < `level`, two-sided. The model is the bootstrap's: independent normal effects of each kind of repeat, a
    variance estimate of each, and Student's t with Satterthwaite's degrees of freedom of their sum. With two or three
    repeats those estimates scatter widely, so the power is averaged over them (simulated chi-squares, always the same)
    instead of being taken at their true values, which would promise too much. A kind of repeat with one unit is left out,
    as the bootstrap leaves it out: the answer then holds for that one encoder or draw.

    Args:
        pretraining_seeds, head_seeds: of the first and of the second arm.
        label_draws: draws of the labelled set, the same for both arms.
        patients: in the evaluation split.
        scatter: standard deviations to expect; None takes the defaults of `Scatter`.

    Raises:
        ValueError: a number below 1, a power outside `level` to 1, a level outside 0 to 0.5, a negative standard deviation,
            or nothing that repeats.
    """
    _check_rates(power, level)
    design = _Design.of(pretraining_seeds, label_draws, head_seeds, patients, scatter or Scatter())

    reach_S = design.reach(1 - level / 2)

    def found(difference: float) -> float:
        ratio = difference / design.error
        return float((scipy.special.ndtr(ratio - reach_S) + scipy.special.ndtr(-ratio - reach_S)).mean())

    return _solve(found, power, design.error)


def smallest_equivalence_margin(
    pretraining_seeds: tuple[int, int],
    label_draws: int,
    head_seeds: tuple[int, int],
    patients: int,
    *,
    scatter: Scatter | None = None,
    power: float = 0.8,
    level: float = 0.05,
) -> float:
    """The smallest margin within which `nested_equivalence` calls two truly equal arms equivalent, with this power.

    Arguments and errors as for `smallest_detectable_difference`. A smaller margin in a recipe asks for what the design
    will seldom show, however equal the arms are.
    """
    _check_rates(power, level)
    design = _Design.of(pretraining_seeds, label_draws, head_seeds, patients, scatter or Scatter())

    reach_S = design.reach(1 - level)

    def shown(margin: float) -> float:
        room_S = margin / design.error - reach_S
        return float(np.maximum(2 * scipy.special.ndtr(room_S) - 1, 0).mean())

    return _solve(shown, power, design.error)


@dataclass(frozen=True, eq=False)
class _Design:
    """A design's true standard error, and its estimates in simulated studies."""

    error: float
    ratio_S: NDArray[np.float64]
    """Estimated standard error over the true one."""
    freedom_S: NDArray[np.float64]

    @classmethod
    def of(
        cls, pretraining_seeds: tuple[int, int], label_draws: int, head_seeds: tuple[int, int], patients: int, scatter: Scatter
    ) -> _Design:
        numbers = (*pretraining_seeds, label_draws, *head_seeds, patients)
        if min(numbers) < 1:
            given = f"seeds {pretraining_seeds}, draws {label_draws}, heads {head_seeds}, patients {patients}"
            raise ValueError(f"{given}: each is 1 or more")
        spreads = (scatter.pretraining_seed, scatter.label_draw, scatter.head_seed, scatter.patient)
        if min(spreads) < 0:
            raise ValueError(f"standard deviations are 0 or more: they are {spreads}")
        true_V, seen_V, freedom_V = (np.array(v, np.float64) for v in zip(*_kinds(numbers, scatter), strict=True))
        if not seen_V.any():
            raise ValueError("nothing repeats: a design needs two patients, draws or seeds that scatter")
        studies = scipy.stats.chi2.rvs(freedom_V[freedom_V > 0], size=(_STUDIES, int((freedom_V > 0).sum())), random_state=0)
        seen_SV = seen_V[freedom_V > 0] * studies / freedom_V[freedom_V > 0]
        sum_S = seen_SV.sum(axis=1)
        freedom_S = sum_S**2 / (seen_SV**2 / freedom_V[freedom_V > 0]).sum(axis=1)
        error = float(np.sqrt(true_V.sum()))
        return cls(error, np.sqrt(sum_S) / error, freedom_S)

    def reach(self, quantile: float) -> NDArray[np.float64]:
        """How far an interval reaches from the difference, in true standard errors, (S,)."""
        reach_S: NDArray[np.float64] = scipy.stats.t.ppf(quantile, self.freedom_S) * self.ratio_S
        return reach_S


def _kinds(numbers: tuple[int, ...], scatter: Scatter) -> list[tuple[float, float, int]]:
    """Of each kind of repeat: its variance in the difference of means, what the bootstrap sees of it (with what the heads
    below leave in the means), and its degrees of freedom (0 where it has one unit)."""
    *seeds, draws, first_heads, second_heads, patients = numbers
    kinds, left = [], 0.0
    for p, s in zip(seeds, (first_heads, second_heads), strict=True):
        own, heads = scatter.pretraining_seed**2 / p if p > 1 else 0.0, scatter.head_seed**2 / (p * draws * s)
        kinds.append((own, own + heads if p > 1 else 0.0, p - 1))
        kinds.append((heads, heads if s > 1 else 0.0, p * draws * (s - 1)))
        left += heads
    shared = scatter.label_draw**2 / draws if draws > 1 else 0.0
    kinds.append((shared, shared + left if draws > 1 else 0.0, draws - 1))
    people = scatter.patient**2 / patients if patients > 1 else 0.0
    kinds.append((people, people, patients - 1))
    return kinds


def _check_rates(power: float, level: float) -> None:
    if not 0 < level < 0.5:
        raise ValueError(f"level is {level}: it lies between 0 and 0.5, as 0.05")
    if not level < power < 1:
        raise ValueError(f"power is {power}: it lies between the level {level} and 1, as 0.8")


def _solve(rate: Callable[[float], float], wanted: float, error: float) -> float:
    """Where a rate that rises with the difference reaches `wanted`."""
    if rate(0.0) >= wanted:
        return 0.0
    high = error
    while rate(high) < wanted:
        high *= 2
    return float(scipy.optimize.brentq(lambda x: rate(x) - wanted, 0.0, high, xtol=1e-6 * error))
