"""What a mix of datasets shows: numbers, repetitions, ids told apart; through the feeds and through the command line."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from watched import most_at_once

from medssl.artifacts import finished
from medssl.collectives import Process
from medssl.datasets.dataset import Dataset, open_dataset
from medssl.datasets.read import Decoding
from medssl.datasets.synthetic import write_synthetic
from medssl.images import decode
from medssl.mixes import Source, joined_index, offsets, seen_elsewhere, shown
from medssl.recipe_file import load
from medssl.stages.ingest import IngestOptions, ingest
from medssl.store import Store, open_store
from medssl.study import Study
from medssl.training.bags import Bags, ResidentBagFeed
from medssl.training.feed import JoinedImages, ResidentFeed, ResidentImages

CPU = Process(0, 1, torch.device("cpu"))
PX = 16


def source(images: int, rows: list[int], times: int = 1) -> Source:
    return Source("nowhere", images, rows, None, times)


def test_images_are_numbered_one_source_after_the_other() -> None:
    sources = [source(10, [0, 7], times=2), source(4, [1, 3]), source(6, [5], times=3)]
    assert offsets(sources) == [0, 10, 14]
    assert shown(sources).tolist() == [0, 0, 7, 7, 11, 13, 19, 19, 19]
    assert shown(sources[:1]).dtype == np.int64


def part(folder: Path, count: int, value: int) -> ResidentImages:
    array = np.full((count, 4, 4, 3), value, np.uint8)
    array[:, 0, 0, 0] = np.arange(count)
    return ResidentImages.write(folder / str(value), array, [f"{value}-{k}" for k in range(count)])


def test_joined_images_are_those_of_their_files(tmp_path: Path) -> None:
    parts = [part(tmp_path, 5, 10), part(tmp_path, 1, 20), part(tmp_path, 7, 30)]
    joined = JoinedImages(parts)
    assert len(joined) == 13
    whole = np.concatenate([each.images for each in parts])
    numbers = torch.tensor([12, 0, 5, 4, 6, 6, 12])
    assert np.array_equal(joined.take(numbers).numpy(), whole[numbers.numpy()])


def test_an_epoch_shows_each_image_as_often_as_its_source_says(tmp_path: Path) -> None:
    images = JoinedImages([part(tmp_path, 5, 10), part(tmp_path, 20, 20)])
    sources = [source(5, [0, 1, 2, 4], times=4), source(20, list(range(2, 18)))]
    feed = ResidentFeed(images, shown(sources), 8, 3, CPU)
    assert feed.steps_per_epoch == 4
    orders = []
    for epoch in range(2):
        batches = list(feed.batches(epoch))
        counts = Counter(torch.cat([batch.rows_B for batch in batches]).tolist())
        assert counts == {0: 4, 1: 4, 2: 4, 4: 4, **dict.fromkeys(range(7, 23), 1)}
        assert all((batch.images_BHWC[:, 1, 1, 1] == torch.where(batch.rows_B < 5, 10, 20)).all() for batch in batches)
        orders.append([batch.rows_B.tolist() for batch in batches])
    assert orders[0] != orders[1]


def test_ids_of_two_datasets_are_never_one_patient_or_bag(tmp_path: Path) -> None:
    index = pd.DataFrame({"patient_id": ["p", "p", None, "q"], "bag_id": ["a", "a", None, "b"], "label": "x"})
    joined = joined_index([index, index])
    assert joined["bag_id"].isna().tolist() == [False, False, True, False] * 2
    bags = Bags.of_index(joined, range(8))
    assert sorted(bags.of(bag) for bag in range(len(bags))) == [[0, 1], [2], [3], [4, 5], [6], [7]]
    assert len(set(bags.groups.tolist())) == 6
    feed = ResidentBagFeed(JoinedImages([part(tmp_path, 4, 10), part(tmp_path, 4, 20)]), bags, 6, 0, CPU)
    [batch] = feed.batches(0)
    assert batch.second_BHWC is not None and batch.second_rows_B is not None
    for rows, pixels in ((batch.rows_B, batch.images_BHWC), (batch.second_rows_B, batch.second_BHWC)):
        assert (pixels[:, 1, 1, 1] == torch.where(rows < 4, 10, 20)).all()
    assert joined_index([index]).equals(index[["patient_id", "bag_id"]])


def test_a_patient_of_two_parts_of_one_dataset_is_one() -> None:
    index = pd.DataFrame({"patient_id": ["p", "p", None, "q"], "bag_id": ["a", "a", None, "b"], "label": "x"})
    joined = joined_index([index, index, index], ["one", "other", "one"])
    bags = Bags.of_index(joined, [0, 3, 4, 9, 11])
    assert sorted(bags.of(bag) for bag in range(len(bags))) == [[0, 9], [3, 11], [4]]
    assert len(set(bags.groups.tolist())) == 3


def test_images_that_are_held_back_are_found_by_content() -> None:
    index = pd.DataFrame({"sha256": ["a", "b", "c", "d"]})
    assert seen_elsewhere(index, np.array([0, 2, 3]), {"b", "d"}).tolist() == [3]


# ------------------------------------------------------------------------------------------------------- through Ray


@pytest.fixture(scope="module")
def place(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the study's dataset and a second one that has two of its test images."""
    root = tmp_path_factory.mktemp("mixes")
    drawn = write_synthetic(root / "drawn", images=tiny.IMAGES, seed=0)
    ingest(drawn, str(root / "store" / "datasets" / "lesions"), IngestOptions(shard_rows=10))
    index = open_dataset(str(root / "store" / "datasets" / "lesions")).index()
    table = pd.read_csv(write_synthetic(root / "more", images=60, seed=5))
    table["split"] = "train"
    known = index[index["split"] == "test"]["image_id"].iloc[:2]
    for name in known:
        (root / "more" / "images" / f"known-{name}.jpg").write_bytes((root / "drawn" / "images" / f"{name}.jpg").read_bytes())
    extra = pd.DataFrame({"image": [f"images/known-{name}.jpg" for name in known], "split": "train"})
    pd.concat([table, extra]).to_csv(root / "more" / "table.csv", index=False)
    tiny.ingest_table(root / "more" / "table.csv", str(root / "store" / "datasets" / "more"), ["--licence", "CC BY-NC 4.0"])
    return root


def datasets(place: Path) -> tuple[Dataset, Dataset]:
    first, second = (open_dataset(str(place / "store" / "datasets" / name)) for name in ("lesions", "more"))
    return first, second


@pytest.mark.ray
def test_a_streamed_epoch_shows_what_a_resident_one_does(place: Path, ray_session: Any) -> None:
    from medssl.streams import stream_sources

    both = datasets(place)
    train = [index.index[index["split"] == "train"].tolist() for index in (dataset.index() for dataset in both)]
    left_out = tuple(train[1][:3])
    sources = [
        Source(both[0].uri, len(both[0]), train[0], ["train"], shards=tuple(both[0].shards)),
        Source(both[1].uri, len(both[1]), train[1][3:], ["train"], 3, left_out, tuple(both[1].shards)),
    ]
    stream = stream_sources(sources, Decoding(PX, "squash"), seed=1)
    numbers = []
    for batch in stream.iter_batches(batch_size=16, batch_format="numpy"):
        for number, image in zip(batch["row"], batch["image"], strict=True):
            numbers.append(int(number))
            which = int(number >= len(both[0]))
            name = both[which].index()["image_id"].iloc[number - which * len(both[0])]
            file = place / ("drawn", "more")[which] / "images" / f"{name}.jpg"
            assert np.array_equal(image, decode(file.read_bytes(), px=PX, resize="squash"))
    assert sorted(numbers) == shown(sources).tolist()


@pytest.mark.ray
@pytest.mark.parametrize(
    "changes",
    [
        {"mix": [{"classes": ["globular"]}, {"dataset": "datasets/more", "classes": ["reticular", "starburst"], "times": 2}]},
        {"objective": {"name": "supervised", "classes": ["globular", "reticular"]}, "mix": [{"dataset": "datasets/more"}]},
        {"objective": {"name": "supervised"}, "mix": [{"dataset": "datasets/more"}]},
    ],
    ids=["classes of a part", "classes told apart", "labelled ones"],
)
def test_a_study_streams_the_images_that_it_counts(place: Path, ray_session: Any, changes: dict[str, Any]) -> None:
    from medssl.streams import stream_sources

    fields = tiny.pretraining_only()
    fields["arms"] = [fields["arms"][0] | changes]
    study = Study(load(fields), open_store(str(place / "store")))
    sources = study.sources(study.recipe.arms[0])
    stream = stream_sources(sources, Decoding(PX, "squash"), seed=1)
    numbers = sorted(int(number) for batch in stream.iter_batches(batch_format="numpy") for number in batch["row"])
    assert numbers == shown(sources).tolist() and len(numbers) < sum(source.images for source in sources)


@pytest.mark.ray
@pytest.mark.parametrize("feeding", ["streaming", pytest.param("resident", marks=pytest.mark.acceptance)])
def test_a_study_of_a_mix(place: Path, tmp_path: Path, ray_session: Any, feeding: str) -> None:
    """Streamed, the mix trains on from an encoder taught on the other dataset; resident, another arm and a larger one do."""
    fields = tiny.pretraining_only(study=f"mix-{feeding}")
    fields["images"] = fields["images"] | {"feeding": feeding}
    plain = fields["arms"][0]
    mixed = plain | {"mix": [{}, {"dataset": "datasets/more", "times": 2}]}
    taught = plain | {"name": "taught", "epochs": 1, "objective": {"name": "supervised"}, "mix": [{"dataset": "datasets/more"}]}
    train = int((datasets(place)[0].index()["split"] == "train").sum())
    steps = (train + 2 * 60) // 24 + 2
    if feeding == "streaming":  # a duration that ends within the second epoch
        lasting = {name: value for name, value in mixed.items() if name != "epochs"} | {"steps": steps}
        fields["arms"] = [lasting | {"initial_weights": "arm:taught"}, taught]  # before the arm that it starts from
    else:
        chain = plain | {"name": "chain", "initial_weights": "arm:taught", "epochs": 1}
        larger = {"name": "larger", "initial_weights": "arm:chain", "encoder": fields["encoder"] | {"image_px": 40}}
        fields["arms"] = [mixed, chain, taught, larger]
    fields["compute"] = {"workers": 2, "monitor_every_epochs": 1, "concurrent_trials": 1, "reading_cpus": 1}
    path, store = str(tiny.write(tmp_path / "study.yaml", fields)), str(place / "store")

    def cost(*overrides: str) -> int:
        lines = json.loads(tiny.medssl("plan", path, "--store", store, "--json", *overrides).stdout)
        return int(next(line["images"] for line in lines if line["label"] == "pretrain barlow_twins seed 0"))

    shown, began = {"resident": 2 * (train + 2 * 60), "streaming": 24 * steps}[feeding], time.time()
    assert cost() == shown
    done = tiny.medssl("run", path, "--store", store, "--json")
    assert "2 images of" in done.stderr and "are validation or test images of the study and are left out" in done.stderr
    fewer = {"resident": 2 * (train + 60), "streaming": shown}[feeding]
    assert cost() == 0 and cost("--set", "arms.0.mix.1.times=1") == fewer
    if feeding == "streaming":
        _check_steps(open_store(store), steps)
        shards = len(datasets(place)[0].shards)
        assert shards > 5 and most_at_once(ray_session, "_decode_shards", began, shards) == 1  # reading_cpus
    report = place / "store" / "studies" / f"mix-{feeding}" / "report.md"
    assert "on 1 x the dataset (train) + 2 x more (train)" in report.read_text()
    assert "2 images of datasets/more are validation or test images of this study too" in report.read_text()
    assert "kNN" in report.with_suffix(".html").read_text()
    out = ["--format", "timm", "--out", str(tmp_path / "e.safetensors"), "--study", f"mix-{feeding}"]
    made = tiny.medssl("export", "barlow_twins", *out, "--store", store)
    assert "non-commercial: more" in made.stdout + made.stderr
    card = next(tmp_path.glob("*.md")).read_text()
    assert "each 2 times an epoch" in card
    _check_chain(place / "store", report.read_text(), tmp_path, f"mix-{feeding}")


def _check_steps(store: Store, steps: int) -> None:
    """Both ranks saw every step of the mix once, with a finite loss."""
    made = [name for name in finished(store) if name.startswith("pretrain-")]
    found = [pd.read_parquet(io.BytesIO(store.read(f"artifacts/{name}/history.parquet"))) for name in made]
    (history,) = [frame for frame in found if frame["step"].max() == steps]
    assert (history.groupby(["rank", "step"]).size() == 1).all() and set(history["rank"]) == {0, 1}
    assert len(history) == 2 * steps and np.isfinite(history["loss"]).all()


def _check_chain(store: Path, report: str, tmp_path: Path, study: str) -> None:
    """The arm that starts from another has that one's weights; report and model card say so."""
    assert "the encoder of taught" in report and "supervised on 1 x more (train)" in report
    markers = [json.loads(path.read_text()) for path in store.glob("markers/pretrain-*.json")]
    chained = [marker for marker in markers if "initial_weights" in marker["inputs"]]
    starts = {marker["inputs"]["initial_weights"]: marker["facts"]["initial_weights"] for marker in chained}
    for parent, facts in starts.items():
        weights = (store / "artifacts" / str(parent) / "encoder.safetensors").read_bytes()
        assert facts["sha256"] == hashlib.sha256(weights).hexdigest()
        assert facts["summary"] == "all weights of pretrain taught seed 0"
    assert starts
    arms = {path.stem for path in (store / "studies" / study / "arms").glob("*.json")}
    if "larger" in arms:
        (larger,) = [json.loads(path.read_text()) for path in store.glob("markers/initialise-*.json")]
        started = "all weights of pretrain chain seed 0, which started from arm:taught"
        assert larger["facts"]["initial_weights"]["summary"] == started
    out = tmp_path / "chain.safetensors"
    last = "chain" if "chain" in arms else "barlow_twins"
    tiny.medssl("export", last, "--format", "timm", "--out", str(out), "--study", study, "--store", str(store))
    card = Path(f"{out}.card.md").read_text()
    assert "for taught, which it started from" in card and "**Non-commercial**: the licence of more" in card
    tiny.medssl("export", "taught", "--format", "timm", "--out", str(out), "--study", study, "--store", str(store))
    assert "pretrained on labels by supervised" in Path(f"{out}.card.md").read_text()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"name": "supervised", "classes": ["globular", "wart"]}}, ["objective.classes has 'wart'", "its labels"]),
        ({"objective": {"name": "supervised", "classes": ["globular"]}}, ["needs two classes or more"]),
    ],
)
def test_labels_that_are_not_there_are_one_line(place: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    fields, store = tiny.pretraining_only(), str(place / "store")
    fields["arms"] = [fields["arms"][0] | {"mix": [{"dataset": "datasets/more"}]} | changes]
    done = tiny.medssl("run", str(tiny.write(tmp_path / "s.yaml", fields)), "--store", store, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.ray
@pytest.mark.parametrize(
    ("part_of_mix", "words"),
    [
        ({"dataset": "datasets/none"}, ["no dataset", "datasets/none", "medssl ingest"]),
        ({"dataset": "file://{store}/datasets/lesions"}, ["the study's own dataset", "leave `dataset` out"]),
        ({"dataset": "datasets/more", "splits": ["val"]}, ["no images in split 'val'", "its splits: train"]),
        ({"dataset": "datasets/more", "classes": ["globula"]}, ["mix names class 'globula'", "globular"]),
    ],
)
def test_a_mix_that_is_not_there_is_one_line(place: Path, tmp_path: Path, part_of_mix: dict[str, Any], words: list[str]) -> None:
    fields, store = tiny.pretraining_only(), str(place / "store")
    part_of_mix = part_of_mix | {"dataset": part_of_mix["dataset"].format(store=store)}
    fields["arms"] = [fields["arms"][0] | {"mix": [{}, part_of_mix]}]
    done = tiny.medssl("run", str(tiny.write(tmp_path / "s.yaml", fields)), "--store", str(place / "store"), check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
