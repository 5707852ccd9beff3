"""Packed images: the bytes of the shards, each to be read by itself and nothing beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medssl.datasets import packed as packed_module
from medssl.datasets.dataset import Shard
from medssl.datasets.packed import Packed, open_packed, pack_shard, read_packed, write_places
from medssl.errors import DataError
from medssl.store import Store, open_store

IMAGES = [bytes([k]) * (k * 7 + 1) for k in range(23)]
SHARDS = [Shard("shards/a.parquet", 9, 0), Shard("shards/b.parquet", 9, 9), Shard("shards/c.parquet", 5, 18)]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    for shard in SHARDS:
        path = tmp_path / "dataset" / shard.path
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": IMAGES[shard.first_row : shard.first_row + shard.rows]}), path, row_group_size=4)
    return (tmp_path / "dataset").as_uri()


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "packed"), create=True)


def pack(dataset: str, target: Store) -> Packed:
    objects, lengths = zip(*(pack_shard(dataset, shard, target) for shard in SHARDS), strict=True)
    write_places(target, objects, lengths)
    packed = open_packed(target)
    assert packed is not None
    return packed


def test_every_image_comes_back(dataset: str, target: Store) -> None:
    assert open_packed(target) is None
    packed = pack(dataset, target)
    assert len(packed) == 23 and read_packed(packed) == IMAGES
    assert [entry.key for entry in target.list()] == ["a.bin", "b.bin", "c.bin", "places.parquet"]


def test_chosen_images_cost_their_bytes_alone(dataset: str, target: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [22, 3, 10, 4, 3]
    chosen = pack(dataset, target).take(rows)
    assert chosen.objects == ("a.bin", "b.bin", "c.bin") and len(chosen) == 5
    read: list[int] = []
    real = packed_module.retrying_filesystem

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read_at(self, count: int, offset: int) -> bytes:
            read.append(count)
            data: bytes = self.file.read_at(count, offset)
            return data

    class Filesystem:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def open_input_file(self, path: str) -> Counting:
            return Counting(self.inner.open_input_file(path))

    def counting(uri: str) -> tuple[Any, str]:
        filesystem, root = real(uri)
        return Filesystem(filesystem), root

    monkeypatch.setattr(packed_module, "retrying_filesystem", counting)
    assert read_packed(chosen) == [IMAGES[row] for row in rows]
    assert sorted(read) == sorted(len(IMAGES[row]) for row in rows)


def test_packing_again_writes_nothing(dataset: str, target: Store, tmp_path: Path) -> None:
    pack(dataset, target)
    before = (tmp_path / "packed" / "b.bin").stat().st_ino
    assert np.array_equal(pack(dataset, target).bytes_N, [len(image) for image in IMAGES])
    assert (tmp_path / "packed" / "b.bin").stat().st_ino == before


def test_what_is_gone_or_damaged(dataset: str, target: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 9 images, its card says 8: ingest again"):
        pack_shard(dataset, Shard("shards/a.parquet", 8, 0), target)
    with pytest.raises(DataError, match=r"shards/z.parquet of .* is gone"):
        pack_shard(dataset, Shard("shards/z.parquet", 8, 0), target)
    packed = pack(dataset, target)
    (tmp_path / "packed" / "b.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"b\.bin is damaged: remove the folder"):
        read_packed(packed)
    (tmp_path / "packed" / "b.bin").unlink()
    with pytest.raises(DataError, match=r"b\.bin is gone: remove the folder"):
        read_packed(packed)
