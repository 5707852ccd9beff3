"""The whole road through the command line, on a small study in a folder: what is made, skipped, recomputed and printed."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny

from medssl.artifacts import digest_json, finished, read_marker
from medssl.datasets.dataset import open_dataset
from medssl.datasets.synthetic import write_synthetic
from medssl.store import Store, open_store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def place(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def table(place: Path) -> Path:
    return tiny.ingest(place / "drawn", str(place / "store" / "datasets" / "lesions"))


def database(place: Path) -> str:
    return f"sqlite:///{place}/mlflow.db"


@pytest.fixture(scope="module")
def study(place: Path, table: Path) -> Path:
    """The recipe's file, run once."""
    path = tiny.write(place / "study.yaml", tiny.recipe())
    tracker = f"compute.tracking.mlflow={database(place)}"
    done = tiny.medssl("run", str(path), "--store", str(place / "store"), "--json", "--set", tracker)
    (place / "result.json").write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def store(place: Path, study: Path) -> Store:
    return open_store(str(place / "store"))


def stages(names: set[str]) -> Counter[str]:
    return Counter(name.rpartition("-")[0] for name in names)


def test_result_for_machines(place: Path, study: Path) -> None:
    result = json.loads((place / "result.json").read_text())
    assert set(result) == {"study", "arms", "comparisons"} and result["study"] == "tiny"
    probes = {a["arm"]: a for a in result["arms"] if a["protocol"] == "linear_probe" and a["metric"] == "balanced_accuracy"}
    assert {name: arm["n"] for name, arm in probes.items()} == {"barlow_twins": 12, "random": 12, "colour": 6}
    for arm in result["arms"]:
        assert set(arm) == {"arm", "protocol", "metric", "mean", "std", "n", "values"}
        assert arm["mean"] == pytest.approx(np.mean(arm["values"])) and len(arm["values"]) == arm["n"]
    tests = {c["test"] for c in result["comparisons"]}
    assert tests == {"nested bootstrap", "Welch over head seeds", "random against random"}
    for comparison in result["comparisons"]:
        documented = {"better", "than", "protocol", "metric", "difference", "low", "high", "p", "test"}
        assert set(comparison) == documented | {"p_holm", "effect_size", "margin", "planned"}
        assert comparison["low"] <= comparison["difference"] <= comparison["high"]
    bootstrap = next(c for c in result["comparisons"] if c["test"] == "nested bootstrap")
    difference = probes["barlow_twins"]["mean"] - probes["random"]["mean"]
    assert bootstrap["difference"] == pytest.approx(difference, abs=1e-6)
    assert bootstrap["p_holm"] == bootstrap["p"] and bootstrap["planned"] is True


def test_what_is_in_the_store(store: Store) -> None:
    made = stages(finished(store))
    # 2 x 2 x 3 probes of two arms, 2 x 3 of colour, 2 fine-tunings of two arms
    assert made == {"pretrain": 2, "initialise": 2, "embed": 5, "search": 3, "evaluate": 34, "report": 1}
    report = store.read("studies/tiny/report.html").decode()
    assert "<html" in report and "http://" not in report.replace("http://www.w3.org", "")
    assert {e.key.removeprefix("studies/tiny/") for e in store.list("studies/tiny/")} >= {
        "report.md",
        "scores.csv",
        "arms/random.json",
        "planned.json",
    }
    assert json.loads(store.read("studies/tiny/planned.json"))["evaluated_before"] == 0
    assert not store.list("ray/")


def test_histories_hold_every_step_once(store: Store) -> None:
    for name in (n for n in finished(store) if n.startswith("pretrain-")):
        history = pq.read_table(io.BytesIO(store.read(f"artifacts/{name}/history.parquet"))).to_pandas()
        counts = history.groupby(["rank", "step"]).size()
        assert (counts == 1).all() and set(history["rank"]) == {0}


def test_mlflow_was_told_of_losses_trials_and_scores(place: Path, store: Store) -> None:
    client = pytest.importorskip("mlflow").MlflowClient(tracking_uri=database(place))
    experiment = client.get_experiment_by_name("medssl/tiny")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    kinds: dict[str, list[Any]] = {}
    for run in runs:
        kinds.setdefault(run.data.tags["medssl.kind"], []).append(run)
    told = sorted(sorted((p.step, p.value) for p in client.get_metric_history(r.info.run_id, "loss")) for r in kinds["pretrain"])
    kept = []
    for name in (n for n in finished(store) if n.startswith("pretrain-")):
        history = pq.read_table(io.BytesIO(store.read(f"artifacts/{name}/history.parquet"))).to_pandas()
        main = history[history["rank"] == 0].sort_values("step")
        kept.append(list(zip(main["step"].tolist(), main["loss"].tolist(), strict=True)))
    assert len(told) == 2 and all(told) and all(set(some) <= set(whole) for some, whole in zip(told, sorted(kept), strict=True))
    points = [p for n in finished(store) if n.startswith("search-") for p in read_marker(store, n).facts["points"]]  # type: ignore[union-attr]
    assert sorted(r.data.metrics["score"] for r in kinds["search"]) == pytest.approx(sorted(p["score"] for p in points))
    assert {float(r.data.params["learning_rate"]) for r in kinds["search"]} == {p["learning_rate"] for p in points}
    result = json.loads((place / "result.json").read_text())
    for run in kinds["scores"]:
        means = {f"{a['protocol']}/{a['metric']}": a["mean"] for a in result["arms"] if a["arm"] == run.data.params["arm"]}
        assert means and {name: run.data.metrics[name] for name in means} == pytest.approx(means)
    assert len(kinds["scores"]) == 3


def test_second_run_does_nothing_and_says_so(place: Path, study: Path, store: Store) -> None:
    before = finished(store)
    done = tiny.medssl("run", str(study), "--store", str(place / "store"), "--json")
    assert "nothing to do" in done.stderr
    assert finished(store) == before
    assert json.loads(done.stdout) == json.loads((place / "result.json").read_text())


def test_plan_says_what_is_finished_and_what_the_rest_costs(place: Path, study: Path) -> None:
    done = tiny.medssl("plan", str(study), "--store", str(place / "store"), "--json")
    assert {line["state"] for line in json.loads(done.stdout)} == {"finished"}
    more = tiny.medssl("plan", str(study), "--store", str(place / "store"), "--json", "--set", "arms.0.epochs=5")
    lines = {line["label"]: line for line in json.loads(more.stdout)}
    images = pd.read_parquet(next((place / "store" / "datasets" / "lesions").glob("index-*.parquet")))
    assert lines["pretrain barlow_twins seed 0"]["state"] == "to do"
    assert lines["pretrain barlow_twins seed 0"]["images"] == 5 * (images["split"] == "train").sum()
    assert lines["initialise random seed 0"]["state"] == "finished"
    assert lines["report"]["state"] == "waits"


def assert_predicts(place: Path, store: Store, table: Path, study: str, arm: str, protocol: str) -> None:
    """`medssl predict` on the image files gives the probabilities that the evaluation stored."""
    index = json.loads(store.read(f"studies/{study}/arms/{arm}.json"))
    run = next(r for r in index["evaluations"] if r["protocol"] == protocol and r["seed"] == 0)
    stored = pd.read_parquet(io.BytesIO(store.read(f"artifacts/{run['artifact']}/predictions.parquet")))
    out = place / f"{arm}-{protocol}.csv"
    which = [arm, str(table.parent), "--study", study, "--protocol", protocol]
    tiny.medssl("predict", *which, "--out", str(out), "--store", str(place / "store"))
    new = pd.read_csv(out)
    new["image_id"] = [Path(p).stem for p in new["image"]]
    both = stored.merge(new, on="image_id", validate="one_to_one")
    assert len(both) == len(stored) > 0
    classes = [c for c in new.columns if c.startswith("p_")]
    for number, column in enumerate(classes):
        np.testing.assert_allclose(
            both[column], both[f"p_{number}"] if f"p_{number}" in both else both[f"p_{number}_x"], atol=1e-5
        )


def test_predict_equals_what_the_evaluation_stored(place: Path, study: Path, store: Store, table: Path) -> None:
    for arm, protocol in (("barlow_twins", "linear_probe"), ("colour", "linear_probe"), ("random", "fine_tune")):
        assert_predicts(place, store, table, "tiny", arm, protocol)


def test_calibrated_predictions_fit_the_validation_images(place: Path, study: Path, store: Store, table: Path) -> None:
    run = json.loads(store.read("studies/tiny/arms/random.json"))["evaluations"][0]
    saved = store.read(f"artifacts/{run['artifact']}/validation.parquet")
    validation = pd.read_parquet(io.BytesIO(saved))
    index = pd.read_parquet(next((place / "store" / "datasets" / "lesions").glob("index-*.parquet")))
    assert sorted(validation["image_id"]) == sorted(index.loc[index["split"] == "val", "image_id"])
    columns = [name for name in validation if name.startswith("p_")]

    def loss(beta: float) -> float:
        scaled = validation[columns].to_numpy(float) ** beta
        return -float(np.log(scaled[np.arange(len(scaled)), validation["label"]] / scaled.sum(axis=1)).mean())

    betas = np.geomspace(0.1, 10, 2001)
    beta = betas[np.argmin([loss(beta) for beta in betas])]
    found = []
    for more in ([], ["--calibrated"]):
        out = place / "calibrated.csv"
        tiny.medssl("predict", run["artifact"], str(table.parent), "--out", str(out), "--store", str(place / "store"), *more)
        found.append(pd.read_csv(out).filter(like="p_").to_numpy())
    np.testing.assert_allclose(found[1], found[0] ** beta / (found[0] ** beta).sum(axis=1, keepdims=True), atol=2e-3)


def test_probes_share_the_features(place: Path, study: Path, store: Store, table: Path) -> None:
    """Neighbours, and an MLP with fewer labels, on the same encoders: no features are made anew, and `predict` gives the same."""
    before = finished(store)
    mlp = {"name": "mlp", "kind": "mlp_probe", "head_seeds": 2, "probe": {"vary": ["head", "order"], "hidden": 8, "epochs": 5}}
    mlp["labels"] = [0.3, 0.6]
    protocols = [mlp, {"name": "knn", "kind": "knn", "probe": {"k": 30}}]
    comparisons = [{"better": "barlow_twins", "than": "random", "protocol": "knn"}]
    path = tiny.write(place / "probes.yaml", tiny.recipe(study="probes", protocols=protocols, comparisons=comparisons))
    tiny.medssl("run", str(path), "--store", str(place / "store"))
    assert stages(finished(store) - before) == {"evaluate": (2 * 2 + 2 * 2 + 2) * (1 + 2 * 2), "report": 1}
    assert "With fewer labels" in store.read("studies/probes/report.html").decode()
    assert "knn: k is 30, but class" in store.read("studies/probes/report.md").decode()
    assert_predicts(place, store, table, "probes", "random", "knn")
    assert_predicts(place, store, table, "probes", "colour", "mlp_60pct")
    refused = tiny.medssl("plan", str(path), "--store", str(place / "store"), "--set", "protocols.knn.probe.k=41", check=False)
    assert refused.returncode == 2 and "probe.k is 41, but a draw has 40 labelled images" in refused.stderr


def test_predictions_from_a_file_are_an_arm(place: Path, study: Path, store: Store, table: Path) -> None:
    """What `predict` wrote of an arm, as another arm: nothing is made but a report, which gives it that run's scores."""
    before, out, where = finished(store), place / "clinic.csv", ["--store", str(place / "store")]
    tiny.medssl("predict", "random", str(table.parent), "--study", "tiny", "--out", str(out), *where)
    pd.read_csv(out).assign(image_id=lambda rows: [Path(name).stem for name in rows["image"]]).to_csv(out, index=False)
    fields = tiny.recipe(comparisons=[{"better": "barlow_twins", "than": "clinic", "protocol": "linear_probe"}])
    fields["arms"].append({"name": "clinic", "predictions": str(out)})
    path = tiny.write(place / "clinic.yaml", fields)
    done = json.loads(tiny.medssl("run", str(path), *where, "--json").stdout)
    assert stages(finished(store) - before) == {"report": 1}
    run = json.loads(store.read("studies/tiny/arms/random.json"))["evaluations"][0]
    scores = json.loads(store.read(f"markers/{run['artifact']}.json"))["facts"]["scores"]
    found = {(a["protocol"], a["metric"]): a["values"] for a in done["arms"] if a["arm"] == "clinic"}
    for protocol in ("linear_probe", "fine_tune"):
        assert found[protocol, "balanced_accuracy"] == [pytest.approx(scores["balanced_accuracy"], abs=1e-6)]
    assert done["comparisons"][0]["than"] == "clinic"
    tiny.medssl("run", str(study), *where)  # the study's own report is the current one again
    out.write_text(out.read_text().replace("image_id", "image_name"))
    refused = tiny.medssl("plan", str(path), *where, check=False)
    assert refused.returncode == 2 and "have no column image_id" in refused.stderr and refused.stderr.count("\n") == 1


def test_finished_classifiers_are_judged_on_a_shifted_set(place: Path, study: Path, store: Store, table: Path) -> None:
    """Nothing is trained for it but the fine-tunings whose weights were not kept; `predict`, restricted, says the same."""
    before = finished(store)
    away = write_synthetic(place / "away", images=60, seed=7)
    classes = sorted(set(pd.read_csv(away)["label"]))
    rows = pd.read_csv(away).assign(split="test", label=lambda rows: "clinic " + rows["label"])
    own = next(Path(name) for name in pd.read_csv(table)["image"])
    (away.parent / "images" / "again.jpg").write_bytes((table.parent / own).read_bytes())
    pd.concat([rows, rows[:1].assign(image="images/again.jpg")]).to_csv(away, index=False)
    tiny.ingest_table(away, str(place / "store" / "datasets" / "away"))
    meaning = {f"clinic {name}": name for name in classes[:-1]}
    tuned = tiny.recipe()["protocols"][1] | {"name": "tuned", "training": {"epochs": 1, "keep_weights": "all"}}
    knn = {"name": "knn", "kind": "knn", "probe": {"k": 10}, "label_draws": 1, "pretraining_seeds": 1}
    fields = tiny.recipe(
        study="shifted", protocols=[tiny.recipe()["protocols"][0], tuned, knn],
        shifted=[{"name": "clinic", "dataset": "datasets/away", "classes": meaning}],
        comparisons=[{"better": "barlow_twins", "than": "random", "protocol": "linear_probe", "shifted": "clinic"}],
    )  # fmt: skip
    path, where = tiny.write(place / "shifted.yaml", fields), ["--store", str(place / "store")]
    done = json.loads(tiny.medssl("run", str(path), *where, "--json").stdout)
    cells = {"linear_probe": 10 * 3, "tuned": 2 * 2, "knn": 3}
    made = stages(finished(store) - before)
    # the first fine-tuning of both arms is the study's own, whose weights were kept
    assert made == {"evaluate": cells["tuned"] - 2 + cells["knn"], "embed": 5, "transfer": sum(cells.values()), "report": 1}
    assert {c["protocol"] for c in done["comparisons"]} == {"linear_probe on clinic"}
    report = store.read("studies/shifted/report.md").decode()
    judged = int(rows["label"].isin(meaning).sum())
    assert f"clinic: {judged} images of datasets/away (test)" in report and "1 were left out as byte for byte" in report
    for protocol in cells:
        assert_judged_away(place, store, away, protocol, classes)
    lines = json.loads(tiny.medssl("plan", str(path), *where, "--json").stdout)
    assert {line["state"] for line in lines} == {"finished"} and sum(line["stage"] == "transfer" for line in lines) == 15


def assert_judged_away(place: Path, store: Store, table: Path, protocol: str, classes: list[str]) -> None:
    """What was stored of the shifted set is `predict` on its files, in the classes that it has."""
    index = json.loads(store.read("studies/shifted/arms/random.json"))
    run = next(r for r in index["evaluations"] if r["protocol"] == protocol and r["seed"] == 0)
    marker = json.loads(store.read(f"markers/{run['artifact']}.json"))
    content = digest_json(marker["files"])
    markers = [json.loads(store.read(entry.key)) for entry in store.list("markers/transfer-")]
    name = next(m["name"] for m in markers if m["inputs"]["evaluation"] == content)
    stored = pd.read_parquet(io.BytesIO(store.read(f"artifacts/{name}/predictions.parquet")))
    out = place / f"away-{protocol}.csv"
    tiny.medssl("predict", run["artifact"], str(table.parent), "--out", str(out), "--store", str(place / "store"))
    new = pd.read_csv(out).assign(image_id=lambda frame: [Path(p).stem for p in frame["image"]])
    both = stored.merge(new, on="image_id", validate="one_to_one", suffixes=("", "_new"))
    assert len(both) == len(stored) > 20
    wanted = both[[f"p_{name}" for name in classes[:-1]]].to_numpy()
    kept = both[[f"p_{number}" for number in range(len(classes) - 1)]].to_numpy()
    np.testing.assert_allclose(kept, wanted / wanted.sum(axis=1, keepdims=True), atol=1e-5)


def test_more_head_seeds_compute_only_the_new_ones(place: Path, study: Path, store: Store) -> None:
    before = finished(store)
    tiny.medssl("run", str(study), "--store", str(place / "store"), "--set", "protocols.linear_probe.head_seeds=5")
    # two more for each of 2 x 2, 2 x 2 and 2 cells, and the report over them
    assert stages(finished(store) - before) == {"evaluate": 20, "report": 1}


def test_the_current_report_follows_the_recipe(place: Path, study: Path, store: Store) -> None:
    """After an override was tried, the plain recipe's report and arms are the ones that people and `predict` find."""
    arguments = ["run", str(study), "--store", str(place / "store")]
    runs = []
    for override in ([], ["--set", "protocols.linear_probe.head_seeds=5"], []):
        tiny.medssl(*arguments, *override)
        runs.append(len(json.loads(store.read("studies/tiny/arms/random.json"))["evaluations"]))
    assert runs == [2 * 2 * 3 + 2, 2 * 2 * 5 + 2, 2 * 2 * 3 + 2]


def test_a_mended_label_recomputes_what_depends_on_it(place: Path, study: Path, store: Store, table: Path) -> None:
    before = finished(store)
    rows = pd.read_csv(table)
    index = pd.read_parquet(next((place / "store" / "datasets" / "lesions").glob("index-*.parquet")))
    test = index[(index["split"] == "test") & (index["label"] == index["label"].mode()[0])].iloc[0]
    image = rows.columns[0]
    row = rows.index[[Path(p).stem == test["image_id"] for p in rows[image]]][0]
    rows = rows.merge(
        index[["image_id", "split"]].assign(key=index["image_id"]),
        left_on=rows[image].map(lambda p: Path(p).stem),
        right_on="key",
    )
    rows = rows.drop(columns=["key", "key_0", "image_id"], errors="ignore")
    rows.loc[row, "label"] = next(c for c in sorted(set(rows["label"])) if c != rows.loc[row, "label"])
    mended = table.with_name("mended.csv")
    rows.to_csv(mended, index=False)
    tiny.ingest_table(mended, str(place / "store" / "datasets" / "lesions"))
    done = tiny.medssl("plan", str(study), "--store", str(place / "store"), "--json")
    states = Counter((line["stage"], line["state"].split(" (")[0]) for line in json.loads(done.stdout))
    # a test label touches the evaluations and the report; no encoder, no features, no search
    for stage in ("pretrain", "initialise", "embed", "search"):
        assert states[stage, "to do"] == states[stage, "waits"] == 0
    assert states["evaluate", "finished"] == 0
    tiny.medssl("run", str(study), "--store", str(place / "store"))
    assert stages(finished(store) - before) == {"evaluate": 34, "report": 1}


def test_a_study_may_leave_the_test_split_closed(place: Path, study: Path, store: Store) -> None:
    before = finished(store)
    closed = ["--set", "study=closed", "--set", "evaluation_split=val"]
    more = ["--set", "arms.random.pretraining_seeds=3", "--set", "protocols.fine_tune.label_draws=2"]
    tiny.medssl("run", str(study), "--store", str(place / "store"), *closed, *more)
    made = finished(store) - before
    # one more random encoder: 2 draws x 3 probes of it; fine-tuning keeps to the first seed, and has a second draw
    assert stages(made) == {"initialise": 1, "embed": 1, "evaluate": 34 + 6 + 4, "report": 1}
    index = open_dataset(str(place / "store" / "datasets" / "lesions")).index()
    judged = set(index[(index["split"] == "val") & index["label"].notna()]["image_id"])
    name = next(name for name in made if name.startswith("evaluate-"))
    predictions = next(e.key for e in store.list(f"artifacts/{name}/") if e.key.endswith("predictions.parquet"))
    assert set(pd.read_parquet(io.BytesIO(store.read(predictions)))["image_id"]) == judged
    report = store.read("studies/closed/report.md").decode()
    assert f"Measured on {len(judged)} validation images" in report and "test image" not in report and "test split" not in report


def test_report_needs_a_finished_study(place: Path, study: Path) -> None:
    done = tiny.medssl("report", str(study), "--store", str(place / "store"), "--set", "arms.0.epochs=7", check=False)
    assert done.returncode == 2 and "is not finished" in done.stderr and "Traceback" not in done.stderr
    again = tiny.medssl("report", str(study), "--store", str(place / "store"))
    assert "report.html" in again.stdout


def test_python_api_gives_frames(place: Path, study: Path) -> None:
    import medssl

    result = medssl.run(str(study), str(place / "store"))
    assert {"arm", "protocol", "metric", "value"} <= set(result.scores.columns)
    assert set(result.summary["arm"]) == {"barlow_twins", "random", "colour"}
    assert result.report_uri.endswith("studies/tiny/report.html")


@pytest.mark.acceptance  # in parts in the tests of export, of initial weights and of chains
def test_weights_go_out_and_come_in_again(place: Path, study: Path, store: Store) -> None:
    """An exported encoder is where the arms of another study start from: one as it is, one that trains on."""
    from safetensors.torch import load

    out = place / "encoder.safetensors"
    which = ["barlow_twins", "--study", "tiny", "--format", "timm"]
    done = tiny.medssl("export", *which, "--out", str(out), "--store", str(place / "store"), "--json")
    assert json.loads(done.stdout)["path"] == str(out)
    assert "over random" in (place / "encoder.safetensors.card.md").read_text()
    trained = tiny.recipe()["arms"][0] | {"name": "longer", "epochs": 1, "initial_weights": "encoder.safetensors", "surgery": {}}
    arms = [{"name": "given", "initial_weights": str(out)}, trained]
    path = tiny.write(place / "given.yaml", tiny.pretraining_only(study="given", arms=arms, compute=tiny.recipe()["compute"]))
    (place / "store" / "encoder.safetensors").write_bytes(out.read_bytes())
    told = tiny.medssl("run", str(path), "--store", str(place / "store")).stderr
    for arm in ("given", "longer"):
        assert f"{arm} starts from" in told
        index = json.loads(store.read(f"studies/given/arms/{arm}.json"))
        name = index["encoders"]["0"]
        facts = json.loads(store.read(f"markers/{name}.json"))["facts"]["initial_weights"]
        assert facts["loaded"] == facts["of"] > 0 and not facts["missing"]
        assert not [e for e in store.list(f"artifacts/{name}/") if e.key.endswith("initial.safetensors")]
        weights, wanted = load(store.read(f"artifacts/{name}/encoder.safetensors")), load(out.read_bytes())
        assert all(weights[k].equal(wanted[k]) for k in wanted) is (arm == "given")
    (place / "store" / "encoder.safetensors").unlink()
    assert re.search(r"layers scaled.*% in the features", json.loads(store.read(f"markers/{name}.json"))["facts"]["surgery"])
