"""`medssl gc`: what no study needs is listed and removed, and nothing else, whatever state the store is in."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tests.finished_study import evaluation, fields, finish, make, noted_runs, write_dataset
from tests.stages.test_search_rows import Ready

from medssl import leftovers
from medssl.artifacts import finished
from medssl.cli import main
from medssl.errors import DataError, StoreError
from medssl.leases import lease, this_process
from medssl.leftovers import find_leftovers, made, needs, remember, remove
from medssl.networks.encoder import EncoderParams, build_encoder, feature_width, save_weights
from medssl.protocols import LinearProbe
from medssl.recipe import Recipe
from medssl.results import _arm_indexes, build_report
from medssl.shifting import features, transfers
from medssl.stages.context import Context, Opened
from medssl.stages.encode import _npy
from medssl.stages.evaluate import EvaluateTask, evaluate
from medssl.stages.predict import load_model
from medssl.store import Store, open_store
from medssl.study import Study, run


def again(store: Store, **changes: Any) -> Study:
    """The study as another recipe has it, started but not run."""
    study = Study(Recipe.model_validate(fields(**changes)), store)
    remember(study)
    return study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    made = make(tmp_path)
    remember(made)
    return made


def gc(store: Store, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["gc", store.uri, *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def smaller() -> dict[str, Any]:
    """The same study with one head seed less."""
    protocols = fields()["protocols"]
    return {"protocols": [protocols[0] | {"head_seeds": 1}, *protocols[1:]]}


def test_a_study_needs_all_that_was_made_for_it(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    names, complete = needs(study)
    assert complete and finished(study.store) <= names
    code, out, _ = gc(study.store, capsys=capsys)
    assert code == 0 and out == "0 artifacts, 0.0 MB, that none of 1 studies needs\n"


def test_what_a_changed_recipe_leaves_is_listed_and_only_removed_when_told_to(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    store, before = study.store, finished(study.store)
    less = again(store, **smaller())
    expected = before - needs(less)[0]
    assert expected and {name.rpartition("-")[0] for name in expected} <= {"evaluate", "report"}
    code, out, _ = gc(store, "--json", capsys=capsys)
    listed = json.loads(out)
    assert code == 0 and {each["name"] for each in listed["artifacts"]} == expected
    for each in listed["artifacts"]:
        assert each["bytes"] == sum(entry.size for entry in store.list(f"artifacts/{each['name']}/"))
    assert finished(store) == before
    code, _, said = gc(store, "--delete", capsys=capsys)
    assert code == 0 and f"removed {len(expected)}" in said
    assert finished(store) == before - expected
    assert not [e.key for name in expected for e in store.list(f"artifacts/{name}/")]
    assert all(line.state == "finished" for line in Study(less.recipe, store).plan() if line.stage != "report")
    assert store.exists("datasets/squares/card.json")


def test_what_was_left_half_made_goes_too_and_what_is_no_artifact_stays(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    store = study.store
    store.write("artifacts/pretrain-0123456789abcdefabcd/checkpoints/step-1.json", b"x")
    store.write("artifacts/notes/mine.txt", b"x")
    code, out, _ = gc(store, "--delete", capsys=capsys)
    assert code == 0 and "pretrain-0123456789abcdefabcd  0.0 MB  (not finished)" in out
    assert not store.list("artifacts/pretrain-0123456789abcdefabcd/") and store.exists("artifacts/notes/mine.txt")


def test_a_dropped_study_goes_with_what_it_alone_needs(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    store, own = study.store, needs(study)[0]
    other = again(store, study="other", **smaller())
    shared = needs(other)[0] & finished(store)
    assert shared and shared < own
    code, _, said = gc(store, "--drop", "finished", "--delete", capsys=capsys)
    assert code == 0, said
    assert finished(store) == shared and not store.list("studies/finished/") and store.list("studies/other/")
    code, _, said = gc(store, "--drop", "finishd", capsys=capsys)
    assert code == 2 and "the store has no such study" in said and said.count("\n") == 1


def test_nothing_is_removed_where_a_studys_needs_cannot_be_told(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    store = study.store
    again(store, **smaller())
    before = finished(store)
    for broken in (b"{}", b"no json"):
        store.write("studies/other/wanted.json", broken)
        store.write("studies/other/planned.json", b"{}")
        code, _, said = gc(store, "--delete", capsys=capsys)
        assert code == 2 and "what study 'other' needs cannot be told" in said and said.count("\n") == 1
        assert finished(store) == before
    store.delete("studies/other/wanted.json")
    code, _, said = gc(store, "--delete", capsys=capsys)
    assert code == 2 and "run it once more" in said and finished(store) == before
    assert gc(store, "--drop", "other", "--delete", capsys=capsys)[0] == 0
    assert finished(store) < before


@pytest.mark.parametrize("there", ["another", "none"])
def test_files_of_a_recipe_are_those_it_was_run_with(
    tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gc` is run in another folder, where weights of that name are others, or are not."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "weights.pth").write_bytes(b"these")
    monkeypatch.chdir(tmp_path / "one")
    study = make(tmp_path, {"arms": [{"name": "given", "initial_weights": "weights.pth"}]})
    remember(study)
    before = finished(study.store)
    assert before
    monkeypatch.chdir(tmp_path / "two")
    if there == "another":
        (tmp_path / "two" / "weights.pth").write_bytes(b"those")
    code, _, said = gc(study.store, "--delete", capsys=capsys)
    assert code == 0, said
    assert finished(study.store) == before


@pytest.mark.parametrize("named", ["key", "uri", "path"])
def test_an_artifact_that_a_study_starts_from_is_needed_whoever_made_it(
    study: Study, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, source = study.store, study.encoders()[0][2].name
    key = f"artifacts/{source}/encoder.safetensors"
    monkeypatch.chdir(tmp_path)
    given = {"key": key, "uri": store.uri_of(key), "path": f"store/{key}"}[named]
    other = make(tmp_path, {"study": "other", "arms": [{"name": "given", "initial_weights": given}]})
    remember(other)
    own = needs(other)[0] - {source}
    monkeypatch.chdir("/")  # gc is run elsewhere
    assert gc(store, "--drop", "finished", "--delete", capsys=capsys)[0] == 0
    assert store.exists(key) and own & finished(store) and finished(store) <= own | {source}
    monkeypatch.chdir(tmp_path)
    assert {line.state for line in Study(other.recipe, store).plan() if line.stage != "report"} == {"finished"}


def test_what_a_published_report_refers_to_stays_until_the_next(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    store = study.store
    build_report(study)
    before = finished(store)
    less = again(store, **smaller(), arms=[fields()["arms"][0]])  # started and stopped
    assert before - made(less)[0]
    assert gc(store, "--delete", capsys=capsys)[0] == 0
    arms = [json.loads(store.read(entry.key)) for entry in store.list("studies/finished/arms/")]
    named = {run["artifact"] for arm in arms for run in arm["evaluations"]}
    named |= {name for arm in arms for name in arm["encoders"].values()}
    assert len(arms) == 2 and len(named) > 5 and named <= finished(store)
    build_report(Study(less.recipe, store))
    assert gc(store, "--delete", capsys=capsys)[0] == 0
    assert finished(store) <= needs(Study(less.recipe, store))[0] and not named <= finished(store)


def test_a_study_that_is_new_to_the_store_waits_for_a_removal(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes for finished is there; only what would need Ray is left out of its run."""
    store, runs, original = study.store, list[Future[Any]](), Store.delete
    begun, waits = noted_runs(monkeypatch)

    def delete(place: Store, key: str) -> None:
        if key.startswith("markers/") and not runs:
            runs.append(pool.submit(run, recipe, store, on_event=lambda event: waits.set() if "waiting" in str(event) else None))
            assert waits.wait(60)
        original(place, key)

    again(store, **smaller())
    recipe, found = Recipe.model_validate(fields(study="new")), find_leftovers(store)
    monkeypatch.setattr(Store, "delete", delete)
    with ThreadPoolExecutor(1) as pool:
        assert remove(store, found) == len(found.artifacts) > 0
        runs[0].result(60)
    assert len(begun) == 1 and set(begun[0].finished_names("")) <= finished(store)


def test_what_a_run_that_began_meanwhile_needs_stays(study: Study) -> None:
    store = study.store
    again(store, **smaller())
    before, found = finished(store), find_leftovers(store)
    assert found.artifacts
    remember(study)  # the recipe as it was is run again
    assert remove(store, found) == 0 and finished(store) == before
    again(store, **smaller())
    found = find_leftovers(store)
    again(store, study="new")
    with pytest.raises(StoreError, match="study 'new' was started or changed meanwhile"):
        remove(store, found)
    assert finished(store) == before


def test_a_running_study_keeps_what_it_may_still_need(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    store = study.store
    less = again(store, **smaller())
    arms = [*fields()["arms"], {"name": "later", "encoder": {"name": "test_resnet", "image_px": 40}}]
    before = finished(store)
    with lease(store, "study-other"):
        unfinished = again(store, study="other", arms=arms)
        assert not needs(unfinished)[1]
        code, _, said = gc(store, "--delete", capsys=capsys)
        assert code == 2 and "study 'other' is being run by" in said and finished(store) == before
        assert " UTC): wait for it" in said, "all of who it is"
    with lease(store, "study-finished"):  # all its artifacts have names: they are kept, the others go
        code, _, said = gc(store, "--delete", capsys=capsys)
        assert code == 0, said
        code, _, said = gc(store, "--drop", "finished", "--delete", capsys=capsys)
        assert code == 2 and "study 'finished' is being run by" in said
    assert needs(less)[0] & before <= finished(store)


def test_a_study_whose_run_died_on_another_machine_can_be_dropped(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody gives its lease back, and its process cannot be seen from here: only its silence tells."""
    monkeypatch.setattr(leftovers, "lease", partial(lease, ttl_seconds=6))  # the least, for the test's time
    owner = dataclasses.replace(this_process(), host="elsewhere", machine="elsewhere")
    claim = json.dumps(dataclasses.asdict(owner)).encode()
    study.store.write("leases/study-finished/00000001.claim", claim)
    code, _, said = gc(study.store, "--drop", "finished", "--delete", capsys=capsys)
    assert code == 0, said
    assert not finished(study.store) and not study.store.list("studies/finished/")


def test_searches_and_what_is_judged_elsewhere_are_needed_too(tmp_path: Path) -> None:
    """Every kind of artifact that a study can have, made here one by one, in the order of a run."""
    (tmp_path / "away").mkdir()
    away = open_store(str(tmp_path / "store"), create=True).sub("datasets/away")
    write_dataset(tmp_path / "away", away, blue=90)
    first = fields()["protocols"][0]
    searched = first | {"search": {"learning_rate": [0.01, 0.1], "weight_decay": [0.0]}}
    changes = {"protocols": [searched], "shifted": [{"name": "away", "dataset": "datasets/away"}]}
    study = make(tmp_path, changes)
    remember(study)
    made = {}
    for arm, protocol in study.searches():
        search = study.search_spec(arm, protocol)
        assert search is not None
        finish(study, search, {"trials.json": b"{}"}, {"best": {"learning_rate": 0.01, "weight_decay": 0.0}})
        made[search.name] = "search"
    for cell in study.specs.cells():
        assert not needs(study)[1], "the names of what is judged elsewhere are not known yet"
        for number, spec in (study.evaluations(cell) or {}).items():
            evaluation(study, spec, number, np.random.default_rng(0))
    for cell in study.specs.cells():
        for shifted in study.specs.shifted.values():
            found = features(study, cell.arm, cell.pretraining_seed, shifted)
            assert found is not None
            made[found.name] = "features"
            for each in transfers(study, cell, shifted) or []:
                made[each.spec.name] = "transfer"
    assert set(made.values()) == {"search", "features", "transfer"}
    for name in made:
        study.store.write(f"artifacts/{name}/file", b"x")
    assert set(made) <= needs(study)[0] and needs(study)[1]
    assert not find_leftovers(study.store).artifacts


def test_nothing_of_what_is_found_is_of_a_study_that_is_kept(study: Study) -> None:
    found = find_leftovers(study.store)
    assert found.studies == ("finished",) and not found.artifacts and not found.unreadable and not found.running


def test_a_head_on_given_weights_predicts_after_its_first_encoder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other pretraining images give weights that are not trained a new artifact of the same content: the evaluation keeps its
    name, and its file the name of the artifact that was removed."""
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder(EncoderParams(name="test_resnet", image_px=32), 0)
    (tmp_path / "weights.safetensors").write_bytes(save_weights(encoder))
    given = {"arms": [{"name": "given", "initial_weights": "weights.safetensors"}], "protocols": fields()["protocols"][:1]}
    study = make(tmp_path, given, evaluated=False)
    names = []
    for splits in (["train"], ["train", "val"]):
        study = again(study.store, **given, pretraining_splits=splits)
        ((arm, _, spec),) = study.encoders()
        finish(study, spec, {"encoder.safetensors": save_weights(encoder)})
        (cell,) = study.specs.cells()
        assert isinstance(cell.protocol, LinearProbe)
        embed = study.embed_spec(arm, 0, cell.protocol)
        assert embed is not None
        rows = study.specs.index.index.to_numpy()
        table = np.random.default_rng(0).normal(size=(len(rows), feature_width(encoder)))
        finish(study, embed, {"rows.npy": _npy(rows), "features.npy": _npy(table.astype(np.float32))})
        pending = study.pending(cell)
        assert (pending is None) == bool(names), "the same content, so nothing more is to be evaluated"
        if pending is not None:
            opened = Opened(study.store, study.dataset, study.recipe, study.specs, cast(Any, None))
            context = cast(Context, Ready(opened))
            evaluate(EvaluateTask(
                context, "given", "probe", 0, 0, pending.specs, pending.features.name, pending.encoder, pending.point
            ))  # fmt: skip
            study.refresh()
        names.append(spec.name)
    ((evaluation, *_),) = [list((study.evaluations(cell) or {}).values()) for cell in study.specs.cells()]
    before = load_model(study.store, evaluation.name)
    assert gc(study.store, "--delete", capsys=capsys)[0] == 0
    assert names[0] not in finished(study.store) and {names[1], evaluation.name} <= finished(study.store)
    with pytest.raises(DataError, match="no finished study names another: run its study again"):
        load_model(study.store, evaluation.name)
    index = _arm_indexes(study)["given"]
    study.store.write("studies/finished/arms/given.json", json.dumps(index).encode())
    after = load_model(study.store, evaluation.name)
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(after.probabilities(images), before.probabilities(images))
