"""Which images of another dataset are judged, in which classes, and what becomes of the probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from medssl.errors import DataError, RecipeError
from medssl.recipe import Recipe
from medssl.shifted import ShiftedParams, ShiftedSet, restrict, shifted_set

OWN = pd.DataFrame({"sha256": ["a", "b", "c"], "split": ["train", "val", "test"]})
CLASSES = ["bkl", "mel", "nv"]
OTHER = pd.DataFrame(
    [
        ("1", "melanoma", "test", "p1"), ("2", "nevus", "test", None), ("3", "nevus", "train", "p2"), ("4", "scar", "test", "p3"),
        ("a", "nevus", "test", "p4"), ("5", None, "test", "p5"), ("6", "blue nevus", "test", "p1"), ("c", "scar", "test", "p6"),
    ],
    columns=["sha256", "label", "split", "patient_id"],
)  # fmt: skip
NAMES = {"melanoma": "mel", "nevus": "nv", "blue nevus": "nv"}


def found(classes: dict[str, str] | None = NAMES, splits: tuple[str, ...] = ("test",), index: pd.DataFrame = OTHER) -> ShiftedSet:
    params = ShiftedParams(name="isic", dataset="datasets/isic", splits=splits, classes=classes)
    return shifted_set(params, "datasets/isic", index, OWN, CLASSES)


def test_images_of_shared_classes_that_the_study_does_not_have_are_judged() -> None:
    judged = found()
    assert judged.rows.tolist() == [0, 1, 6] and judged.shared == ["mel", "nv"] and judged.columns_C == [1, 2]
    assert judged.labels_N.tolist() == [0, 1, 1] and judged.patients_N == ["p1", None, "p1"]
    assert judged.other_classes == 2 and judged.known == 2  # scar and no label; the study's own a and c
    assert judged.protocol("knn") == "knn on isic"
    assert found(splits=("train", "test")).rows.tolist() == [0, 1, 2, 6]


def test_classes_of_the_same_name_need_no_words() -> None:
    renamed = OTHER.assign(label=OTHER["label"].replace(NAMES))
    assert found(None, index=renamed).rows.tolist() == [0, 1, 6]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": {"melanom": "mel"}}, "classes names 'melanom', which datasets/isic does not have: did you mean 'melanoma'"),
        ({"classes": {"melanoma": "mels"}}, "gives 'mels' for 'melanoma': did you mean 'mel'"),
        ({"classes": {"melanoma": "mel"}}, "has only mel in test: name the study's class for each of its own (blue nevus, mel"),
        ({"classes": None}, "of the study's classes (bkl, mel, nv) datasets/isic has none"),
    ],
)
def test_a_set_that_cannot_be_judged_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        found(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no images in split 'val'"):
        found(splits=("val",))


def test_probabilities_are_those_given_one_of_the_classes() -> None:
    rng = np.random.default_rng(0)
    logits_NK = rng.normal(size=(50, 5))
    whole_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(1, keepdims=True)
    chosen_NC = np.exp(logits_NK[:, [1, 4]])
    np.testing.assert_allclose(restrict(whole_NK, [1, 4]), chosen_NC / chosen_NC.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(restrict(np.array([[1.0, 0.0, 0.0]], np.float32), [1, 2]), [[0.5, 0.5]])


ON_ISIC = {"better": "random", "than": "colour", "protocol": "probe", "shifted": "isic"}


def recipe(**changes: Any) -> Recipe:
    tuned = {"name": "tuned", "kind": "fine_tune", "head_seeds": 2, "training": {"keep_weights": "all"}}
    probe = {"name": "probe", "kind": "linear_probe"}
    fields = {"study": "s", "dataset": "datasets/own", "arms": [{"name": "random"}, {"name": "colour", "features": "colour"}]}
    return Recipe.model_validate(
        fields | {"protocols": [probe, tuned], "shifted": [{"name": "isic", "dataset": "datasets/isic"}]} | changes
    )


def test_a_comparison_on_a_shifted_set_is_another_claim() -> None:
    claims = [{**ON_ISIC, "shifted": name} for name in (None, "isic")]
    home, away = recipe(comparisons=claims).comparisons
    assert home.claim[2] == "probe" and away.claim[2] == "probe on isic"
    with pytest.raises(ValidationError, match="two comparisons claim random over colour under probe on isic"):
        recipe(comparisons=[claims[1], claims[1]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"comparisons": [{"better": "random", "than": "colour", "protocol": "knn", "shifted": "isic"}]}, "names protocol 'knn'"),
        ({"comparisons": [ON_ISIC | {"shifted": "isik"}]}, "did you mean 'isic'"),
        ({"protocols": [{"name": "tuned", "kind": "fine_tune"}]}, "set training.keep_weights to all"),
        ({"shifted": [{"name": "own", "dataset": "datasets/own"}]}, "the study's own dataset"),
        ({"shifted": [{"name": "isic", "dataset": "a"}, {"name": "isic", "dataset": "b"}]}, "two shifted sets are named 'isic'"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words.replace("'", ".")):
        recipe(**changes)
