"""A search never meets the test split: neither its rows nor its labels reach a trial, nor the search's name."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from medssl.artifacts import Marker, folder
from medssl.errors import DataError
from medssl.recipe import Recipe
from medssl.stages import evaluate
from medssl.stages.context import Context, Opened
from medssl.stages.specs import TEST, VALIDATION, Spec, Specs
from medssl.store import open_store

POINT = {"learning_rate": 0.01, "weight_decay": 0.01}
RECIPE = Recipe.model_validate({
    "study": "s",
    "dataset": "d",
    "arms": [{"name": "colour", "features": "colour"}],
    "repeats": {"pretraining_seeds": 1, "label_draws": 1, "labels": 60},
    "protocols": [{"name": "probe", "kind": "linear_probe", "probe": {"vary": ["head"], "epochs": 5},
                   "search": {"learning_rate": [0.001, 0.01], "weight_decay": [0.01], "head_seeds": 2}}],
})  # fmt: skip


class WatchedSpecs(Specs):
    """Specs that note every split asked for."""

    def rows(self, split: str) -> Any:
        self.__dict__.setdefault("asked", []).append(split)
        return super().rows(split)


@dataclass(frozen=True)
class Ready:
    """A context that is open already."""

    opened: Opened

    def open(self) -> Opened:
        return self.opened


def study(tmp_path: Path, *, test_labels: str = "as they are", overlap: bool = False) -> Opened:
    """150 images in three splits with features that tell their class somewhat; features of test images can be poisoned."""
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b"], size=150)
    splits = np.repeat(["train", "val", "test"], [90, 30, 30])
    if test_labels == "turned round":
        labels = np.where(splits == "test", np.where(labels == "a", "b", "a"), labels)
    index = pd.DataFrame({
        "image_id": [f"i{n:03d}" for n in range(150)], "sha256": [f"h{n}" for n in range(150)], "label": labels,
        "split": splits, "patient_id": [f"p{n}" for n in range(150)],
    })  # fmt: skip
    features = rng.normal(size=(150, 8)).astype(np.float32) + (labels == "a")[:, None]
    if test_labels == "no features":
        features[splits == "test"] = np.nan
    store = open_store(str(tmp_path / "store"), create=True)
    for name, array in (("features", features), ("rows", np.arange(150))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        folder(store, "embed-0").write(f"{name}.npy", buffer.getvalue())
    specs = WatchedSpecs(RECIPE, index, ["a", "b"])
    if overlap:
        drawn = specs.draw(0)
        index.loc[drawn[0], "split"] = VALIDATION
    return Opened(store, cast(Any, None), RECIPE, specs, cast(Any, None))


def score(opened: Opened) -> float:
    task = evaluate.SearchTask(cast(Context, Ready(opened)), Spec("search", {}, {}, "search"), "colour", "probe", "embed-0")
    return evaluate._Score(task)(POINT)


def test_a_search_is_judged_on_the_validation_split_alone(tmp_path: Path) -> None:
    opened = study(tmp_path / "a")
    found = score(opened)
    assert found > 0.6
    assert set(opened.specs.__dict__["asked"]) == {VALIDATION}
    # Neither other labels nor unusable features of the test images change it.
    assert score(study(tmp_path / "b", test_labels="no features")) == found


def test_the_rows_of_a_search_are_not_the_tests(tmp_path: Path) -> None:
    opened = study(tmp_path)
    judged, test = evaluate._judged_rows(opened, "search"), opened.specs.rows(TEST)
    assert len(np.intersect1d(judged, test)) == 0
    assert len(np.intersect1d(opened.specs.draw(0), test)) == 0
    np.testing.assert_array_equal(evaluate._judged_rows(opened, "evaluate"), test)


def test_an_image_to_train_on_is_never_judged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="splits overlap"):
        score(study(tmp_path, overlap=True))


def test_test_labels_are_no_part_of_a_searchs_name(tmp_path: Path) -> None:
    features = Marker("embed-0", "embed", 1, {}, {}, {"features.npy": "0" * 64})
    arm, protocol = RECIPE.arms[0], RECIPE.protocols[0]
    names = {
        kind: study(tmp_path / kind.replace(" ", "-"), test_labels=kind).specs.search(arm, protocol, features).name
        for kind in ("as they are", "turned round")
    }
    assert names["as they are"] == names["turned round"]
