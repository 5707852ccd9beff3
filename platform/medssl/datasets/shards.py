"""One shard of a dataset: images read, checked, stripped and packed into a Parquet file named by its content.

Plain functions: whoever calls them (a Ray task, a test) gives rows and a store. Memory holds a few images and one row
    group,
however many images the shard has.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medssl.datasets.members import read_member, split_member
from medssl.datasets.rowset import KEY_COLUMNS
from medssl.errors import DataError, MissingKey
from medssl.images import load, perceptual_hash, strip_metadata
from medssl.store import Store, open_store

SHARDS = "shards"
ROW_GROUP_BYTES = 16 << 20
_READERS = 8
"""Images read ahead, side by side: hides the latency of an object store."""


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the dataset card."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rejected:
    """An image that was set aside."""

    image_id: str
    uri: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """What the image itself says; row of the index."""

    image_id: str
    width: int
    height: int
    sha256: str
    """Of the stored bytes, that is without metadata."""
    phash: str


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard's rows."""

    entry: ShardEntry | None
    """None when every image was rejected."""
    measured: list[Measured] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def shard_schema(rows: pa.Schema) -> pa.Schema:
    """Columns of a shard, from those of the rows: image, keys, measurements, further columns."""
    return pa.schema([pa.field("image", pa.binary()), *index_schema(rows)])


def index_schema(rows: pa.Schema) -> pa.Schema:
    """Columns of the index: those of a shard without the image."""
    keys = [rows.field(name) for name in KEY_COLUMNS]
    measured = [
        pa.field("width", pa.int32()), pa.field("height", pa.int32()),
        pa.field("sha256", pa.string()), pa.field("phash", pa.string()),
    ]  # fmt: skip
    return pa.schema(
        [*keys, *measured, *(rows.field(name) for name in rows.names if name not in ("uri", *KEY_COLUMNS))]
    )


def write_shard(rows: pa.Table, store: Store) -> ShardResult:
    """Packs the images of `rows` (columns as of `rowset.build_rows`) into one shard of the dataset at `store`.

    An image that is missing, unreadable or cut short is rejected with the reason. A shard that the store has already
    is not written again. The bytes depend on nothing but rows and images.

    Raises:
        StoreError: the store, or the one the images are in, cannot be used.
    """
    measured: list[Measured] = []
    rejected: list[Rejected] = []
    schema = shard_schema(rows.schema)
    names = [name for name in schema.names if name != "image"]
    with tempfile.TemporaryDirectory(prefix="medssl-shard-") as scratch:
        path = Path(scratch) / "shard.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=names, write_statistics=names) as writer:
            pending: list[dict[str, Any]] = []
            pending_bytes = 0
            for row, read in _read_ahead(rows):
                try:
                    image, facts = _examine(row["image_id"], read)
                except DataError as error:
                    rejected.append(Rejected(row["image_id"], row["uri"], str(error)))
                    continue
                measured.append(facts)
                pending.append({**row, **vars(facts), "image": image})
                pending_bytes += len(image)
                if pending_bytes >= ROW_GROUP_BYTES:
                    writer.write_table(_table(pending, schema))
                    pending, pending_bytes = [], 0
            if pending:
                writer.write_table(_table(pending, schema))
        entry = publish_shard(path, len(measured), store) if measured else None
    return ShardResult(entry, measured, rejected)


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def publish_shard(path: Path, rows: int, store: Store) -> ShardEntry:
    """Puts a shard's file into the dataset at `store`, named by its content."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    entry = ShardEntry(f"{SHARDS}/{sha256[:32]}.parquet", rows, path.stat().st_size, sha256)
    if not store.exists(entry.path):  # its name is its content, and stores show whole objects only
        store.upload(path, entry.path)
    return entry


def _examine(image_id: str, read: Future[bytes]) -> tuple[bytes, Measured]:
    """The image as it is stored, and its measurements; DataError when it is to be rejected."""
    image = strip_metadata(read.result())
    pixels, facts = load(image)
    sha256 = hashlib.sha256(image).hexdigest()
    return image, Measured(image_id, facts.width, facts.height, sha256, perceptual_hash(pixels))


def _read_ahead(rows: pa.Table) -> Iterator[tuple[dict[str, Any], Future[bytes]]]:
    """Rows in order, each with its image's bytes, read a few ahead."""
    stores: dict[str, Store] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[dict[str, Any], Future[bytes]]] = deque()
        for row in rows.to_pylist():
            waiting.append((row, pool.submit(_read, row["uri"], stores)))
            if len(waiting) > _READERS:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _read(uri: str, stores: dict[str, Store]) -> bytes:
    """An image's bytes; DataError when there are none, StoreError when the store fails."""
    if split_member(uri)[1] is not None:
        return read_member(uri, lambda path: _read(path, stores))
    try:
        if uri.startswith("s3://"):
            bucket, _, key = uri.removeprefix("s3://").partition("/")
            if bucket not in stores:
                stores[bucket] = open_store(f"s3://{bucket}")
            return stores[bucket].read(key)
        return Path(uri).read_bytes()
    except (FileNotFoundError, NotADirectoryError, MissingKey):
        raise DataError("missing: there is no such file") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or type(error).__name__}") from None
