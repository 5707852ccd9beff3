"""Pairs of bags streamed through a real local Ray: the resident feed's batches, whatever the other ranks do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl import bag_rows
from medssl.bag_rows import StreamBagFeed, ensure_packed, stream_rows
from medssl.collectives import Process
from medssl.datasets.dataset import Dataset, open_dataset
from medssl.datasets.packed import open_packed
from medssl.datasets.read import Decoding
from medssl.datasets.synthetic import write_synthetic
from medssl.errors import DataError
from medssl.images import decode
from medssl.stages.ingest import IngestOptions, ingest
from medssl.store import Store, open_store
from medssl.training.bags import Bags, ResidentBagFeed
from medssl.training.feed import ResidentImages

pytestmark = pytest.mark.ray
IMAGES, PX, BATCH = 600, 24, 8
DECODING = Decoding(PX, "squash")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bags")
    write_synthetic(root, images=IMAGES, seed=1, px=32)
    return root


@pytest.fixture(scope="module")
def dataset(ray_session: Any, folder: Path) -> Dataset:
    ingest(folder / "table.csv", str(folder / "dataset"), IngestOptions(shard_rows=50))
    return open_dataset(str(folder / "dataset"))


@pytest.fixture(scope="module")
def packed_uri(dataset: Dataset, folder: Path) -> str:
    return ensure_packed(dataset, open_store(str(folder / "store"), create=True))


@pytest.fixture(scope="module")
def resident(dataset: Dataset, folder: Path) -> ResidentImages:
    files = [folder / "images" / f"{name}.jpg" for name in dataset.index()["image_id"]]
    images = np.stack([decode(file.read_bytes(), px=PX, resize="squash") for file in files])
    return ResidentImages.write(folder / "resident", images, dataset.index()["image_id"].tolist())


def train_bags(dataset: Dataset) -> Bags:
    index = dataset.index()
    return Bags.of_index(index, index.index[index["split"] == "train"].tolist())


def test_packing_is_done_once_and_goes_on_where_it_was(dataset: Dataset, folder: Path) -> None:
    store = open_store(str(folder / "again"), create=True)
    seen: list[tuple[int, int]] = []
    uri = ensure_packed(dataset, store, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (IMAGES, IMAGES) and len(seen) == 12
    packed = open_store(uri)
    objects = [entry.key for entry in packed.list()]
    assert len(objects) == 13
    assert ensure_packed(dataset, store, progress=lambda *_: pytest.fail("made again")) == uri
    packed.delete("places.parquet")  # as if it had been cut short
    packed.delete(objects[0])
    assert ensure_packed(dataset, store) == uri and [entry.key for entry in packed.list()] == objects


def test_rows_come_in_the_order_that_was_asked_for(packed_uri: str, resident: ResidentImages) -> None:
    packed = open_packed(open_store(packed_uri))
    assert packed is not None
    rows = np.random.default_rng(0).integers(0, IMAGES, 700)
    images = np.concatenate(list(stream_rows(packed, rows, DECODING)))
    assert np.array_equal(images, resident.images[rows])


@pytest.mark.parametrize(("world", "start_step"), [(1, 0), (2, 0), (2, 3)])
def test_streamed_batches_are_the_resident_ones(
    ray_session: Any, dataset: Dataset, packed_uri: str, resident: ResidentImages, world: int, start_step: int
) -> None:
    bags = train_bags(dataset)

    @ray_session.remote(num_cpus=0)
    def consume(rank: int) -> list[list[Any]]:
        bag_rows._PIECE_IMAGES = 5 + 8 * rank  # pieces that end anywhere in a batch
        feed = StreamBagFeed(packed_uri, bags, BATCH, 5, Process(rank, world, torch.device("cpu")), DECODING)
        return [[list(batch) for batch in feed.batches(epoch, start_step)] for epoch in range(2)]

    ranks = ray_session.get([consume.remote(rank) for rank in range(world)])
    for rank, epochs in enumerate(ranks):
        feed = ResidentBagFeed(resident, bags, BATCH, 5, Process(rank, world, torch.device("cpu")))
        for epoch, streamed in enumerate(epochs):
            expected = list(feed.batches(epoch, start_step))
            assert len(streamed) == len(expected) == feed.steps_per_epoch - start_step
            for one, other in zip(streamed, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_rank_that_waits_does_not_stop_the_others(ray_session: Any, dataset: Dataset, packed_uri: str) -> None:
    """With one CPU to read: rank 0 takes one batch and waits, as in a collective, until rank 1 has had its whole epoch."""
    ray, bags = ray_session, train_bags(dataset)

    @ray.remote(num_cpus=5)
    class Busy:
        def ready(self) -> bool:
            return True

    @ray.remote(num_cpus=0, max_concurrency=2)
    class Rank:
        def __init__(self, rank: int) -> None:
            bag_rows._PIECE_IMAGES = 3  # far more pieces than are read ahead
            feed = StreamBagFeed(packed_uri, bags, BATCH, 5, Process(rank, 2, torch.device("cpu")), DECODING)
            self.batches, self.steps = feed.batches(0), feed.steps_per_epoch

        def take(self, count: int) -> int:
            return sum(next(self.batches, None) is not None for _ in range(count))

        def all(self) -> int:
            return self.steps

    busy = Busy.remote()
    assert ray.get(busy.ready.remote())
    ranks = [Rank.remote(rank) for rank in range(2)]
    try:
        assert ray.get(ranks[0].take.remote(1), timeout=600) == 1
        steps = ray.get(ranks[1].all.remote())
        assert ray.get(ranks[1].take.remote(steps), timeout=600) == steps
        assert ray.get(ranks[0].take.remote(steps - 1), timeout=600) == steps - 1
    finally:
        for actor in (busy, *ranks):
            ray.kill(actor)


@pytest.mark.parametrize(("world", "asked", "each"), [(1, None, 2), (1, 1, 1), (1, 3, 2), (2, 3, 1), (2, 4, 2), (4, 3, 1)])
def test_ranks_share_what_a_study_may_read_with(
    dataset: Dataset, packed_uri: str, world: int, asked: int | None, each: int
) -> None:
    process = Process(0, world, torch.device("cpu"))
    assert StreamBagFeed(packed_uri, train_bags(dataset), BATCH, 5, process, DECODING, asked)._tasks == each


def test_errors_of_the_tasks_reach_the_rank_in_one_line(dataset: Dataset, folder: Path) -> None:
    store: Store = open_store(str(folder / "broken"), create=True)
    uri = ensure_packed(dataset, store)
    key = open_store(uri).list()[0].key
    os.truncate(Path(uri.removeprefix("file://")) / key, 100)
    feed = StreamBagFeed(uri, train_bags(dataset), BATCH, 0, Process(0, 1, torch.device("cpu")), DECODING)
    with pytest.raises(DataError, match="is damaged: remove the folder"):
        list(feed.batches(0))
    open_store(uri).delete("places.parquet")
    with pytest.raises(DataError, match="there are no packed images"):
        StreamBagFeed(uri, train_bags(dataset), BATCH, 0, Process(0, 1, torch.device("cpu")), DECODING)


@pytest.mark.s3
def test_pairs_stream_from_s3(dataset: Dataset, s3_store: Store, resident: ResidentImages) -> None:
    bags, process = train_bags(dataset), Process(0, 1, torch.device("cpu"))
    uri = ensure_packed(dataset, s3_store)
    assert uri.startswith("s3://") and ensure_packed(dataset, s3_store) == uri
    expected = ResidentBagFeed(resident, bags, BATCH, 5, process).batches(0)
    for one, other in zip(StreamBagFeed(uri, bags, BATCH, 5, process, DECODING).batches(0), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
