"""Several findings an image: labels from columns, scores against scikit-learn, slopes and resamples recomputed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from medssl import metrics
from medssl.calibration import apply_temperature, brier_score, change_prior, fit_temperature, reliability
from medssl.datasets.draws import finding_draw
from medssl.datasets.findings import FindingsParams, finding_labels, finding_strata
from medssl.errors import DataError
from medssl.influence import SLOPES, mean_influence
from medssl.metrics import UNKNOWN
from medssl.statistics import nested_bootstrap
from medssl.statistics.nested import _scores

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def case(seed: int, *, unknown: bool = True, images: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels (N, F) of four findings, each there and not in some image; odd seeds have ties."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, 4)) < [0.1, 0.3, 0.5, 0.8]).astype(np.int64)
    labels[0], labels[1] = 1, 0
    logits = rng.normal(size=labels.shape) + labels
    if seed % 2:
        logits = np.round(logits) + 0.25
    if unknown:
        labels[2:][rng.random((images - 2, 4)) < 0.3] = UNKNOWN
    return 1 / (1 + np.exp(-logits)), labels


# -- labels from a dataset ---------------------------------------------------------------------------------------


def index(**columns: list[object]) -> pd.DataFrame:
    images = len(next(iter(columns.values())))
    splits = ["train"] * (images - 2) + ["val", "test"]
    labels: list[object] = [[] for _ in range(images)]
    return pd.DataFrame({"image_id": [f"i{n}" for n in range(images)], "split": splits, "labels": labels} | columns)


@pytest.mark.parametrize(("uncertain", "training"), [("ignore", UNKNOWN), ("zeros", 0), ("ones", 1)])
@pytest.mark.parametrize(("missing", "blank"), [("ignore", UNKNOWN), ("zeros", 0), ("ones", 1)])
def test_uncertain_and_missing_findings_count_as_the_recipe_says(uncertain: str, training: int, missing: str, blank: int) -> None:
    params = FindingsParams(names=("edema",), uncertain=uncertain, missing=missing)
    found = finding_labels(index(edema=[1.0, 0.0, -1.0, None, -1.0, np.nan]), params)[:, 0]
    # where images are judged nobody knows the truth of an uncertain one, whatever training takes it for
    assert found.tolist() == [1, 0, training, blank, UNKNOWN, blank]


def test_findings_are_read_from_words_numbers_and_lists_of_labels() -> None:
    table = index(edema=["1", "no", "-1.0", "", "TRUE", "uncertain"])
    table["labels"] = [["a", "b"], ["b"], [], ["none"], None, ["a"]]
    found = finding_labels(table, FindingsParams(names=("edema", "a"), missing="zeros", uncertain="ones"))
    assert found[:, 0].tolist() == [1, 0, 1, 0, 1, UNKNOWN]
    assert found[:, 1].tolist() == [1, 0, 0, 0, 0, 1]


def test_a_cell_that_says_nothing_known_is_one_line() -> None:
    with pytest.raises(DataError, match=r"finding 'edema' of image 'i1' is 2\.0: write 1 .*, 0 .*, -1 .*, or nothing"):
        finding_labels(index(edema=[1.0, 2.0, 0.0, 1.0]), FindingsParams(names=("edema",)))


def test_an_unknown_finding_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"finding 'edma' is neither .*edema"):
        finding_labels(index(edema=[1.0, 0.0, 0.0, 1.0]), FindingsParams(names=("edma",)))


def test_a_larger_draw_contains_the_smaller_one_and_leaves_unknown_images_out() -> None:
    table = index(edema=[float(n % 2) for n in range(200)])
    known = np.arange(200) % 3 > 0
    draws = [finding_draw(table, known, labels=labels, draw=0) for labels in (20, 0.5, None)]
    assert [len(draw) for draw in draws] == [20, round(known.sum() / 2), known.sum()]
    assert set(draws[0]) < set(draws[1]) < set(draws[2]) and known[draws[2]].all()
    assert set(draws[0]) != set(finding_draw(table, known, labels=20, draw=1))
    with pytest.raises(DataError, match="labels is 134, but the training split has 133 images with a known finding"):
        finding_draw(table, known, labels=134, draw=0)


# -- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_scikit_learn_where_all_is_known(seed: int) -> None:
    probabilities, labels = case(seed, unknown=False)
    named = (probabilities > 0.5).astype(int)
    columns = range(labels.shape[1])
    expected = {
        "accuracy": np.mean([sklearn_metrics.accuracy_score(labels[:, f], named[:, f]) for f in columns]),
        "balanced_accuracy": np.mean([sklearn_metrics.balanced_accuracy_score(labels[:, f], named[:, f]) for f in columns]),
        "f1_macro": sklearn_metrics.f1_score(labels, named, average="macro", zero_division=0),
        "f1_weighted": sklearn_metrics.f1_score(labels, named, average="weighted", zero_division=0),
        "auc": sklearn_metrics.roc_auc_score(labels, probabilities, average="macro"),
        "average_precision": sklearn_metrics.average_precision_score(labels, probabilities, average="macro"),
    }
    for name, value in expected.items():
        assert metrics.SCORES[name](probabilities, labels, None) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("name", metrics.SCORES)
@pytest.mark.parametrize("seed", range(8))
def test_unknown_findings_count_as_if_the_images_were_not_there(seed: int, name: str) -> None:
    probabilities, labels = case(seed)
    changed = np.where(labels == UNKNOWN, 1 - probabilities, probabilities)
    changed_score = metrics.SCORES[name](changed, labels, None)
    assert metrics.SCORES[name](probabilities, labels, None) == pytest.approx(changed_score, abs=1e-12)
    if name in ("accuracy", "balanced_accuracy", "auc"):  # of each finding a question of two classes
        each = []
        for f in range(labels.shape[1]):
            known = labels[:, f] != UNKNOWN
            p = probabilities[known, f]
            each.append(metrics.SCORES[name](np.stack([1 - p, p], 1), labels[known, f], None))
        assert metrics.SCORES[name](probabilities, labels, None) == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("name", metrics.SCORES)
def test_weights_count_an_image_as_often_as_they_say(name: str) -> None:
    probabilities, labels = case(3)
    weights = np.random.default_rng(0).integers(0, 4, len(labels)).astype(float)
    weights[:2] = 1
    often = np.repeat(np.arange(len(labels)), weights.astype(int))
    expected = metrics.SCORES[name](probabilities[often], labels[often], None)
    assert metrics.SCORES[name](probabilities, labels, weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("seed", range(6))
def test_slopes_are_the_derivative_by_each_images_weight(seed: int, name: str) -> None:
    probabilities, labels = case(seed)
    _, slopes = mean_influence(probabilities[None], labels, name)
    score, step = metrics.SCORES[name], 1e-6
    for n in range(0, len(labels), 7):
        ends = []
        for sign in (1, -1):
            weights = np.ones(len(labels))
            weights[n] += sign * step
            ends.append(score(probabilities, labels, weights))
        assert slopes[n] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6), (name, n)
    assert slopes.sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "f1_macro", "f1_weighted"])
def test_resamples_are_scored_as_the_metrics_score_them(name: str) -> None:
    probabilities, labels = case(5)
    weights = np.random.default_rng(1).integers(0, 3, (len(labels), 9)).astype(np.float32)
    weights[:2] = 1
    found = _scores(probabilities[None, None, None], labels, weights, name)[0, 0, 0]
    expected = [metrics.SCORES[name](probabilities, labels, w.astype(float)) for w in weights.T]
    assert found == pytest.approx(expected, abs=1e-6)


def test_bootstrap_of_findings_holds_the_difference_and_widens_with_fewer_patients() -> None:
    probabilities, labels = case(7, images=300)
    worse = np.clip(probabilities + np.random.default_rng(2).normal(0, 0.3, probabilities.shape), 0, 1)
    arms = [each[None, None, None].astype(np.float32) for each in (probabilities, worse)]
    found = nested_bootstrap(*arms, labels, list(range(300)), metric="auc", replicates=500)
    expected = [metrics.SCORES["auc"](each[0, 0, 0], labels, None) for each in arms]
    assert found.difference == pytest.approx(expected[0] - expected[1], abs=1e-6) and found.low < found.difference < found.high
    fewer = nested_bootstrap(*arms, labels, [n // 10 for n in range(300)], metric="auc", replicates=500)
    # the standard error over patients, from exact resamples
    rng = np.random.default_rng(3)
    exact = []
    for _ in range(300):
        drawn = rng.integers(0, 300, 300)
        exact.append(np.subtract(*[metrics.SCORES["auc"](each[0, 0, 0][drawn], labels[drawn], None) for each in arms]))
    assert found.standard_error == pytest.approx(np.std(exact), rel=0.15) and fewer.standard_error > 0


# -- probabilities -----------------------------------------------------------------------------------------------


def test_calibration_is_over_every_known_finding() -> None:
    probabilities, labels = case(2)
    known = labels != UNKNOWN
    p, y = probabilities[known], labels[known]
    assert brier_score(probabilities, labels) == pytest.approx(sklearn_metrics.brier_score_loss(y, p), abs=1e-12)
    both, found = reliability(np.stack([1 - p, p], 1), y), reliability(probabilities, labels)
    assert found.images_B.sum() == known.sum() and np.allclose(found.accuracy_B, both.accuracy_B)
    assert metrics.SCORES["expected_calibration_error"](probabilities, labels, None) == pytest.approx(both.expected_error)


def test_temperature_undoes_what_made_the_probabilities_too_sure() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(20_000, 3))
    labels = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    labels[rng.random(labels.shape) < 0.2] = UNKNOWN
    sure = 1 / (1 + np.exp(-3 * logits))
    assert fit_temperature(sure, labels) == pytest.approx(3, rel=0.05)
    assert apply_temperature(sure, 3, findings=True) == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-9)


def test_another_prior_changes_the_odds_of_each_finding_by_itself() -> None:
    probabilities = np.array([[0.5, 0.2]])
    changed = change_prior(probabilities, np.array([[1, 1], [3, 1]]), np.array([[9, 1], [3, 1]]))
    assert changed == pytest.approx(np.array([[0.1, 0.2]]))


def test_patients_have_the_mean_probability_and_what_is_known_of_one_image() -> None:
    probabilities = np.array([[0.2, 0.4], [0.4, 0.8], [0.9, 0.1]])
    labels = np.array([[1, UNKNOWN], [UNKNOWN, 0], [0, 1]])
    found, known = metrics.per_patient(probabilities, labels, ["p", "p", None])
    assert found == pytest.approx(np.array([[0.3, 0.6], [0.9, 0.1]])) and known.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match="patient 'p' has images of two classes"):
        metrics.per_patient(probabilities, labels, ["p", "p", "p"])


def test_missing_splits_are_stratified_by_the_rarest_finding() -> None:
    table = index(edema=[1.0, 1.0, 1.0, 0.0, None, -1.0], mass=[1.0, 0.0, None, 0.0, None, None])
    assert finding_strata(table, ["edema", "mass"]) == ["mass", "edema", "edema", "", None, None]
    with pytest.raises(DataError, match="finding 'oedema'"):
        finding_strata(table, ["oedema"])
