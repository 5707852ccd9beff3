"""The report of a study whose artifacts lie in a store: what it reads there, and what it shows of the images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.finished_study import SHADES, fields, make, pixels

from medssl.datasets.read import stored_images
from medssl.errors import DataError, RecipeError
from medssl.leftovers import needs, remember
from medssl.metrics import average_precision
from medssl.pictures import MAP_POINTS, confident_mistakes, embedding_maps, tsne
from medssl.recipe import Recipe
from medssl.results import _collect, build_report, read_probabilities, report_name
from medssl.stages.report_facts import feeding
from medssl.study import Study


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture(scope="module")
def study(place: Path) -> Study:
    return make(place)


def test_a_metric_that_an_evaluation_lacks_is_computed_from_its_predictions(study: Study) -> None:
    run = _collect(study)["random", "probe"]
    cell = next(c for c in study.specs.cells() if c.arm.name == "random" and c.pretraining_seed == 1)
    specs = study.evaluations(cell)
    assert specs is not None and "average_precision" not in study.markers([specs[1]])[0].facts["scores"]
    probabilities = read_probabilities(study.store, specs[1].name).astype(float)
    assert run.metrics["average_precision"][1, 0, 1] == average_precision(probabilities, run.labels_N)
    assert not np.isnan(run.metrics["average_precision"]).any()


def test_the_report_holds_what_the_predictions_say(place: Path) -> None:
    report = {"subgroups": ["site"], "smallest_group": 9, "decision_class": "b", "deployment_prior": {"a": 9, "b": 1}}
    study = make(place, {"report": report, "study": "judged"})
    result = build_report(study)
    saved = study.store.sub("studies/judged")
    html = saved.read("report.html").decode()
    for title in ("Can the probabilities be believed?", "Per patient and per bag", "Subgroups", "What the features look like"):
        assert f"<h2>{title}</h2>" in html
    assert "most confident mistakes" not in html  # images stand in no report that was not told to show them
    frame = pd.read_csv(io.BytesIO(saved.read("class_scores.csv")))
    assert frame.groupby(["arm", "protocol"], sort=False).size().to_dict() == {
        ("random", "probe"): 2, ("colour", "probe"): 2, ("random", "tune"): 2,
    }  # fmt: skip
    assert set(pd.read_csv(io.BytesIO(saved.read("subgroups.csv")))["group"]) == {"site 0", "site 1", "site 2"}
    assert json.loads(saved.read("result.json"))["summary"] and set(result.summary["metric"]) == set(study.recipe.metrics)


def test_maps_are_of_the_judged_images_and_can_be_left_out(study: Study, place: Path) -> None:
    maps = embedding_maps(study)
    judged = study.specs.rows("test")
    assert list(maps) == ["random", "colour"]
    for found in maps.values():
        np.testing.assert_array_equal(found.labels_N, study.specs.labels(judged))
        assert found.points_N2.shape == (len(judged), 2) and len(judged) < MAP_POINTS
    assert embedding_maps(make(place, {"report": {"embedding_map": False}})) == {}
    tuned = [protocol.canonical() for protocol in study.recipe.protocols if protocol.kind == "fine_tune"]
    assert embedding_maps(make(place, {"protocols": tuned, "arms": [{"name": "random"}]})) == {}


def test_tsne_keeps_near_ones_near_and_is_always_the_same() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 90)
    features = rng.normal(size=(90, 40)) + 3 * rng.normal(size=(3, 40))[group]
    features[:, 0] = 7.0  # a dead unit
    points = tsne(features)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(90, np.inf))
    assert (group[distances.argmin(1)] == group).mean() > 0.95
    np.testing.assert_array_equal(tsne(features), points)
    assert np.isfinite(tsne(features[:10])).all()
    with pytest.raises(ValueError, match="9 images: a map needs 10 or more"):
        tsne(features[:9])


def test_mistakes_are_the_surest_ones_with_their_own_pictures(place: Path, study: Study) -> None:
    shown = make(place, {"report": {"images": True}})
    runs = _collect(shown)
    assert confident_mistakes(study, runs, "probe") == {}
    found = confident_mistakes(shown, runs, "probe")
    assert list(found) == ["random", "colour"]
    index = shown.specs.index.set_index("image_id")
    for arm, mistakes in found.items():
        mean = runs[arm, "probe"].probabilities_PDSNK.astype(float).mean(axis=(0, 1, 2))
        labels = runs[arm, "probe"].labels_N
        wrong = sorted((p.max() for p, k in zip(mean, labels, strict=True) if p.argmax() != k), reverse=True)
        np.testing.assert_allclose([m.confidence for m in mistakes], wrong[:8])
        for mistake in mistakes:
            assert index.loc[mistake.image_id, "label"] == mistake.label != mistake.predicted
            picture = pixels(mistake.png)
            assert picture.shape == (96, 96, 3)
            assert picture[48, 48].tolist() == [SHADES[mistake.label], int(mistake.image_id), int(mistake.image_id)]
            assert picture[2, 48].tolist() == [0, 0, 0]  # padded, not squashed


def test_no_picture_of_the_dataset_stands_in_a_report_that_was_not_told_to_show_them(place: Path) -> None:
    learner = {"name": "bt", "objective": {"name": "barlow_twins", "projector": [8, 8]}, "epochs": 1, "batch_size": 8}
    changes = {"arms": [*fields()["arms"], learner], "protocols": fields()["protocols"][:1], "study": "pictured"}
    for images in (False, True):
        study = make(place, changes | {"report": {"images": images}})
        assert [spec.stage for arm, _, spec in study.encoders() if arm.name == "bt"] == ["pretrain"] * 2
        build_report(study)
        html = study.store.read("studies/pictured/report.html").decode()
        assert ("<img" in html) == images
        for title in ("Augmented views", "The most confident mistakes"):
            assert (f"<h2>{title}</h2>" in html) == images


def test_what_a_report_shows_names_no_artifact_but_the_report(place: Path, study: Study) -> None:
    shown = make(place, {"report": {"images": True}})
    assert shown.report_name() != study.report_name()
    assert needs(shown)[0] - {shown.report_name()} <= needs(study)[0]


def test_files_of_an_earlier_recipe_go_and_what_is_the_studys_own_stays(place: Path) -> None:
    clinic = place / "clinic.csv"
    index = make(place).specs.index
    pd.DataFrame({"image_id": index["image_id"], "p_a": 0.5, "p_b": 0.5}).to_csv(clinic, index=False)
    outside = {"arms": [*fields()["arms"], {"name": "clinic", "predictions": str(clinic)}], "study": "changed"}
    study = make(place, outside)
    remember(study)
    saved = study.store.sub("studies/changed")
    saved.write("usage/20300101T000000Z-00000000.json", b"{}")
    build_report(study)
    before = {entry.key for entry in saved.list()}
    assert {"outside/clinic.csv", "planned.json", "wanted.json", "current.json", "arms/colour.json"} <= before
    build_report(make(place, {"arms": fields()["arms"][:1], "study": "changed"}))
    assert {entry.key for entry in saved.list()} == before - {"outside/clinic.csv", "arms/colour.json"}


def test_stored_images_are_those_of_their_rows(study: Study) -> None:
    rows = [3, 36, 37, 79]
    found = stored_images(study.dataset, rows)
    assert sorted(found) == rows
    for row, data in found.items():
        assert pixels(data)[0, 0, 1] == int(study.specs.index["image_id"][row])
    assert stored_images(study.dataset, []) == {}


def test_a_column_that_is_not_there_is_refused_before_work_starts(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"report.subgroups names column 'sitee': did you mean 'site'\?"):
        make(place, {"report": {"subgroups": ["sitee"]}})


def test_a_shard_that_is_gone_is_one_line(place: Path) -> None:
    moved = make(place)
    moved.dataset.card["shards"][1]["path"] = "shards/gone.parquet"
    with pytest.raises(DataError, match=r"shard shards/gone.parquet of .* is gone"):
        stored_images(moved.dataset, [79])


def test_hours_are_steps_at_the_mean_time_of_the_logged_ones() -> None:
    recipe = Recipe.model_validate({
        "study": "s", "dataset": "d", "protocols": [{"name": "probe", "kind": "linear_probe"}],
        "arms": [{"name": "a", "objective": {"name": "simclr"}, "epochs": 1, "batch_size": 90}],
    })  # fmt: skip
    rates = [None, 45.0, None, 90.0]
    history = pd.DataFrame({"seed": [0, 0, 1, 1], "images_per_second": rates, "data_wait_share": [None, 0.1, None, 0.3]})
    [row] = feeding(recipe, {"a": history}).to_dict("records")
    assert row["hours"] == pytest.approx(4 * (2 + 1) / 2 / 3600) and row["pretrainings"] == 2


def test_a_report_is_named_by_its_subgroups_also_where_some_are_not_known() -> None:
    recipe = Recipe.model_validate({
        "study": "s", "dataset": "d", "arms": [{"name": "random"}], "protocols": [{"name": "probe", "kind": "linear_probe"}],
        "report": {"subgroups": ["sex", "age"]},
    })  # fmt: skip
    index = pd.DataFrame({
        "split": ["test"] * 3,
        "sex": pd.array(["f", None, "m"], dtype="str"),
        "age": pd.array([40.0, None, 50.0], dtype="Float64"),
    })
    names = [report_name(recipe, [], {}, index), report_name(recipe, [], {}, index.assign(sex=["f", "x", "m"]))]
    names.append(report_name(recipe, [], {}, index.assign(age=[40.0, 1.0, 50.0])))
    assert len(set(names)) == 3
