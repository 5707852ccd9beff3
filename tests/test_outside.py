"""Arms that are predictions from a file: read and refused, judged and tested beside the others."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sklearn.metrics import balanced_accuracy_score
from tests.finished_study import fields, make

from medssl.errors import DataError
from medssl.outside import OutsideParams, read_predictions
from medssl.recipe import Recipe
from medssl.results import build_report
from medssl.statistics import nested_bootstrap
from medssl.study import Study

CLASSES, IDS = ["mel", "nv"], ["a", "b", "c"]
TABLE = pd.DataFrame({"image_id": ["c", "a", "b", "x"], "p_mel": [0.2, 0.7, 0.5, 1.0], "nv": [0.8, 0.3, 0.4995, 0.0]})


def read(table: pd.DataFrame, name: str = "clinic.csv") -> np.ndarray:
    content = table.to_parquet(index=False) if name.endswith(".parquet") else table.to_csv(index=False).encode()
    return read_predictions(OutsideParams(name="clinic", predictions=name), content, IDS, CLASSES).probabilities_MNK


@pytest.mark.parametrize("name", ["clinic.csv", "clinic.parquet"])
def test_predictions_are_those_of_the_judged_images_in_order(name: str) -> None:
    found = read(TABLE, name)
    np.testing.assert_allclose(found, [[[0.7, 0.3], [0.5 / 0.9995, 0.4995 / 0.9995], [0.2, 0.8]]], rtol=1e-6)
    second = TABLE.assign(p_mel=TABLE["nv"], nv=TABLE["p_mel"])
    both = read(pd.concat([TABLE.assign(model="m1"), second.assign(model="m0")]), name)
    np.testing.assert_allclose(both, [found[0][:, ::-1], found[0]], rtol=1e-6)
    numbers = TABLE.assign(image_id=[3, 1, 2, 9])
    params = OutsideParams(name="clinic", predictions="clinic.csv")
    given = read_predictions(params, numbers.to_csv(index=False).encode(), ["1", "2", "3"], CLASSES)
    assert np.array_equal(given.probabilities_MNK, found)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (TABLE.rename(columns={"image_id": "image"}), "have no column image_id; their columns: image, p_mel, nv"),
        (TABLE.rename(columns={"nv": "nvv"}), "no column for class 'nv' (p_nv)"),
        (TABLE.assign(nv=["a", "b", "c", "d"]), "column nv of the predictions of arm 'clinic' (clinic.csv) holds 'a', not num"),
        (pd.concat([TABLE, TABLE[:1]]), "have image 'c' twice: give each image once, or tell models apart in a column 'model'"),
        (TABLE[TABLE["image_id"] != "b"], "lack 1 of 3 judged images, the first is 'b'"),
        (TABLE.assign(nv=[0.8, 0.35, 0.5, 0.0]), "image 'a' has 0.7, 0.35, which are no probabilities"),
        (TABLE.assign(nv=[-0.1, 0.3, 0.5, 0.0], p_mel=[1.1, 0.7, 0.5, 1.0]), "image 'c' has 1.1, -0.1, which are no"),
        (TABLE.assign(nv=[np.nan, 0.3, 0.5, 0.0]), "image 'c' has 0.2, nan, which are no probabilities"),
    ],
)
def test_what_is_no_prediction_is_refused_in_a_line(table: pd.DataFrame, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(table)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_table() -> None:
    with pytest.raises(DataError, match=r"cannot be read .*ends in .parquet"):
        read_predictions(OutsideParams(name="clinic", predictions="x.parquet"), b"image_id,a\n", IDS, CLASSES)


def with_outside(path: Path, **changes: Any) -> dict[str, Any]:
    arms = [*fields()["arms"], {"name": "clinic", "predictions": str(path)}]
    pairs = (("random", "clinic"), ("clinic", "colour"))
    claims = [{"better": better, "than": than, "protocol": "probe"} for better, than in pairs]
    return {"arms": arms, "comparisons": claims} | changes


def test_recipes_that_name_it() -> None:
    recipe = Recipe.model_validate(fields(**with_outside(Path("clinic.csv"))))
    assert [arm.name for arm in recipe.arms] == ["random", "colour"] and recipe.outside[0].name == "clinic"
    assert Recipe.model_validate(recipe.canonical()) == recipe
    with pytest.raises(ValidationError, match="two arms are named 'clinic'"):
        Recipe.model_validate(fields(arms=[{"name": "clinic"}, {"name": "clinic", "predictions": "a.csv"}]))
    with pytest.raises(ValidationError, match=r"epochs"):
        Recipe.model_validate(fields(arms=[{"name": "random"}, {"name": "clinic", "predictions": "a.csv", "epochs": 5}]))
    away = {"shifted": [{"name": "away", "dataset": "datasets/other"}], "protocols": fields()["protocols"][:1]}
    claim = {"better": "random", "than": "clinic", "protocol": "probe", "shifted": "away"}
    with pytest.raises(ValidationError, match="predictions of the study's own images"):
        Recipe.model_validate(fields(**with_outside(Path("a.csv"), comparisons=[claim], **away)))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two models from outside, one right in four of five images, the other guessing."""
    place = tmp_path_factory.mktemp("outside")
    index = make(place).specs.index
    rng = np.random.default_rng(3)
    tables = []
    for model, skill in (("good", 0.8), ("guess", 0.5)):
        right = rng.random(len(index)) < skill
        sure = rng.uniform(0.5, 1, len(index))
        of_a = np.where((index["label"] == "a") == right, sure, 1 - sure)
        tables.append(pd.DataFrame({"image_id": index["image_id"], "p_a": of_a, "p_b": 1 - of_a, "model": model}))
    pd.concat(tables).to_csv(place / "clinic.csv", index=False)
    return make(place, with_outside(place / "clinic.csv", repeats={"pretraining_seeds": 2, "label_draws": 2, "labels": 12}))


def test_it_is_judged_and_tested_like_the_others(study: Study) -> None:
    result = build_report(study)
    rows, table = study.specs.rows("test"), pd.read_csv(study.outside["clinic"].params.predictions, dtype={"image_id": str})
    labels, expected = study.specs.labels(rows), []
    for _, mine in table.groupby("model"):
        ordered = mine.set_index("image_id").loc[study.specs.index["image_id"].iloc[rows]]
        expected.append(balanced_accuracy_score(labels, (ordered["p_b"] > ordered["p_a"]).astype(int)))
    scores = result.scores.set_index(["arm", "protocol", "metric"])
    for protocol in ("probe", "tune"):
        mine = scores.loc[("clinic", protocol, "balanced_accuracy")]
        np.testing.assert_allclose(mine["value"], expected)
    found = result.comparisons.query("than == 'clinic' and test == 'nested bootstrap'").iloc[0]
    own = study.outside["clinic"].probabilities_MNK[:, None, None]
    runs = [  # the outside models stand for themselves under every label draw
        np.stack([np.stack([np.stack([read_run(study, p, d, s) for s in range(2)]) for d in range(2)]) for p in range(2)]),
        np.concatenate([own, own], axis=1),
    ]
    patients = study.specs.index["patient_id"].iloc[rows].tolist()
    theirs = nested_bootstrap(*runs, labels, patients, metric="balanced_accuracy", replicates=2000, confidence=0.95, seed=0)
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((theirs.difference, theirs.low, theirs.high))


def read_run(study: Study, p: int, d: int, s: int) -> np.ndarray:
    from medssl.results import read_probabilities

    cells = [cell for cell in study.specs.cells() if (cell.arm.name, cell.protocol.name) == ("random", "probe")]
    cell = next(cell for cell in cells if (cell.pretraining_seed, cell.label_draw) == (p, d))
    return read_probabilities(study.store, (study.evaluations(cell) or {})[s].name)


def test_the_report_says_where_it_is_from_and_keeps_it(study: Study) -> None:
    build_report(study)
    text = study.store.read("studies/finished/report.md").decode()
    digest = study.outside["clinic"].digest[:16]
    assert f"2 models (SHA-256 {digest})" in text and "clinic has" not in text
    given = Path(study.outside["clinic"].params.predictions).read_bytes()
    assert hashlib.sha256(given).hexdigest().startswith(digest)
    kept = pd.read_csv(io.BytesIO(study.store.read("studies/finished/outside/clinic.csv")), dtype={"image_id": str})
    judged = set(study.specs.index["image_id"].iloc[study.specs.rows("test")])
    assert set(kept["image_id"]) == judged and len(kept) == 2 * len(judged)


@pytest.mark.parametrize("name", ["clinic.csv", "clinic.parquet"])
def test_what_is_kept_of_a_file_are_the_judged_images_and_what_is_read_of_them(name: str) -> None:
    table = TABLE.assign(model="m", diagnosis_of="a patient", p_other=[0.1, 0.2, 0.3, 0.4])
    table = pd.concat([table, table.assign(model="n", p_mel=table["nv"], nv=table["p_mel"])])
    content = table.to_parquet(index=False) if name.endswith(".parquet") else table.to_csv(index=False).encode()
    params = OutsideParams(name="clinic", predictions=name)
    found = read_predictions(params, content, IDS, CLASSES)
    again = read_predictions(params, found.content, IDS, CLASSES)
    np.testing.assert_array_equal(again.probabilities_MNK, found.probabilities_MNK)
    assert found.digest == hashlib.sha256(content).hexdigest()
    kept = (pd.read_parquet if name.endswith(".parquet") else pd.read_csv)(io.BytesIO(found.content))
    assert list(kept.columns) == ["image_id", "p_mel", "nv", "model"] and sorted(kept["image_id"]) == sorted(IDS * 2)
