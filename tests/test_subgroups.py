"""Groups of images, and intervals that hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from medssl.influence import mean_influence
from medssl.subgroups import MOST_GROUPS, UNKNOWN, groups_of, patient_interval


def counts(groups: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: int(inside.sum()) for name, inside in groups.items()}


def test_values_are_groups_and_missing_ones_come_last() -> None:
    assert counts(groups_of("site", pd.Series(["north", None, "south", "north"]))) == {"north": 2, "south": 1, UNKNOWN: 1}
    assert counts(groups_of("grade", pd.Series([10.0, 2.0, np.nan, 2.0]))) == {"2": 2, "10": 1, UNKNOWN: 1}
    assert counts(groups_of("lit", pd.Series([True, False, True]))) == {"False": 1, "True": 2}
    assert counts(groups_of("site", pd.Series(["a", UNKNOWN, None]))) == {"a": 1, UNKNOWN: 2}


def test_bands_hold_their_lower_limit() -> None:
    ages = pd.Series([39, 40, 59, 60, 61, None])
    groups = groups_of("age", ages, (40, 60))
    assert list(groups) == ["below 40", "40 to below 60", "60 and above", UNKNOWN]
    assert [np.flatnonzero(inside).tolist() for inside in groups.values()] == [[0], [1, 2], [3, 4], [5]]
    assert sum(inside.astype(int) for inside in groups.values()).tolist() == [1] * 6
    assert list(groups_of("age", pd.Series([1, 2], dtype="Int64"), (1.5,))) == ["below 1.5", "1.5 and above"]


def test_what_makes_no_groups_is_refused() -> None:
    many = pd.Series(range(MOST_GROUPS + 1))
    with pytest.raises(ValueError, match=r"column 'age' has 25 different values.*bands: \{age: \[40, 60\]\}"):
        groups_of("age", many)
    with pytest.raises(ValueError, match=r"25 different values.*another column"):
        groups_of("name", many.astype(str))
    with pytest.raises(ValueError, match=r"column 'sex' holds .*, not numbers"):
        groups_of("sex", pd.Series(["f", "m"]), (1.0,))


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "f1_macro", "auc"])
def test_interval_holds_the_truth_as_often_as_it_says(metric: str) -> None:
    """40 patients with 1 to 4 images, of which one patient's are right or wrong together."""
    rng = np.random.default_rng(1)

    def draw(patients: int) -> tuple[np.ndarray, np.ndarray, list[object]]:
        patient = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
        labels = (rng.random(patients) < 0.4).astype(int)[patient]
        margin = 1.6 * labels - 0.6 + 0.8 * rng.normal(size=patients)[patient] + 0.6 * rng.normal(size=len(patient))
        second = 1 / (1 + np.exp(-margin))
        return np.stack([1 - second, second], 1)[None], labels, patient.tolist()

    truth = mean_influence(*draw(60_000)[:2], metric)[0]
    held, draws = 0, 300
    for _ in range(draws):
        probabilities, labels, patients = draw(40)
        score, slopes = mean_influence(probabilities, labels, metric)
        low, high = patient_interval(score, slopes, patients)
        held += low <= truth <= high
    assert 0.91 <= held / draws <= 0.98


def test_unknown_patients_are_patients_of_their_own_and_no_spread_is_no_interval() -> None:
    slopes = np.array([0.1, -0.1, 0.05, -0.05])
    known, unknown = patient_interval(0.5, slopes, ["a", "b", "c", "d"]), patient_interval(0.5, slopes, [None] * 4)
    assert known == unknown and known[0] < 0.5 < known[1]
    together = patient_interval(0.5, slopes, ["a", "a", "b", "b"])
    assert np.isnan(together).all()  # each patient's images cancel: nothing scatters
    assert np.isnan(patient_interval(0.5, slopes, ["a"] * 4)).all()
    low, high = patient_interval(0.98, slopes, ["a", "b", "c", "d"])
    assert 0 < low < 0.98 < high < 1 and high - 0.98 < 0.98 - low
