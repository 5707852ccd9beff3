"""A study of several findings an image through the command line: judged, predicted, shifted, from outside, and refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny

from medssl import metrics
from medssl.artifacts import finished
from medssl.datasets.synthetic import PATTERNS, write_synthetic
from medssl.errors import MedsslError
from medssl.store import Store, open_store
from medssl.study import plan

pytestmark = pytest.mark.ray
NAMES = ["first", "common"]


def draw(folder: Path, images: int, seed: int, names: list[str]) -> Path:
    """A table without classes and with two findings, of which some are uncertain or not mentioned."""
    table = write_synthetic(folder, images=images, seed=seed)
    rows, patterns = pd.read_csv(table), list(PATTERNS)
    rng = np.random.default_rng(seed)
    for name, having in zip(names, (patterns[:1], patterns[1:3]), strict=True):
        said = rows["label"].isin(having).astype(float)
        rows[name] = said.where(rng.random(len(rows)) > 0.15, np.where(rng.random(len(rows)) < 0.5, -1.0, np.nan))
    rows.drop(columns="label").to_csv(table, index=False)
    return table


def recipe(**changes: Any) -> dict[str, Any]:
    """One short pretraining beside random weights and colour, every kind of protocol."""
    whole = tiny.recipe()
    fixed = {"learning_rate": [0.01], "weight_decay": [0.01]}
    tuned = {"epochs": 2, "keep_weights": "all", "early_stopping": {"patience": 1}, "watched": "loss", "label_smoothing": 0.1}
    return whole | {
        "study": "findings", "findings": {"names": NAMES, "uncertain": "ones", "missing": "ignore"},
        "repeats": {"pretraining_seeds": 1, "label_draws": 2, "labels": 60},
        "protocols": [
            whole["protocols"][0] | {"search": {"learning_rate": [0.001, 0.05], "weight_decay": [0.01], "metric": "auc"}},
            {"name": "mlp", "kind": "mlp_probe", "head_seeds": 2, "label_draws": 1, "probe": {"epochs": 5, "hidden": 16},
             "search": fixed},
            {"name": "knn", "kind": "knn", "label_draws": 1, "probe": {"k": 10}},
            whole["protocols"][1] | {"training": tuned, "head_seeds": 1},
        ],
        "metrics": ["auc", "balanced_accuracy", "f1_macro", "average_precision", "expected_calibration_error"],
        "comparisons": [{"better": "barlow_twins", "than": "random", "protocol": "linear_probe", "metric": "auc"}],
        "report": {"decision_class": "first", "subgroups": ["sex"], "smallest_group": 5, "images": True},
        "compute": {"workers": 1, "monitor_every_epochs": 1, "concurrent_trials": 1},
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def place(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the study run once, and its tables."""
    place = tmp_path_factory.mktemp("findings")
    for name, images, seed, names in (("lesions", 150, 0, NAMES), ("away", 60, 7, ["ring", "common"])):
        table = draw(place / name, images, seed, names)
        to = ["--to", str(place / "store" / "datasets" / name), "--patient-column", "patient_id", "--findings", ",".join(names)]
        tiny.medssl("ingest", str(table), *to)
    whole = recipe(shifted=[{"name": "clinic", "dataset": "datasets/away", "classes": {"ring": "first", "common": "common"}}])
    path = tiny.write(place / "study.yaml", whole)
    (place / "result.json").write_text(tiny.medssl("run", str(path), "--store", str(place / "store"), "--json").stdout)
    return place


@pytest.fixture(scope="module")
def store(place: Path) -> Store:
    return open_store(str(place / "store"))


def predictions(store: Store, arm: str, protocol: str) -> tuple[str, pd.DataFrame]:
    """Name of the first evaluation of an arm under a protocol, and what it stored."""
    index = json.loads(store.read(f"studies/findings/arms/{arm}.json"))
    name = next(r["artifact"] for r in index["evaluations"] if r["protocol"] == protocol and r["seed"] == 0)
    return name, pd.read_parquet(io.BytesIO(store.read(f"artifacts/{name}/predictions.parquet")))


def test_scores_are_those_of_the_stored_predictions_against_the_table(place: Path, store: Store) -> None:
    truth = pd.read_csv(place / "lesions" / "table.csv" if (place / "lesions" / "table.csv").exists() else
                        next((place / "lesions").glob("*.csv")))  # fmt: skip
    truth = truth.assign(image_id=[Path(p).stem for p in truth["image"]]).set_index("image_id")
    result = json.loads((place / "result.json").read_text())
    for protocol in ("linear_probe", "mlp", "knn", "fine_tune"):
        name, stored = predictions(store, "random", protocol)
        said = truth.loc[stored["image_id"], NAMES].to_numpy()
        labels = np.where(np.isin(said, (0, 1)), said, metrics.UNKNOWN).astype(int)  # an uncertain one is no truth
        kept = stored[["y_0", "y_1"]].astype("float").fillna(metrics.UNKNOWN).to_numpy().astype(int)
        assert (kept == labels).all() and (labels == metrics.UNKNOWN).any()
        facts = json.loads(store.read(f"markers/{name}.json"))["facts"]
        p = stored[["p_0", "p_1"]].to_numpy(float)
        assert np.abs(p.sum(axis=1) - 1).max() > 0.05 and facts["temperature"] > 0
        for metric in ("auc", "f1_macro"):
            value = metrics.SCORES[metric](p, labels, None)
            assert facts["scores"][metric] == pytest.approx(value, abs=1e-9)
            row = next(a for a in result["arms"] if (a["arm"], a["protocol"], a["metric"]) == ("random", protocol, metric))
            assert any(v == pytest.approx(value, abs=1e-9) for v in row["values"])


def test_predict_gives_every_findings_probability(place: Path, store: Store) -> None:
    for arm, protocol in (("colour", "linear_probe"), ("barlow_twins", "mlp"), ("random", "fine_tune")):
        name, stored = predictions(store, arm, protocol)
        out = place / "new.csv"
        tiny.medssl("predict", name, str(place / "lesions"), "--out", str(out), "--store", str(place / "store"))
        new = pd.read_csv(out, keep_default_na=False)
        new["image_id"] = [Path(p).stem for p in new["image"]]
        both = stored.merge(new, on="image_id", validate="one_to_one")
        assert len(both) == len(stored) > 20
        np.testing.assert_allclose(both[["p_0", "p_1"]], both[["p_first", "p_common"]], atol=1e-5)
        for _, row in new.iterrows():
            assert row["predicted"] == "|".join(n for n in NAMES if float(row[f"p_{n}"]) > 0.5)


def test_report_speaks_of_findings(store: Store) -> None:
    text = store.read("studies/findings/report.md").decode()
    for words in (
        "Finding by finding", "AUC of every finding", "not known", "averaged over the findings", "decision", "by sex", "clinic:",
    ):  # fmt: skip
        assert words.lower() in text.lower(), words
    assert "named no " in store.read("studies/findings/report.html").decode()  # of a confident mistake
    assert "Class by class" not in text and "confusion matri" not in text.lower()
    areas = pd.read_csv(io.BytesIO(store.read("studies/findings/class_scores.csv")))
    calls = pd.read_csv(io.BytesIO(store.read("studies/findings/finding_calls.csv")))
    assert set(areas["class"]) == set(calls["finding"]) == set(NAMES)
    _, stored = predictions(store, "random", "knn")
    mine = calls[(calls["arm"] == "random") & (calls["protocol"] == "knn") & (calls["finding"] == "first")].iloc[0]
    known = stored["y_0"].notna()
    assert mine["hits"] == ((stored["p_0"] > 0.5) & (stored["y_0"] == 1))[known].sum()
    assert mine[["hits", "misses", "false_alarms", "rejections"]].sum() == known.sum()


def test_findings_elsewhere_are_judged_by_the_names_they_have_there(place: Path, store: Store) -> None:
    result = json.loads((place / "result.json").read_text())
    away = [a for a in result["arms"] if a["protocol"] == "linear_probe on clinic" and a["metric"] == "auc"]
    assert {a["arm"] for a in away} == {"barlow_twins", "random", "colour"} and all(0 < a["mean"] < 1 for a in away)
    frame = pd.read_csv(io.BytesIO(store.read("studies/findings/shifted.csv")))
    assert set(frame["protocol"]) == {"linear_probe", "mlp", "knn", "fine_tune"}


def test_the_policy_is_part_of_what_an_evaluation_is(place: Path, store: Store) -> None:
    """Another policy trains other heads and no other encoder; predictions of findings come in from a file too."""
    before = finished(store)
    _, stored = predictions(store, "random", "knn")
    given = pd.DataFrame({"image_id": stored["image_id"], "first": 0.9, "common": 0.8})
    given.to_csv(place / "outside.csv", index=False)
    fields = recipe(study="zeros", findings={"names": NAMES, "uncertain": "zeros"}, report={})
    fields["arms"] = [fields["arms"][1], {"name": "outside", "predictions": str(place / "outside.csv")}]
    fields["protocols"], fields["comparisons"] = fields["protocols"][:1], []
    path = tiny.write(place / "zeros.yaml", fields)
    done = json.loads(tiny.medssl("run", str(path), "--store", str(place / "store"), "--json").stdout)
    made = {name.rpartition("-")[0] for name in finished(store) - before}
    assert "evaluate" in made and not made & {"pretrain", "initialise", "embed"}
    auc = next(a for a in done["arms"] if a["arm"] == "outside" and a["metric"] == "auc")
    assert auc["mean"] == 0.5
    given.assign(first=1.2).to_csv(place / "outside.csv", index=False)
    refused = tiny.medssl("plan", str(path), "--store", str(place / "store"), check=False)
    assert refused.returncode and "which are no probabilities: each between 0 and 1" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"findings": {"names": ["first", "edema"]}}, "finding 'edema' is neither a further column nor a label of the images"),
        ({"findings": {"names": ["first", "first"]}}, "finding 'first' is named twice"),
        ({"findings": {"names": ["first"], "uncertain": "twos"}}, "findings.uncertain"),
        ({"findings": {"names": ["age"]}}, "finding 'age' of image 'synthetic_00001' is"),
        ({"repeats": {"pretraining_seeds": 1, "label_draws": 1, "labels": 2}}, "has no image that is known to be"),
        ({"report": {"deployment_prior": {"first": 0.5, "common": 0.5}}}, "report.deployment_prior weighs images by their class"),
        ({"report": {"decision_class": "edema"}}, "report.decision_class is 'edema'"),
    ],
)
def test_bad_recipes_of_findings_are_one_line(place: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MedsslError) as failed:
        plan(recipe(**changes), str(place / "store"))
    assert words in str(failed.value) and "\n" not in str(failed.value)


def test_over_sampling_of_findings_is_refused(place: Path) -> None:
    over, path = recipe(), place / "over.yaml"
    over["protocols"][3]["training"] = {"epochs": 1, "over_sample": True, "class_weights": "none"}
    refused = tiny.medssl("plan", str(tiny.write(path, over)), "--store", str(place / "store"), check=False)
    assert refused.returncode and "over_sample draws classes equally often" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
