"""The claims of a study: written once before anything is evaluated, marked when they change, and sized by the design."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from medssl import cli
from medssl.artifacts import publish
from medssl.claims import PLANNED, Planned, detectable, evaluated, fix_claims
from medssl.comparison import Comparison
from medssl.datasets.card import FORMAT
from medssl.errors import RecipeError, StoreError
from medssl.metrics import METRICS
from medssl.recipe import Recipe
from medssl.recipe_file import load
from medssl.runner import Runner
from medssl.stages.report_data import BOOTSTRAP, EQUIVALENCE, NOT_REPORTED, WELCH
from medssl.stages.specs import Spec
from medssl.statistics import holm, smallest_detectable_difference, smallest_equivalence_margin
from medssl.store import Store, open_store
from medssl.study import Study

FIRST = {"better": "bt", "than": "random", "protocol": "probe"}
SECOND = {"better": "bt", "than": "colour", "protocol": "probe"}


def fields(*comparisons: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arms = [
        {"name": "bt", "objective": {"name": "barlow_twins", "projector": [8, 8]}, "epochs": 1, "batch_size": 8},
        {"name": "random"},
        {"name": "colour", "features": "colour"},
    ]
    protocols = [
        {"name": "probe", "kind": "linear_probe", "head_seeds": 5},
        {"name": "tune", "kind": "fine_tune", "head_seeds": 2, "pretraining_seeds": 1, "label_draws": 1},
    ]
    return {
        "study": "s", "dataset": "datasets/d", "arms": arms, "protocols": protocols, "comparisons": list(comparisons),
        "repeats": {"pretraining_seeds": 3, "label_draws": 4, "labels": 12},
    } | changes  # fmt: skip


def recipe(*comparisons: dict[str, Any], **changes: Any) -> Recipe:
    return load(fields(*comparisons, **changes))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), create=True)


@pytest.fixture
def dataset(store: Store) -> Store:
    """Card and index of 60 images; test images of 9 patients, and one whose patient is not known."""
    images = pd.DataFrame({
        "image_id": [f"i{n:02}" for n in range(60)], "label": ["a", "b"] * 30, "bag_id": None,
        "patient_id": [f"p{n // 2}" if n != 59 else None for n in range(60)],
        "split": ["train"] * 30 + ["val"] * 13 + ["test"] * 17, "sha256": [f"{n:064x}" for n in range(60)],
        "phash": [f"{0x9E3779B97F4A7C15 * n % 2**64:016x}" for n in range(60)],
    })  # fmt: skip
    buffer = io.BytesIO()
    images.to_parquet(buffer)
    data = buffer.getvalue()
    card = {
        "format": FORMAT, "name": "d", "images": 60, "splits": {"train": 30, "val": 13, "test": 17}, "classes": ["a", "b"],
        "digests": {"images": "x", "labels": "y"},
        "shards": [], "index": {"path": "index.parquet", "sha256": hashlib.sha256(data).hexdigest()},
    }  # fmt: skip
    store.write("datasets/d/index.parquet", data)
    store.write("datasets/d/card.json", json.dumps(card).encode())
    return store


def count(times: list[int]) -> Any:
    def asked() -> int:
        times.append(1)
        return 7

    return asked


def test_the_first_list_stays(store: Store) -> None:
    times: list[int] = []
    planned = fix_claims(store, recipe(FIRST), count(times))
    assert [c.claim for c in planned.comparisons] == [("bt", "random", "probe", "balanced_accuracy")]
    assert planned.evaluated_before == 7
    later = fix_claims(store, recipe(FIRST, SECOND), count(times))
    assert later == planned and len(times) == 1
    assert Planned.from_json(store.read("studies/s/planned.json")) == planned
    assert fix_claims(store, recipe(SECOND, study="other"), count(times)).comparisons != planned.comparisons


def test_where_it_runs_is_not_in_the_recipes_digest(store: Store) -> None:
    digests = [
        fix_claims(store, recipe(FIRST, study="s", **changes), lambda: 0).recipe if not store.exists("studies/s/planned.json")
        else fix_claims(store.sub(f"again{n}"), recipe(FIRST, study="s", **changes), lambda: 0).recipe
        for n, changes in enumerate([{}, {"compute": {"workers": 2}}, {"metrics": ["balanced_accuracy"]}])
    ]  # fmt: skip
    assert digests[0] == digests[1] != digests[2]


def test_of_two_first_runs_one_list_counts(store: Store) -> None:
    """The other run writes its list after this one has looked."""

    def other() -> int:
        fix_claims(store, recipe(SECOND), lambda: 0)
        return 0

    assert fix_claims(store, recipe(FIRST), other).comparisons == recipe(SECOND).comparisons


def test_what_was_planned_added_and_dropped() -> None:
    claims = [Comparison(**c) for c in (FIRST, SECOND, FIRST | {"metric": "auc", "equivalence_margin": 0.02})]
    planned = Planned(tuple(claims[1:]), "digest", 0)
    assert [planned.has(c) for c in claims] == [False, True, True]
    assert planned.dropped(claims) == []
    assert planned.dropped(claims[:2]) == [claims[2]]
    wider = claims[2].model_copy(update={"equivalence_margin": 0.05})
    assert planned.has(wider) and not planned.has_margin(wider) and planned.has_margin(claims[2])
    assert planned.dropped([*claims[:2], wider]) == [claims[2]]
    without = claims[2].model_copy(update={"equivalence_margin": None})
    assert planned.dropped([*claims[:2], without]) == [claims[2]]
    margin_later = claims[1].model_copy(update={"equivalence_margin": 0.01})
    assert planned.has(margin_later) and not planned.has_margin(margin_later)
    assert planned.dropped([margin_later, claims[2]]) == []


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"comparisons": [{"better": "a"}], "recipe": "x", "evaluated_before": 0}'])
def test_a_list_that_is_broken_is_one_line(store: Store, data: bytes) -> None:
    store.write(f"studies/s/{PLANNED}", data)
    with pytest.raises(StoreError, match=r"planned\.json is not as medssl wrote it"):
        fix_claims(store, recipe(FIRST), lambda: 0)


def test_a_run_fixes_the_list_before_it_makes_anything(dataset: Store) -> None:
    class Stopped(Runner):
        def encoders(self) -> None:
            raise InterruptedError

    for comparisons in ([FIRST], [FIRST, SECOND]):
        study = Study(recipe(*comparisons), dataset)
        with pytest.raises(InterruptedError), ExitStack() as stack:
            Stopped(study, stack, None).run()
        planned = Planned.from_json(dataset.read("studies/s/planned.json"))
        assert (planned.comparisons, planned.evaluated_before) == (recipe(FIRST).comparisons, 0)


def test_evaluations_that_are_there_already_are_counted(dataset: Store) -> None:
    """Features of colour statistics, and three evaluations on them, that another study made."""

    def made(spec: Spec) -> None:
        publish(
            dataset, spec.name, stage=spec.stage, version=spec.version, config=spec.config, inputs=spec.inputs,
            files={"x": spec.stage.encode()},
        )  # fmt: skip

    study = Study(recipe(FIRST, study="other"), dataset)
    assert evaluated(study) == 0
    colour, probe = study.recipe.arms[2], study.recipe.protocols[0]
    assert probe.kind == "linear_probe"
    made(study.specs.embed(colour, 0, probe, None))
    study.refresh()
    cell = next(c for c in study.specs.cells() if c.arm is colour)
    for spec in list((study.evaluations(cell) or {}).values())[:3]:
        made(spec)
    again = Study(recipe(SECOND), dataset)
    assert evaluated(again) == 3
    assert fix_claims(dataset, again.recipe, partial(evaluated, again)).evaluated_before == 3


def finish(store: Store, study: Study) -> None:
    """What encoders, features and evaluations leave, as far as a report reads it: scores and predictions of no meaning."""

    def made(spec: Spec, files: dict[str, bytes], **facts: Any) -> None:
        publish(
            store, spec.name, stage=spec.stage, version=spec.version, config=spec.config, inputs=spec.inputs,
            files=files, facts=facts,
        )  # fmt: skip

    for arm in study.recipe.arms:
        for seed in study.specs.pretraining_seeds(arm):
            encoder = study.specs.encoder(arm, seed)
            if encoder is not None:
                made(encoder, {"encoder.safetensors": f"{arm.name} {seed}".encode()})
                study.refresh()
            features = study.embed_spec(arm, seed, study.recipe.protocols[0])
            assert features is not None
            made(features, {"features.npy": f"{arm.name} {seed}".encode()})
    study.refresh()
    labels, rng = study.specs.labels(study.specs.rows("test")), np.random.default_rng(0)
    for cell in study.specs.cells():
        for spec in (study.evaluations(cell) or {}).values():
            probabilities = rng.dirichlet([1, 1], size=len(labels))
            buffer = io.BytesIO()
            pd.DataFrame({"p_a": probabilities[:, 0], "p_b": probabilities[:, 1]}).to_parquet(buffer)
            scores = {metric: METRICS[metric](probabilities, labels, None) for metric in study.recipe.metrics}
            made(spec, {"predictions.parquet": buffer.getvalue()}, scores=scores)


def test_the_report_of_a_study_whose_claims_changed(
    dataset: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First `random` over `colour` was to be tested; then another metric and a margin come in, and the first goes."""
    arms, protocols = [{"name": "random"}, {"name": "colour", "features": "colour"}], fields()["protocols"][:1]
    claim = {"better": "random", "than": "colour", "protocol": "probe"}
    kept = claim | {"metric": "accuracy"}
    small = {"arms": arms, "protocols": protocols, "bootstrap": {"replicates": 100}, "report": {"embedding_map": False}}
    first = recipe(claim, kept, **small)
    fix_claims(dataset, first, lambda: 0)
    finish(dataset, Study(first, dataset))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(fields(kept | {"equivalence_margin": 0.2}, claim | {"metric": "auc"}, **small)))
    assert cli.main(["report", str(path), "--store", dataset.uri, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["comparisons"]
    rows = [(c["test"], c["metric"], c["planned"], c["margin"]) for c in told if c["test"] != WELCH]
    assert rows == [
        (BOOTSTRAP, "accuracy", True, None), (EQUIVALENCE, "accuracy", False, 0.2), (BOOTSTRAP, "auc", False, None),
        (NOT_REPORTED, "balanced_accuracy", True, None),
    ]  # fmt: skip
    ps = [c["p"] for c in told if c["p_holm"] is not None]
    assert [c["p_holm"] for c in told if c["p_holm"] is not None] == pytest.approx(holm(ps).tolist()) and len(ps) == 3
    report = dataset.read("studies/s/report.md").decode()
    assert "before any of its evaluations. Added after the first run: the margin of 0.2 for random over colour" in report
    assert "Planned, not reported: random over colour (probe, balanced accuracy)." in report
    # the finished report, read back
    assert cli.main(["run", str(path), "--store", dataset.uri, "--json"]) == 0
    printed = capsys.readouterr()
    assert "nothing to do" in printed.err and json.loads(printed.out)["comparisons"] == told


def test_what_the_design_can_show(dataset: Store) -> None:
    claims = [FIRST, SECOND | {"equivalence_margin": 0.03}, FIRST | {"protocol": "tune", "metric": "auc"}]
    study = Study(recipe(*claims, bootstrap={"level": 0.9}), dataset)
    first, second, third = detectable(study)
    both = (3, 3), 4, (5, 5), 10
    assert first.difference == smallest_detectable_difference(*both, level=0.1)
    assert (first.pretraining_seeds, first.label_draws, first.head_seeds, first.patients) == ((3, 3), 4, 5, 10)
    assert (first.margin, first.wanted_margin, first.notes) == (None, None, ())
    assert second.margin == smallest_equivalence_margin((3, 1), 4, (5, 5), 10, level=0.1)
    assert (second.pretraining_seeds, second.wanted_margin, second.notes) == ((3, 1), 0.03, ())
    assert third.difference == smallest_detectable_difference((1, 1), 1, (2, 2), 10, level=0.1)
    assert [note.split(",")[0] for note in third.notes] == [
        "nothing about other pretraining seeds of bt",
        "nothing about other pretraining seeds of random",
        "nothing about other draws of the labels: there is one",
    ]
    assert first.to_text() == (
        f"bt over random, probe: can detect a difference of {first.difference:.3f} in balanced accuracy (80% power) with "
        "3 seeds, 4 draws, 5 heads, 10 patients"
    )
    hopeless = dataclasses.replace(first, difference=1.2).to_text()
    assert hopeless.startswith("bt over random, probe: can hardly detect any difference in balanced accuracy (80% power) with")
    assert "3 and 1 seeds, 4 draws" in second.to_text() and "(the recipe asks for 0.03)" in second.to_text()
    assert "in AUC (80% power) with 1 seed, 1 draw, 2 heads, 10 patients; nothing about" in third.to_text()


def test_plan_prints_it(dataset: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(fields(FIRST, SECOND)))
    arguments = ["plan", str(path), "--store", dataset.uri]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[-3:-1]] == ["bt over random, probe", "bt over colour, probe"]
    assert "had on HAM10000: 0.010 over pretraining seeds" in printed[-1] and "corrects 2 together (Holm)" in printed[-1]
    assert cli.main([*arguments, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert all(line.keys() == {"stage", "label", "state", "images", "users", "arm", "artifact", "comparisons"} for line in lines)
    assert [line["stage"] for line in lines if line["comparisons"]] == ["report"]
    shown = lines[-1]["comparisons"][1]
    assert (shown["than"], shown["power"], shown["level"], shown["pretraining_seeds"]) == ("colour", 0.8, 0.05, [3, 1])
    assert cli.main([*arguments, "--set", "comparisons=[]"]) == 0
    assert "HAM10000" not in capsys.readouterr().out


@pytest.mark.parametrize("margin", [0, -0.1, 1, "wide"])
def test_margins_that_are_refused(margin: Any) -> None:
    with pytest.raises(RecipeError, match="equivalence_margin"):
        recipe(FIRST | {"equivalence_margin": margin})


def test_a_claim_stands_once() -> None:
    with pytest.raises(RecipeError, match="two comparisons claim bt over random under probe by balanced_accuracy: keep one"):
        recipe(FIRST, FIRST | {"equivalence_margin": 0.1})
    assert len(recipe(FIRST, FIRST | {"metric": "auc"}).comparisons) == 2
