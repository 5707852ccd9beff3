"""Decoded images of a dataset's shards, a batch at a time; plain functions, for Ray tasks and for processes without
Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.artifacts import digest_json
from medssl.datasets.dataset import Dataset, Shard
from medssl.errors import DataError
from medssl.filesystem import retrying_filesystem
from medssl.images import DECODER, Depth, Resize, decode

READ_ROWS = 64
"""Rows read and decoded at a time: bounds memory whatever the size of a shard."""


@dataclass(frozen=True)
class Decoding:
    """How stored images become arrays."""

    decode_px: int
    resize: Resize
    channels: int = 3
    depth: Depth = "window"

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """An encoded image as (decode_px, decode_px, channels) uint8; DataError says why not."""
        return decode(data, px=self.decode_px, resize=self.resize, channels=self.channels, depth=self.depth)

    def digest(self, dataset: Dataset) -> str:
        """Names the decoded images of a dataset: changes with its images, with any field here and with what
        decoding itself does."""
        return digest_json({"images": dataset.images_digest, "decoder": DECODER, **asdict(self)})[:32]


def decoded_batches(
    dataset_uri: str, shard: Shard, decoding: Decoding, splits: Sequence[str] | None = None
) -> Iterator[dict[str, NDArray[Any]]]:
    """Batches of a shard in row order: `row` (int64, row number of the index) and `image` (uint8 (B, px, px, C)).

    Args:
        splits: only images of these splits; None takes all.

    Raises:
        DataError: the shard does not hold what the card says, or an image in it cannot be decoded.
    """
    import pyarrow.parquet as pq

    filesystem, root = retrying_filesystem(dataset_uri)
    where = f"{root}/{shard.path}"
    seen = 0
    try:
        source = filesystem.open_input_file(where)
    except FileNotFoundError:
        raise DataError(
            f"shard {shard.path} of {dataset_uri} is gone: was the dataset ingested anew? Run again"
        ) from None
    with source, pq.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=READ_ROWS, columns=["image", "split"]):
            first = shard.first_row + seen
            seen += len(batch)
            chosen = [
                (first + position, image.as_buffer())
                for position, (image, split) in enumerate(zip(batch["image"], batch["split"].to_pylist(), strict=True))
                if splits is None or split in splits
            ]
            if chosen:
                images = [decode_row(row, data, decoding, dataset_uri) for row, data in chosen]
                yield {"row": np.array([row for row, _ in chosen], np.int64), "image": np.stack(images)}
    if seen != shard.rows:
        raise DataError(
            f"shard {shard.path} of {dataset_uri} holds {seen} images, its card says {shard.rows}: ingest again"
        )


def stored_images(dataset: Dataset, rows: Iterable[int]) -> dict[int, bytes]:
    """The encoded images of a few rows, by row. Reads the row groups that hold them, 16 MiB each at most, and no others.

    Raises:
        DataError: a shard is gone.
    """
    import pyarrow.parquet as pq

    wanted, found = set(rows), dict[int, bytes]()
    filesystem, root = retrying_filesystem(dataset.uri)
    for shard in dataset.shards:
        if wanted.isdisjoint(range(shard.first_row, shard.first_row + shard.rows)):
            continue
        try:
            source = filesystem.open_input_file(f"{root}/{shard.path}")
        except FileNotFoundError:
            raise DataError(f"shard {shard.path} of {dataset.uri} is gone: was the dataset ingested anew? Run again") from None
        with source, pq.ParquetFile(source) as file:
            first = shard.first_row
            for group in range(file.num_row_groups):
                held = range(first, first + file.metadata.row_group(group).num_rows)
                first = held.stop
                here = sorted(wanted.intersection(held))
                if here:
                    images = file.read_row_group(group, columns=["image"])["image"]
                    found |= {row: images[row - held.start].as_py() for row in here}
    return found


def decode_row(row: int, data: Any, decoding: Decoding, uri: str) -> NDArray[np.uint8]:
    """One stored image -> uint8 (H, W, C); DataError, naming the row and dataset, when it cannot be decoded any more."""
    try:
        return decoding.decode(bytes(data))
    except DataError as error:
        raise DataError(f"image {row} of {uri} cannot be decoded any more ({error}): ingest again") from None
