"""The resident file and streaming, on a real local Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched import most_at_once

from medssl.datasets.dataset import Dataset, open_dataset
from medssl.datasets.read import Decoding
from medssl.datasets.synthetic import write_synthetic
from medssl.errors import DataError, RecipeError
from medssl.images import decode
from medssl.mixes import Source
from medssl.rows import ensure_resident_on_nodes, open_resident, resident_images
from medssl.stages.ingest import IngestOptions, ingest
from medssl.streams import StreamFeed, shuffled, stream_images, stream_sources

pytestmark = pytest.mark.ray
IMAGES, PX = 70, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    write_synthetic(root, images=IMAGES, seed=1, px=48)
    return root


@pytest.fixture(scope="module")
def dataset(ray_session: Any, folder: Path) -> Dataset:
    ingest(folder / "table.csv", str(folder / "dataset"), IngestOptions(shard_rows=16))
    return open_dataset(str(folder / "dataset"))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def expected(dataset: Dataset, folder: Path, px: int = PX, channels: int = 3) -> np.ndarray:
    files = [folder / "images" / f"{name}.jpg" for name in dataset.index()["image_id"]]
    return np.stack([decode(file.read_bytes(), px=px, resize="squash", channels=channels) for file in files])


@pytest.mark.parametrize("channels", [1, 3])
def test_resident_rows_are_the_images_in_index_order(
    dataset: Dataset, folder: Path, tmp_path: Path, channels: int
) -> None:
    seen: list[tuple[int, int]] = []
    images = resident_images(
        dataset, Decoding(PX, "squash", channels), cache_dir=tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert images.images.shape == (IMAGES, PX, PX, channels) and images.images.dtype == np.uint8
    assert np.array_equal(images.images, expected(dataset, folder, channels=channels))
    assert images.image_ids == dataset.index()["image_id"].tolist()
    assert seen == sorted(seen) and seen[-1] == (IMAGES, IMAGES)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {images.digest}


def test_a_second_call_maps_the_same_file(dataset: Dataset, tmp_path: Path) -> None:
    first = resident_images(dataset, Decoding(PX, "squash"), cache_dir=tmp_path)
    inode = (first.path / "images.npy").stat().st_ino
    again = resident_images(dataset, Decoding(PX, "squash"), cache_dir=tmp_path)
    assert (again.path / "images.npy").stat().st_ino == inode
    other = resident_images(dataset, Decoding(PX, "crop"), cache_dir=tmp_path)
    assert other.digest != first.digest


def test_every_node_and_opening_without_ray_data(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    arguments = ensure_resident_on_nodes(dataset, Decoding(PX, "pad"), cache_dir=tmp_path / "a")
    there = open_resident(**arguments)
    elsewhere = open_resident(**{**arguments, "cache_dir": str(tmp_path / "b")})  # a node that joined later
    assert there.path != elsewhere.path and there.digest == elsewhere.digest
    assert np.array_equal(there.images, elsewhere.images)


def test_a_dataset_ingested_anew_is_noticed(dataset: Dataset, tmp_path: Path) -> None:
    arguments = {
        "dataset_uri": dataset.uri,
        "digest": "0" * 32,
        "decoding": {"decode_px": PX, "resize": "squash"},
        "cache_dir": str(tmp_path),
    }
    with pytest.raises(DataError, match="ingested anew"):
        open_resident(**arguments)  # type: ignore[arg-type]


def test_a_failed_build_leaves_nothing(dataset: Dataset, tmp_path: Path) -> None:
    broken = open_dataset(dataset.uri)
    broken.card["shards"][1]["rows"] += 1
    with pytest.raises(DataError, match="its card says 17"):
        resident_images(broken, Decoding(PX, "squash"), cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


_BUILDER = """
import sys, time
from medssl import rows
real = rows.decoded_batches
def slow(*args):
    for batch in real(*args):
        yield batch
        open(sys.argv[4], "w").close()
        time.sleep(600)
rows.decoded_batches = slow
from medssl.datasets.dataset import open_dataset
from medssl.datasets.read import Decoding
fields = {"decode_px": int(sys.argv[3]), "resize": "squash"}
digest = Decoding(**fields).digest(open_dataset(sys.argv[1]))
rows.open_resident(dataset_uri=sys.argv[1], digest=digest, decoding=fields, cache_dir=sys.argv[2])
"""


def test_kill_9_in_mid_build_does_not_block_the_next(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    flag, cache = tmp_path / "flag", tmp_path / "cache"
    child = subprocess.Popen(
        [sys.executable, "-c", _BUILDER, dataset.uri, str(cache), str(PX), str(flag)], env=environment()
    )
    deadline = time.monotonic() + 600
    while not flag.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1  # the unfinished one
    images = resident_images(dataset, Decoding(PX, "squash"), cache_dir=cache)
    assert np.array_equal(images.images, expected(dataset, folder))
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [images.digest]


def test_stream_has_the_images_of_the_splits(dataset: Dataset, folder: Path) -> None:
    truth, index = expected(dataset, folder), dataset.index()
    seen = []
    for batch in stream_images(dataset, Decoding(PX, "squash"), splits=["val", "test"]).iter_batches(
        batch_size=5
    ):
        for row, image in zip(batch["row"], batch["image"], strict=True):
            assert np.array_equal(image, truth[row])
            seen.append(int(row))
    assert sorted(seen) == index.index[index["split"].isin(["val", "test"])].tolist()


def test_no_more_shards_are_decoded_at_once_than_a_study_may(ray_session: Any, dataset: Dataset) -> None:
    """As Ray's own timeline tells it; several were under way at once without the limit."""

    def decoding(tasks: int | None) -> int:
        began = time.time()
        source = Source(dataset.uri, len(dataset), rows=[], splits=None, shards=tuple(dataset.shards), times=4)
        stream = stream_sources([source], Decoding(PX, "squash"), tasks=tasks)
        assert sum(len(batch["row"]) for batch in stream.iter_batches(batch_size=20)) == 4 * IMAGES
        return most_at_once(ray_session, "_decode_shards", began, 4 * len(dataset.shards))

    assert decoding(1) == 1
    assert decoding(None) > 1


def test_stream_feed_gives_every_rank_as_much_in_another_order_each_epoch(
    ray_session: Any, dataset: Dataset, folder: Path
) -> None:
    ray, train = ray_session, dataset.index().index[dataset.index()["split"] == "train"]
    shards = stream_images(dataset, Decoding(PX, "squash"), splits=["train"], seed=0).streaming_split(
        2, equal=True
    )

    @ray.remote(num_cpus=0)
    def consume(shard: Any, rank: int) -> list[list[tuple[int, bytes]]]:
        import torch

        from medssl.collectives import Process

        process = Process(rank=rank, world=2, device=torch.device("cpu"))
        feed = StreamFeed(shard, len(train), 8, 0, process, Decoding(PX, "squash"))
        epochs = []
        for epoch in range(2):
            batches = list(feed.batches(epoch))
            assert len(batches) == feed.steps_per_epoch == len(train) // 8
            assert all(images.shape == (4, PX, PX, 3) for images, *_ in batches)
            epochs.append(
                [(int(r), i.numpy().tobytes()) for images, rows, *_ in batches for i, r in zip(images, rows, strict=True)]
            )
        return epochs

    ranks = ray.get([consume.remote(shard, rank) for rank, shard in enumerate(shards)])
    truth = expected(dataset, folder)
    orders = []
    for epoch in range(2):
        pairs = ranks[0][epoch] + ranks[1][epoch]
        rows = [row for row, _ in pairs]
        assert len(set(rows)) == len(rows) and set(rows) <= set(train)
        assert all(data == truth[row].tobytes() for row, data in pairs)
        orders.append([row for row, _ in ranks[0][epoch]])
    assert orders[0] != orders[1]


def test_the_shuffle_buffer_loses_and_repeats_nothing() -> None:
    numbers = np.arange(103)
    images = np.broadcast_to(numbers[:, None, None, None], (103, 2, 2, 3)).astype(np.uint8)
    for buffer_images, pieces in ((8, [103]), (20, [1, 50, 52]), (103, [40, 63]), (500, [103])):
        ends = np.cumsum(pieces)

        def batches(seed: int, buffer_images: int = buffer_images, ends: Any = ends, pieces: Any = pieces) -> list[list[int]]:
            arrays = [(images[end - n : end], numbers[end - n : end]) for n, end in zip(pieces, ends, strict=True)]
            found = list(shuffled(iter(arrays), buffer_images, 8, np.random.default_rng(seed)))
            assert all((pixels == rows[:, None, None, None]).all() and pixels.shape == (8, 2, 2, 3) for pixels, rows in found)
            return [rows.tolist() for _, rows in found]

        one = batches(0)
        seen = [row for rows in one for row in rows]
        assert len(one) == 103 // 8 and len(set(seen)) == len(seen) == 96 and set(seen) <= set(range(103))
        assert one == batches(0) != batches(1)
        # An image leaves the buffer no earlier than it comes in, and a large buffer mixes far.
        assert all(max(rows) < buffer_images + 8 * step for step, rows in enumerate(one))
        if buffer_images > 100:
            assert max(one[0]) > 50


@pytest.mark.acceptance
@pytest.mark.parametrize("world", [2])
def test_a_shuffle_buffer_larger_than_the_object_store(folder: Path, dataset: Dataset, tmp_path: Path, world: int) -> None:
    """Two ranks' buffers hold 180 MB, the store has 80: nothing may wait for what the buffers keep."""
    script = tmp_path / "stream.py"
    script.write_text(f"""
import sys
import ray
import torch
ray.init("local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
from medssl.collectives import Process
from medssl.datasets.read import Decoding
from medssl.datasets.dataset import open_dataset
from medssl.mixes import Source
from medssl.streams import StreamFeed, stream_sources

images, px, world = {IMAGES} * 10, 288, {world}
decoding = Decoding(px, "squash")
shards = tuple(open_dataset({dataset.uri!r}).shards)
stream = stream_sources([Source({dataset.uri!r}, {IMAGES}, [], None, times=10, shards=shards)], decoding, 0)
shards = stream.streaming_split(world, equal=True)

@ray.remote(num_cpus=0)
def consume(shard, rank):
    feed = StreamFeed(shard, images, 20, 0, Process(rank=rank, world=world, device=torch.device("cpu")), decoding)
    return [sum(len(batch.rows_B) for batch in feed.batches(epoch)) for epoch in range(2)]

print(ray.get([consume.remote(shard, rank) for rank, shard in enumerate(shards)]))
""")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert "[[350, 350], [350, 350]]" in done.stdout


def test_errors_of_the_tasks_reach_every_rank_in_one_line(ray_session: Any, folder: Path, tmp_path: Path) -> None:
    """As they are, and not as an error of Ray's, which a training takes for a lost process and starts anew for."""
    import torch

    from medssl.collectives import Process

    ingest(folder / "table.csv", str(tmp_path / "dataset"), IngestOptions(shard_rows=16))
    broken = open_dataset(str(tmp_path / "dataset"))
    (tmp_path / "dataset" / broken.shards[1].path).unlink()

    def consume(rank: int) -> BaseException | None:
        process = Process(rank=rank, world=2, device=torch.device("cpu"))
        feed = StreamFeed(shards[rank], IMAGES, 8, 0, process, Decoding(PX, "squash"))
        try:
            list(feed.batches(0))
        except Exception as error:
            return error
        return None

    shards = stream_images(broken, Decoding(PX, "squash")).streaming_split(2, equal=True)
    with ThreadPoolExecutor(2) as ranks:  # an epoch starts when all ranks have asked for it
        for error in ranks.map(consume, range(2)):
            assert isinstance(error, DataError) and not isinstance(error, ray_session.exceptions.RayError)
            assert str(error).endswith("is gone: was the dataset ingested anew? Run again") and "\n" not in str(error)


def test_stream_feed_refuses_what_it_cannot_do(dataset: Dataset) -> None:
    import torch

    from medssl.collectives import Process

    process = Process(rank=0, world=1, device=torch.device("cpu"))
    stream = stream_images(dataset, Decoding(PX, "squash")).iterator()
    with pytest.raises(RecipeError, match="larger than the 10 images"):
        StreamFeed(stream, 10, 16, 0, process, Decoding(PX, "squash"))
    with pytest.raises(ValueError, match="epoch ends only"):
        next(StreamFeed(stream, 40, 8, 0, process, Decoding(PX, "squash")).batches(0, start_step=1))
