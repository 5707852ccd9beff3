"""Finished classifiers on a shifted set, without Ray: what its features have to match, and what may change around them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from tests.stages.test_search_rows import POINT, RECIPE, Ready, study

from medssl.artifacts import folder
from medssl.errors import DataError
from medssl.recipe import Recipe
from medssl.stages import evaluate, transfer
from medssl.stages.context import Context, Opened
from medssl.stages.encode import _npy
from medssl.stages.specs import Spec, Specs

JUDGED = ["i010", "i020", "i030", "i040"]


def away(*training: str) -> pd.DataFrame:
    """The index of another dataset: four test images, and training images among them, by image id."""
    ids = sorted([*JUDGED, *training])
    columns = {"image_id": ids, "sha256": [f"away {name}" for name in ids], "patient_id": ids}
    labels = ["ab"[int(name[1:]) // 10 % 2] for name in ids]
    return pd.DataFrame({**columns, "label": labels, "split": ["test" if name in JUDGED else "train" for name in ids]})


def specs_with(opened: Opened, index: pd.DataFrame) -> Specs:
    fields = RECIPE.canonical() | {"shifted": [{"name": "away", "dataset": "away"}]}
    return Specs(Recipe.model_validate(fields), opened.specs.index, ["a", "b"], others={"away": index})


def judge(opened: Opened, index: pd.DataFrame, features: Spec, evaluation: Spec) -> pd.DataFrame:
    """Predictions of one head seed on the judged images of `index`."""
    shifted = specs_with(opened, index).shifted["away"]
    there = replace(opened, specs=Specs(RECIPE, index, ["a", "b"]))
    spec = Spec("transfer", {}, {"evaluation": evaluation.name}, f"{evaluation.label} on away")
    task = transfer.TransferTask(
        cast(Context, Ready(there)), {evaluation.name: spec}, features.name, shifted.rows.tolist(), shifted.labels_N.tolist(),
        shifted.shared, {evaluation.name: evaluation.config["seed"]},
    )  # fmt: skip
    transfer.transfer(task)
    return pd.read_parquet(io.BytesIO(folder(opened.store, spec.name).read("predictions.parquet")))


@pytest.mark.parametrize("training", [(), ("i005", "i015", "i025")])
def test_features_stay_of_use_when_images_around_the_judged_ones_come_or_go(tmp_path: Path, training: tuple[str, ...]) -> None:
    """Training images of the shifted dataset move its test images' row numbers, which no name of an artifact covers."""
    opened = study(tmp_path)
    evaluations = {seed: Spec("evaluate", {"seed": seed}, {}, f"head seed {seed}") for seed in range(2)}
    context = cast(Context, Ready(opened))
    evaluate.evaluate(evaluate.EvaluateTask(context, "colour", "probe", 0, 0, evaluations, "embed-0", None, POINT))
    before, after = away("i000", "i035"), away(*training)
    names, rows = [], []
    for index in (before, after):
        specs = specs_with(opened, index)
        shifted = specs.shifted["away"]
        names.append(specs.shifted_features(RECIPE.arms[0], 0, shifted, None))
        rows.append(shifted.rows)
    assert names[0].name == names[1].name and rows[0].tolist() != rows[1].tolist()
    features = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    for file, array in (("rows", rows[0]), ("features", features)):
        folder(opened.store, names[0].name).write(f"{file}.npy", _npy(array))
    first, second = judge(opened, before, names[0], evaluations[0]), judge(opened, after, names[1], evaluations[1])
    assert first["image_id"].tolist() == second["image_id"].tolist() == JUDGED
    again = transfer._probabilities(opened, evaluations[0].name, names[1].name, rows[1])[1]
    np.testing.assert_allclose(again, first[["p_0", "p_1"]].to_numpy(), rtol=1e-6)
    with pytest.raises(DataError, match=r"features of 4 images, and the shifted set has 3: run the study again"):
        transfer._probabilities(opened, evaluations[0].name, names[1].name, rows[1][:3])
