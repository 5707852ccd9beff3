"""`medssl forget`: the images are in no byte of the dataset any more, the rest is as it was, and what knew them is marked."""

from __future__ import annotations

import dataclasses
import io
import json
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.finished_study import fields, make, noted_runs, write_dataset

from medssl import forgetting
from medssl.artifacts import finished, forgotten_note
from medssl.cli import main
from medssl.datasets.dataset import open_dataset
from medssl.datasets.packed import packed_name
from medssl.datasets.pseudonyms import pseudonym
from medssl.errors import DataError, LeaseHeld
from medssl.forgetting import forget
from medssl.leases import Lease, lease, this_process
from medssl.leftovers import needs, remember
from medssl.recipe import Recipe
from medssl.store import Store
from medssl.study import Study, run

KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    made = make(tmp_path)
    remember(made)
    return made


def elsewhere(near: Study, place: Path, dataset: str = "datasets/circles", **changes: Any) -> Study:
    """A finished study of another dataset."""
    if not near.store.exists(f"{dataset}/card.json"):
        (place / "elsewhere").mkdir()
        write_dataset(place / "elsewhere", near.store.sub(dataset), blue=90)
    repeats = fields()["repeats"] | {"labels": 8}  # or chance, which is the same, makes evaluations of the same names
    made = make(place, {"study": "elsewhere", "dataset": dataset, "repeats": repeats} | changes)
    remember(made)
    return made


def stored_images(store: Store) -> dict[str, bytes]:
    """Every image of the dataset by its id, read from the shards that the card names."""
    found = {}
    for shard in open_dataset(store.uri_of("datasets/squares")).shards:
        table = pq.read_table(io.BytesIO(store.read(f"datasets/squares/{shard.path}")))
        found |= dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    return found


def test_a_patients_images_are_gone_and_the_rest_is_as_it_was(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    store = study.store
    before, old = stored_images(store), open_dataset(store.uri_of("datasets/squares"))
    index = old.index()
    gone = set(index[index["patient_id"] == "p3"]["image_id"])
    assert len(gone) == 2
    assert main(["forget", "p3", "--dataset", "datasets/squares", "--store", store.uri]) == 0
    said = capsys.readouterr().out
    assert f"2 images removed from {old.uri}; {len(store.list('forgotten/'))} artifacts marked" in said
    assert "run again, then `medssl gc --delete`: finished" in said and "MEDSSL_CACHE" in said

    new = open_dataset(old.uri)
    assert stored_images(store) == {name: data for name, data in before.items() if name not in gone}
    kept = index[~index["image_id"].isin(gone)].reset_index(drop=True)
    assert new.index().equals(kept)
    assert new.card["images"] == 78 and new.card["patients"] == old.card["patients"] - 1
    assert sum(new.card["splits"].values()) == 78 and new.images_digest != old.images_digest
    assert new.card["licence"] == "CC0" and new.card["synthetic"] is True
    place = store.sub("datasets/squares")
    named = {shard.path for shard in new.shards} | {new.card["index"]["path"], "card.json"}
    assert {entry.key for entry in place.list() if not entry.key.startswith("leases/")} == named
    for entry in place.list():  # Parquet compresses: what it holds is looked at, not its bytes
        if entry.key.endswith(".parquet"):
            held = pq.read_table(io.BytesIO(place.read(entry.key)))
            assert not gone & set(held["image_id"].to_pylist()) and "p3" not in held["patient_id"].to_pylist()
    untouched = {shard.path for shard in old.shards} & {shard.path for shard in new.shards}
    assert len(untouched) == 1, "the shard without images of the patient is the same object"


def test_what_was_made_with_them_is_marked_and_made_anew_under_other_names(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    store, artifacts = study.store, finished(study.store)
    assert all(forgotten_note(store, name) is None for name in artifacts)
    assert main(["forget", "p3", "--dataset", "datasets/squares", "--store", store.uri, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    again = Study(study.recipe, store)
    valid = {name for name in artifacts if name in needs(again)[0]}
    assert {name.rpartition("-")[0] for name in valid} == {"initialise"}, "p3 is a validation patient: no encoder has seen it"
    assert set(done["artifacts"]) == artifacts - valid and done["studies"] == ["finished"] and done["images"] == 2
    assert all(forgotten_note(store, name) is None for name in valid)
    for name in artifacts - valid:
        note = forgotten_note(store, name)
        assert note is not None and note.startswith(f"{name} was made with 2 images of squares that were removed on 20")
    marks = b"".join(store.read(entry.key) for entry in store.list("forgotten/"))
    assert b"p3" not in marks
    assert main(["gc", store.uri, "--delete"]) == 0
    assert finished(store) == valid and not store.list("forgotten/")


def test_what_an_earlier_recipe_left_is_marked_too(study: Study, tmp_path: Path) -> None:
    """Its artifacts are no study's any more, and may have been made with the images."""
    store, before = study.store, finished(study.store)
    changed = make(tmp_path, {"protocols": [fields()["protocols"][0] | {"probe": {"epochs": 7}}]})
    remember(changed)
    left = before - needs(changed)[0]
    assert left and any(name.startswith("evaluate-") for name in left)
    assert left <= set(forget("p3", "datasets/squares", store).artifacts)
    assert all(forgotten_note(store, name) for name in left)


def test_who_is_not_there_changes_nothing(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    store = study.store
    before = {entry.key: store.read(entry.key) for entry in store.list() if not entry.key.startswith("leases/")}
    for arguments, words in (
        (["p99", "--dataset", "datasets/squares"], "no image in"),
        (["p3", "--dataset", "datasets/none"], "there is no dataset at"),
    ):
        assert main(["forget", *arguments, "--store", store.uri]) == 2
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and said.out == ""
    kept = {e.key: store.read(e.key) for e in store.list() if "leases/" not in e.key}
    assert kept == {key: data for key, data in before.items() if "leases/" not in key}


def test_a_broken_off_removal_leaves_the_dataset_whole(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    store, before = study.store, stored_images(study.store)

    def lost(self: Lease) -> None:
        raise LeaseHeld("taken over")

    monkeypatch.setattr(Lease, "check", lost)
    with pytest.raises(LeaseHeld):
        forget("p3", "datasets/squares", store)
    assert stored_images(store) == before and len(open_dataset(store.uri_of("datasets/squares")).index()) == 80
    monkeypatch.undo()
    assert forget("p3", "datasets/squares", store).images == 2


def test_while_a_study_of_it_runs_nothing_is_removed(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    store, before = study.store, stored_images(study.store)
    with lease(store, "study-finished"):
        assert main(["forget", "p3", "--dataset", "datasets/squares", "--store", store.uri]) != 0
    said = capsys.readouterr()
    assert "'study-finished' is being worked on by" in said.err and said.err.count("\n") == 1
    assert stored_images(store) == before and not store.list("forgotten/")


def test_a_run_that_died_on_another_machine_does_not_forbid_it(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "lease", partial(lease, ttl_seconds=6))  # the least, for the test's time
    owner = dataclasses.replace(this_process(), host="elsewhere", machine="elsewhere")
    study.store.write("leases/study-finished/00000001.claim", json.dumps(dataclasses.asdict(owner)).encode())
    assert forget("p3", "datasets/squares", study.store).images == 2


def test_what_a_broken_off_removal_left_goes_with_the_next(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the card was written, before the old objects were deleted."""
    store = study.store
    place = store.sub("datasets/squares")
    old = {entry.key for entry in place.list() if entry.key.startswith(("shards/", "index-"))}

    def killed(store: Store) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting, "_sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        forget("p3", "datasets/squares", store)
    monkeypatch.undo()
    assert {entry.key for entry in place.list()} >= {key for key in old if key.startswith("shards/")}
    with pytest.raises(DataError, match="no image in"):
        forget("p3", "datasets/squares", store)
    card = open_dataset(store.uri_of("datasets/squares")).card
    left = {entry.key for entry in place.list() if entry.key.startswith(("shards/", "index-"))}
    assert left == {shard["path"] for shard in card["shards"]} | {card["index"]["path"]}


def test_packed_copies_go_whatever_images_they_were_made_of(study: Study) -> None:
    study.store.write("packed/of-a-larger-dataset/0.bin", b"x")
    forget("p3", "datasets/squares", study.store)
    assert not study.store.list("packed/")


def test_packed_copies_of_other_datasets_stay(study: Study, tmp_path: Path) -> None:
    """A study of one may be streaming bags from it."""
    other, own = elsewhere(study, tmp_path), packed_name(study.dataset)
    for name in (packed_name(other.dataset), own):
        study.store.write(f"packed/{name}/places.parquet", b"x")
    forget("p3", "datasets/squares", study.store)
    assert [entry.key for entry in study.store.list("packed/")] == [f"packed/{packed_name(other.dataset)}/places.parquet"]


def test_the_list_of_what_ingest_set_aside_goes(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    """It names images and paths and no patients, so whose they are cannot be told."""
    place = study.store.sub("datasets/squares")
    card = json.loads(place.read("card.json"))
    place.write("rejected-0123.csv", b"image_id,uri,reason\np3-9.png,/images/p3/9.png,cut short\n")
    place.write("card.json", json.dumps(card | {"rejected": 1, "rejected_list": "rejected-0123.csv"}).encode())
    done = forget("p3", "datasets/squares", study.store)
    assert "rejected-0123.csv" in done.to_text() and "set aside at ingest" in done.to_text()
    assert not place.list("rejected-")
    left = open_dataset(place.uri).card
    assert left["rejected"] == 1 and left["rejected_list"] is None
    assert main(["inspect", place.uri]) == 0
    assert "images set aside at ingest: 1, their list was removed" in capsys.readouterr().out
    assert "set aside" not in forget("p4", "datasets/squares", study.store).to_text()


@pytest.mark.parametrize("name", ["finished", "new"])
def test_a_run_that_waits_for_it_goes_on_without_them(study: Study, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has read the dataset before; only what would need Ray is left out of it."""
    store = study.store
    begun, waits = noted_runs(monkeypatch)

    def rewrite(*arguments: Any) -> None:
        runs.append(pool.submit(run, recipe, store, on_event=lambda event: waits.set() if "waiting" in str(event) else None))
        assert waits.wait(60)
        original(*arguments)

    recipe, original, runs = Recipe.model_validate(fields(study=name)), forgetting._rewrite, list[Future[Any]]()
    monkeypatch.setattr(forgetting, "_rewrite", rewrite)
    with ThreadPoolExecutor(1) as pool:
        done = forget("p3", "datasets/squares", store)
        runs[0].result(60)
    assert len(begun) == 1 and len(begun[0].specs.index) == 78
    assert not set(done.artifacts) & needs(begun[0])[0]


def test_keyed_hashes_are_found_by_the_key(study: Study, tmp_path: Path) -> None:
    store, place = study.store, tmp_path / "hashed"
    place.mkdir()
    write_dataset(place, store.sub("datasets/hashed"), patient=lambda name: pseudonym(KEY, name), pseudonymised=["patient_id"])
    with pytest.raises(DataError, match="is of this patient: its ids are keyed hashes, give the key"):
        forget("p3", "datasets/hashed", store)
    done = forget("p3", "datasets/hashed", store, KEY)
    assert done.images == 2 and not done.artifacts, "no study knows this dataset"
    assert open_dataset(store.uri_of("datasets/hashed")).card["pseudonymised_columns"] == ["patient_id"]


def test_studies_that_cannot_be_read_are_named(study: Study) -> None:
    study.store.write("studies/other/planned.json", b"{}")
    done = forget("p3", "datasets/squares", study.store)
    assert set(done.unreadable) == {"other"} and done.studies == ("finished",)
    assert "it cannot be told whether it used them" in done.to_text()


@pytest.mark.parametrize("patient", ["p0", "p3"])
def test_what_starts_from_a_marked_encoder_is_marked_too(tmp_path: Path, patient: str) -> None:
    """By a chain of two studies of another dataset; where the encoder has not seen the patient, nothing of them is."""
    pretrained = {"name": "pretrained", "objective": {"name": "simclr"}, "epochs": 1, "batch_size": 8}
    study = make(tmp_path, {"arms": [pretrained]})
    remember(study)
    store, source = study.store, study.encoders()[0][2].name
    arms = [{"name": "random"}, {"name": "given", "initial_weights": f"artifacts/{source}/encoder.safetensors"}]
    first = elsewhere(study, tmp_path, arms=arms)
    given = next(spec.name for arm, _, spec in first.encoders() if arm.name == "given")
    third = {"name": "third", "initial_weights": f"artifacts/{given}/encoder.safetensors"}
    second = elsewhere(study, tmp_path, study="second", arms=[third], repeats=fields()["repeats"] | {"labels": 10})
    own = {spec.name for arm, _, spec in first.encoders() if arm.name == "random"}
    done = forget(patient, "datasets/squares", store)
    if patient == "p3":  # a validation patient
        assert source not in done.artifacts and not done.descended and not set(done.artifacts) & needs(second)[0]
        return
    assert done.studies == ("finished",) and done.descended == ("elsewhere", "second")
    assert "elsewhere, second" in done.to_text() and "initial_weights" in done.to_text()
    for other, arm in ((first, "given"), (second, "third")):
        for cell in other.specs.cells():
            names = {spec.name for spec in (other.evaluations(cell) or {}).values()}
            assert names and names <= set(done.artifacts) if cell.arm.name == arm else not names & set(done.artifacts)
    assert given in done.artifacts and not own & set(done.artifacts)
    assert all(forgotten_note(store, name) for name in done.artifacts)


def test_what_starts_from_a_marked_encoder_stays_marked_under_a_name_that_holds(tmp_path: Path) -> None:
    """A study of the same dataset starts from an encoder that no study names any more: its own names do not change."""
    study = make(tmp_path)
    store, source = study.store, study.encoders()[0][2].name
    given = make(tmp_path, {"arms": [{"name": "given", "initial_weights": f"artifacts/{source}/encoder.safetensors"}]})
    remember(given)
    encoder = given.encoders()[0][2].name
    assert {source, encoder} <= set(forget("p3", "datasets/squares", store).artifacts)
    assert forgotten_note(store, encoder)
