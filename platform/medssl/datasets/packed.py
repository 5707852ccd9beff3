"""A dataset's encoded images where each can be read by itself: a byte range of an object.

A shard is made to be read from end to end: one image of it costs its whole row group, up to 16 MiB. An order of images that
cares nothing for shards (the pairs of bags, whose images lie far apart) would read the dataset again and again. So the
images are copied once, as they are, back to back into one object per shard, and `places.parquet` says where each is:

<target>/<digest of the shard>.bin   its images
<target>/places.parquet              object, offset, bytes of each row of the index; written last

The copy depends on nothing but the dataset. Two that make it at once write the same bytes, so no lease is needed.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from medssl.artifacts import digest_json
from medssl.datasets.dataset import Dataset, Shard
from medssl.datasets.read import READ_ROWS
from medssl.errors import DataError, MissingKey
from medssl.filesystem import retrying_filesystem
from medssl.store import Store

PLACES = "places.parquet"
VERSION = 1
"""Raised when the layout changes."""
_READERS = 16
"""Objects read side by side: hides the latency of an object store."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """Where images are: one place per row, for all rows of a dataset or some of them. Pickles to names and numbers."""

    uri: str
    objects: tuple[str, ...]
    """Keys below `uri`."""
    object_N: Numbers
    """Position in `objects` of each row's."""
    offset_N: Numbers
    """Bytes before the image in its object."""
    bytes_N: Numbers
    """Length of the encoded image."""

    def __len__(self) -> int:
        return len(self.object_N)

    def take(self, rows: Sequence[int] | Numbers) -> Packed:
        """The places of these rows, in this order and as often as they are named."""
        chosen = np.asarray(rows, dtype=np.int64)
        used, objects = np.unique(self.object_N[chosen], return_inverse=True)
        names = tuple(self.objects[k] for k in used)
        return Packed(self.uri, names, objects.astype(np.int64), self.offset_N[chosen], self.bytes_N[chosen])


def packed_name(dataset: Dataset) -> str:
    """Name of the folder for a dataset's copy: changes with its images."""
    return digest_json({"images": dataset.images_digest, "version": VERSION})[:32]


def pack_shard(dataset_uri: str, shard: Shard, target: Store) -> tuple[str, list[int]]:
    """Copies the images of a shard into one object, unless it is there; its key and the images' lengths in bytes.

    Memory holds one batch of images.

    Raises:
        DataError: the shard is gone or does not hold what its card says.
    """
    import pyarrow.parquet as pq

    key = f"{PurePosixPath(shard.path).stem}.bin"
    filesystem, root = retrying_filesystem(dataset_uri)
    lengths: list[int] = []
    try:
        source = filesystem.open_input_file(f"{root}/{shard.path}")
    except FileNotFoundError:
        raise DataError(f"shard {shard.path} of {dataset_uri} is gone: was the dataset ingested anew? Run again") from None
    with tempfile.TemporaryDirectory(prefix="medssl-pack-") as scratch:
        path = Path(scratch) / key
        with source, pq.ParquetFile(source) as file, path.open("wb") as out:
            for batch in file.iter_batches(batch_size=READ_ROWS, columns=["image"]):
                for image in batch["image"]:
                    lengths.append(out.write(image.as_buffer()))
        if len(lengths) != shard.rows:
            raise DataError(
                f"shard {shard.path} of {dataset_uri} holds {len(lengths)} images, its card says {shard.rows}: ingest again"
            )
        if not target.exists(key):
            target.upload(path, key)
    return key, lengths


def write_places(target: Store, objects: Sequence[str], lengths: Sequence[Sequence[int]]) -> None:
    """Says where the images are, once all objects are there; both in the order of the shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts = [len(each) for each in lengths]
    sizes = [np.asarray(each, np.int64) for each in lengths]
    table = pa.table(
        {
            "object": pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(objects)), counts), pa.array(objects, pa.string())),
            "offset": np.concatenate([np.cumsum(each) - each for each in sizes]),
            "bytes": np.concatenate(sizes),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    target.write(PLACES, sink.getvalue())


def open_packed(store: Store) -> Packed | None:
    """The whole copy in `store`; None when there is none or it is not finished."""
    import pyarrow.parquet as pq

    try:
        data = store.read(PLACES)
    except MissingKey:
        return None
    table = pq.read_table(io.BytesIO(data))
    names = table["object"].combine_chunks().dictionary_encode()
    return Packed(
        store.uri,
        tuple(names.dictionary.to_pylist()),
        names.indices.to_numpy(zero_copy_only=False).astype(np.int64),
        table["offset"].to_numpy(),
        table["bytes"].to_numpy(),
    )


def read_packed(packed: Packed) -> list[bytes]:
    """The encoded images of all of its rows, in order. Reads their bytes and no others, one request per image.

    Raises:
        DataError: an object is gone or shorter than it was.
    """
    filesystem, root = retrying_filesystem(packed.uri)
    images: list[bytes] = [b""] * len(packed)

    def read_from(number: int) -> None:
        key = packed.objects[number]
        try:
            with filesystem.open_input_file(f"{root}/{key}") as file:
                for k in np.flatnonzero(packed.object_N == number):
                    images[k] = bytes(file.read_at(int(packed.bytes_N[k]), int(packed.offset_N[k])))
                    if len(images[k]) != packed.bytes_N[k]:
                        raise DataError(f"{packed.uri}/{key} is damaged: remove the folder {packed.uri} and run again")
        except FileNotFoundError:
            raise DataError(f"{packed.uri}/{key} is gone: remove the folder {packed.uri} and run again") from None

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read_from, range(len(packed.objects))))
    return images
