"""What feeds a training: batches of stored uint8 images, the same global batches for every number of workers.

Shapes: N images in all, B images of this rank in a step, H, W stored height and width, C channels.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from medssl.collectives import Process
from medssl.errors import DataError, RecipeError

IMAGES_FILE = "images.npy"
IDS_FILE = "ids.parquet"

T = TypeVar("T")


class Batch(NamedTuple):
    """What a rank is given for one step, on the CPU."""

    images_BHWC: Tensor
    """uint8."""
    rows_B: Tensor
    """int64 row numbers of the images in the dataset's index."""
    second_BHWC: Tensor | None = None
    """At each place another image of the same bag, the same image where the bag has no other; None without bags."""
    second_rows_B: Tensor | None = None
    """Their row numbers."""


class Feed(Protocol):
    """Batches of one rank. Every rank's feed yields as many batches, of as many images."""

    steps_per_epoch: int
    """Steps in one epoch; the last, incomplete global batch is dropped."""
    batch_size: int
    """Images in one step over all ranks."""
    starts_within_epoch: bool
    """Whether `batches` takes a `start_step` other than 0."""

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from its `start_step` on.

        The global batch of a step is the ranks' batches in rank order; it depends on (epoch, step) and the feed's seed
        alone, so that a resumed training sees what an undisturbed one sees.
        """


class Images(Protocol):
    """Decoded images by number."""

    def take(self, rows_B: Tensor) -> Tensor:
        """The images of these numbers, a copy (B, H, W, C)."""

    def __len__(self) -> int: ...


class ResidentImages:
    """All decoded images of a dataset in one memory-mapped file, shared through the page cache by whoever opens it.

    A folder named by its digest with `images.npy` ((N, H, W, C) uint8) and `ids.parquet` (column image_id); it is renamed
    into place when whole, so a folder that exists is complete.
    """

    def __init__(self, path: Path, images: np.ndarray, image_ids: list[str]) -> None:
        self.path = path
        self.digest = path.name
        self.images = images
        self.image_ids = image_ids

    @classmethod
    def open(cls, path: str | Path) -> ResidentImages:
        """Maps the file at `path` (the folder); DataError when it is not such a folder."""
        import pyarrow.parquet as pq

        path = Path(path)
        try:
            images = np.lib.format.open_memmap(path / IMAGES_FILE, mode="r")
            image_ids = pq.read_table(path / IDS_FILE, columns=["image_id"]).column("image_id").to_pylist()
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} holds no resident images ({error}); delete the folder and they are made anew") from error
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(image_ids):
            raise DataError(f"{path} is damaged: {images.dtype} {images.shape} for {len(image_ids)} ids; delete the folder")
        return cls(path, images, image_ids)

    @classmethod
    def write(cls, path: str | Path, images_NHWC: np.ndarray, image_ids: Sequence[str]) -> ResidentImages:
        """Writes decoded images as such a folder, whole or not at all, and opens it. What exists already stays."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
            temporary.mkdir(parents=True)
            np.save(temporary / IMAGES_FILE, np.ascontiguousarray(images_NHWC, dtype=np.uint8))
            pq.write_table(pa.table({"image_id": pa.array(image_ids, pa.string())}), temporary / IDS_FILE)
            try:
                temporary.rename(path)
            except OSError:  # somebody else was faster: theirs is as good
                shutil.rmtree(temporary)
        return cls.open(path)

    def tensor(self) -> Tensor:
        """The map as a tensor (N, H, W, C) without a copy; for reading only."""
        import warnings

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(np.asarray(self.images))

    def take(self, rows_B: Tensor) -> Tensor:
        """The images of these rows, a copy (B, H, W, C)."""
        return self.tensor().index_select(0, rows_B)

    def __len__(self) -> int:
        return len(self.image_ids)


class JoinedImages:
    """The images of several resident files, numbered one file after the other."""

    def __init__(self, parts: Sequence[ResidentImages]) -> None:
        """All of one height, width and number of channels."""
        self._parts = list(parts)
        self._ends = torch.tensor(np.cumsum([len(part) for part in parts]))

    def take(self, rows_B: Tensor) -> Tensor:
        """The images of these numbers, a copy (B, H, W, C)."""
        which_B = torch.searchsorted(self._ends, rows_B, right=True)
        images_BHWC = torch.empty(len(rows_B), *self._parts[0].images.shape[1:], dtype=torch.uint8)
        for number, part in enumerate(self._parts):
            here_B = which_B == number
            images_BHWC[here_B] = part.take(rows_B[here_B] - (self._ends[number] - len(part)))
        return images_BHWC

    def __len__(self) -> int:
        return int(self._ends[-1])


def rank_slice(batch_size: int, process: Process) -> slice:
    """This rank's part of a global batch; RecipeError where it cannot be shared evenly."""
    if batch_size % process.world:
        raise RecipeError(
            f"batch_size {batch_size} cannot be shared evenly by {process.world} workers; "
            f"use a multiple of {process.world} or another number of workers"
        )
    share = batch_size // process.world
    if share < 2:
        raise RecipeError(f"batch_size {batch_size} gives {process.world} workers one image each; batch norm needs two or more")
    return slice(process.rank * share, (process.rank + 1) * share)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made in a thread while the current one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        waiting = pool.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, items, None)
            yield item


class ResidentFeed:
    """Batches from resident images: a fresh permutation of the rows in every epoch, from (seed, epoch)."""

    starts_within_epoch = True

    def __init__(
        self, images: Images, rows: Sequence[int] | np.ndarray, batch_size: int, seed: int, process: Process
    ) -> None:
        """`rows` are the row numbers to use, one that comes k times k times an epoch; `batch_size` counts over all ranks."""
        self.rows = np.sort(np.asarray(rows, dtype=np.int64))
        if len(self.rows) < batch_size:
            raise RecipeError(f"batch_size {batch_size} is larger than the {len(self.rows)} images; use {len(self.rows)} or less")
        if self.rows[0] < 0 or self.rows[-1] >= len(images):
            raise ValueError(f"rows {self.rows[0]} to {self.rows[-1]} of {len(images)} resident images")
        self.batch_size = batch_size
        self.steps_per_epoch = len(self.rows) // batch_size
        self.seed = seed
        self._slice = rank_slice(batch_size, process)
        self._images = images
        self._pin = process.device.type == "cuda"

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of the rows (before the last incomplete batch is dropped)."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See :class:`Feed`. The next batch is copied while the current one trains."""
        order = torch.from_numpy(self.order(epoch))
        return ahead(self._batch(order, step) for step in range(start_step, self.steps_per_epoch))

    def _batch(self, order: Tensor, step: int) -> Batch:
        whole = order[step * self.batch_size : (step + 1) * self.batch_size]
        rows_B = whole[self._slice]
        images_BHWC = self._images.take(rows_B)
        return Batch(images_BHWC.pin_memory() if self._pin else images_BHWC, rows_B)
