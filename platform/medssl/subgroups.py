"""Groups of images by what is known of them (site, device, sex, age band ...), and how sure a score of a group is.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import scipy  # its parts load with their first use, which most processes never come to
from numpy.typing import NDArray
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from medssl.influence import Slopes

MOST_GROUPS = 24
"""A column with more values than this needs bands, or is no column to group by."""
UNKNOWN = "not stated"
"""Name of the group of images for which a column is empty."""


def groups_of(name: str, values: pd.Series, bands: Sequence[float] = ()) -> dict[str, NDArray[np.bool_]]:
    """Which images are in each group of a column, by the group's name; images without a value come last.

    Args:
        name: of the column, for messages.
        values: one value per image.
        bands: limits that numbers are cut at, ascending: [40, 60] gives below 40, from 40 to below 60, 60 and above. Without
            them each value is a group.

    Raises:
        ValueError: bands for values that are no numbers, or more than MOST_GROUPS values without bands.
    """
    known_N = values.notna().to_numpy()
    numeric = is_numeric_dtype(values) and not is_bool_dtype(values)
    if bands:
        if not numeric:
            raise ValueError(f"column '{name}' holds {values.dtype}, not numbers: leave its bands out")
        groups = _bands(values.to_numpy(dtype=np.float64, na_value=np.nan), bands)
    else:
        names = [f"{value:g}" if numeric and known else str(value) for value, known in zip(values, known_N, strict=True)]
        texts = np.array(names, dtype=object)
        found = sorted(set(texts[known_N]), key=(lambda text: (float(text), text)) if numeric else None)
        if len(found) > MOST_GROUPS:
            do = f"cut it, for example with bands: {{{name}: [40, 60]}}" if numeric else "group by another column"
            raise ValueError(f"column '{name}' has {len(found)} different values, {MOST_GROUPS} at most make groups: {do}")
        groups = {text: (texts == text) & known_N for text in found}
    if not known_N.all():
        groups[UNKNOWN] = groups.get(UNKNOWN, False) | ~known_N
    return groups


def _bands(values_N: NDArray[np.float64], limits: Sequence[float]) -> dict[str, NDArray[np.bool_]]:
    """Bands that include their lower limit."""
    groups = {f"below {limits[0]:g}": values_N < limits[0]}
    for low, high in pairwise(limits):
        groups[f"{low:g} to below {high:g}"] = (low <= values_N) & (values_N < high)
    groups[f"{limits[-1]:g} and above"] = values_N >= limits[-1]
    return groups


def patient_interval(
    score: float, slopes_N: Slopes, patients_N: Sequence[object], level: float = 0.95
) -> tuple[float, float]:
    """Interval of a score between 0 and 1 for other patients of the same kind; the trained models are taken as they are.

    The standard error comes from the images' influences summed over each patient (:mod:`medssl.influence`); the interval is
    Student's t times it on the logit scale, where scores near 1 scatter evenly (in simulations of 40 patients it held the
    truth in 91 to 96% of draws, without the logit in 78 to 93%). NaN for a single patient, and where no image moves the score
    (all right, or all wrong): the data then say nothing of how much it would scatter.

    Args:
        slopes_N: influence of each image on the score (`influence.mean_influence`).
        patients_N: patient of each image; an unknown one (None) is a patient of its own.
    """
    numbers: dict[object, int] = {}
    patient_N = [numbers.setdefault(n if patient is None else (patient,), len(numbers)) for n, patient in enumerate(patients_N)]
    patients = len(numbers)
    if patients < 2:
        return float("nan"), float("nan")
    squares = (np.bincount(patient_N, slopes_N) ** 2).sum()
    error = float(np.sqrt(squares * patients / (patients - 1)))
    if not (error > 1e-12 and 0 < score < 1):
        return float("nan"), float("nan")
    middle, reach = scipy.special.logit(score), scipy.stats.t.ppf((1 + level) / 2, patients - 1) * error / (score * (1 - score))
    return float(scipy.special.expit(middle - reach)), float(scipy.special.expit(middle + reach))
