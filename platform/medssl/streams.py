"""A dataset in the store -> decoded images for training, read anew in each epoch through Ray Data.

Shards are read and decoded in tasks of their own, in blocks small enough for a small object store.

Shapes: N images, B images of one rank in a step, H = W = decode_px, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medssl.datasets.dataset import Dataset, Shard
from medssl.datasets.read import Decoding, decoded_batches
from medssl.errors import DataError, MedsslError, RecipeError
from medssl.exporter import export
from medssl.mixes import Source, offsets

if TYPE_CHECKING:
    import ray.data

    from medssl.collectives import Process
    from medssl.training.feed import Batch  # torch stays out of a driver that only ingests

_BLOCK_BYTES = 16 << 20
"""Largest block of decoded images that Ray Data hands on: many fit into an object store of 300 MB."""
_SHUFFLE_BYTES = 256 << 20
"""Largest shuffle buffer of one rank."""
_SHUFFLE_IMAGES = 4096
_PAUSE_SECONDS = 0.02


def stream_images(
    dataset: Dataset, decoding: Decoding, *, splits: Sequence[str] | None = None, seed: int | None = None
) -> ray.data.Dataset:
    """The images as a Ray Dataset with columns `row` (int64 row number) and `image` (uint8 (H, W, C)).

    One task per shard reads and decodes; nothing is kept between epochs. With `seed` the shards come in another order
    in each epoch; a shuffle buffer where they are consumed does the rest.
    """
    chosen = None if splits is None else list(splits)
    source = Source(dataset.uri, len(dataset), rows=[], splits=chosen, shards=tuple(dataset.shards))
    return stream_sources([source], decoding, seed)


def stream_sources(
    sources: Sequence[Source], decoding: Decoding, seed: int | None = None, *, tasks: int | None = None
) -> ray.data.Dataset:
    """The same for images of several datasets under their common numbers, a source's shards `times` in an epoch.

    Args:
        tasks: that decode at once; None as many as there are CPUs free.
    """
    import ray.data

    quiet_ray_data()
    shards = [
        {"source": place, "path": s.path, "rows": s.rows, "first_row": s.first_row}
        for place, source in enumerate(sources)
        for s in source.shards * source.times
    ]
    stream: ray.data.Dataset = ray.data.from_items(shards, override_num_blocks=len(shards))
    stream.context.target_max_block_size = _BLOCK_BYTES
    stream.context.custom_execution_callback_classes = [pausing()]
    if seed is not None:
        stream = stream.randomize_block_order(seed=ray.data.RandomSeedConfig(seed, reseed_after_execution=True))
    return stream.map_batches(
        _decode_shards,
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=tasks),
        fn_kwargs={"sources": [replace(source, rows=[], shards=()) for source in sources], "decoding": decoding},
    )


def pausing() -> type:
    """A callback of Ray Data's scheduling loop that rests between its rounds.

    While a trainer is slower than the decoding, finished blocks wait for room, and the loop looks at them again and again
    without a pause: three quarters of a core, taken from the trainer.
    """
    import time

    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pause(ExecutionCallback):  # type: ignore[misc]
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(_PAUSE_SECONDS)

    return Pause


def _decode_shards(
    batch: dict[str, NDArray[Any]], *, sources: list[Source], decoding: Decoding
) -> Iterator[dict[str, NDArray[Any]]]:
    """The Ray Data task: shards in, batches of decoded images out."""
    import torch

    export()
    torch.set_num_threads(1)  # a task has one CPU
    for place, path, rows, first in zip(*(batch[key] for key in ("source", "path", "rows", "first_row")), strict=True):
        source, offset = sources[place], offsets(sources)[place]
        shard, left_out = Shard(str(path), int(rows), int(first)), np.array(source.left_out, np.int64)
        for decoded in decoded_batches(source.dataset_uri, shard, decoding, source.splits):
            numbers, images = decoded["row"] + offset, decoded["image"]
            if len(left_out):
                kept = ~np.isin(decoded["row"], left_out)
                numbers, images = numbers[kept], images[kept]
            yield {"row": numbers, "image": images}


def quiet_ray_data() -> None:
    """Turns off Ray Data's own progress bars and log lines here: medssl shows progress itself, and errors come as
    errors.
    """
    import logging

    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def user_error(error: BaseException) -> BaseException:
    """The MedsslError at the bottom of what Ray has wrapped around it, else the error itself."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, MedsslError) and not hasattr(inner, "as_instanceof_cause"):
            lines = str(inner).splitlines()
            # our messages are one line: what follows is Ray Data's advice on retries
            return inner if len(lines) < 2 else type(inner)(lines[0])
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error


class StreamFeed:
    """Batches of one rank from its shard of a streamed dataset; the Feed of `medssl.training.feed` for streaming.

    The order is random within a shuffle buffer and over shards. Which rank gets which image is Ray Data's choice, so
    unlike the resident feed a run cannot be repeated batch for batch, and starts in the middle of no epoch.
    """

    starts_within_epoch = False

    def __init__(
        self,
        stream: ray.data.DataIterator,
        images: int,
        batch_size: int,
        seed: int,
        process: Process,
        decoding: Decoding,
    ) -> None:
        """`stream` is `ray.train.get_dataset_shard(...)`, `images` counts the streamed images of all ranks."""
        from medssl.training.feed import rank_slice

        if images < batch_size:
            raise RecipeError(f"batch_size {batch_size} is larger than the {images} images; use {images} or less")
        share = rank_slice(batch_size, process)
        self.batch_size = batch_size
        self.steps_per_epoch = images // batch_size
        self._stream = stream
        self._share = share.stop - share.start
        fitting = _SHUFFLE_BYTES // (decoding.decode_px**2 * decoding.channels)
        self._buffer_images = max(self._share, min(_SHUFFLE_IMAGES, fitting, images // process.world))
        self._seed = seed * process.world + process.rank
        self._pin = process.device.type == "cuda"

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See `medssl.training.feed.Feed`; as many on every rank.

        Raises:
            DataError: the images are gone, or one cannot be decoded any more.
            ValueError: `start_step` is not 0: a stream has no middle to start from.
        """
        import torch

        from medssl.training.feed import Batch

        if start_step:
            raise ValueError("a streamed epoch cannot be taken up at a step: checkpoint at epoch ends only")
        random = np.random.default_rng([self._seed, epoch])
        steps = 0
        for images_BHWC, rows_B in shuffled(self._arrays(), self._buffer_images, self._share, random):
            if steps < self.steps_per_epoch:  # what is left over is read, not used: the stream then ends on all ranks
                steps += 1
                images = torch.from_numpy(images_BHWC)
                yield Batch(images.pin_memory() if self._pin else images, torch.from_numpy(rows_B))
        if steps < self.steps_per_epoch:
            raise DataError(f"the stream gave {steps} batches of {self._share}, {self.steps_per_epoch} were promised: run again")

    def _arrays(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Images and their numbers of one pass, block by block."""
        try:
            for block in self._stream.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
                yield block["image"], np.asarray(block["row"], np.int64)
        except Exception as error:  # wrapped by Ray, lasting errors of the data would look like a lost process: one to retry
            raise user_error(error) from error


def shuffled(
    arrays: Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]], buffer_images: int, batch: int, random: np.random.Generator
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Batches drawn at random from a buffer that what comes next refills; the last, incomplete one is dropped.

    The buffer is memory of this process, as large from the first batch to the last. Ray Data's own shuffle buffer holds on
    to blocks in the object store: where all ranks' buffers together are larger than that store, the stream stands still.

    Args:
        arrays: images (n, H, W, C) and their numbers (n,), in pieces of any length; copied at once and not kept.
        buffer_images: images among which a batch is drawn, `batch` or more.
        batch: B, images in a batch.
        random: decides which.

    Yields:
        images (B, H, W, C) and numbers (B,), arrays of their own.
    """
    kept: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None
    filled = 0
    for images, numbers in arrays:
        if kept is None:
            kept = np.empty((buffer_images, *images.shape[1:]), np.uint8), np.empty(buffer_images, np.int64)
        taken = 0
        while taken < len(numbers):
            more = min(buffer_images - filled, len(numbers) - taken)
            kept[0][filled : filled + more] = images[taken : taken + more]
            kept[1][filled : filled + more] = numbers[taken : taken + more]
            filled, taken = filled + more, taken + more
            if filled == buffer_images:
                yield _draw(kept, filled, batch, random)
                filled -= batch
    while kept is not None and filled >= batch:
        yield _draw(kept, filled, batch, random)
        filled -= batch


def _draw(
    kept: tuple[NDArray[np.uint8], NDArray[np.int64]], filled: int, batch: int, random: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Takes a batch out of the first `filled` places; what stays moves up to the front."""
    places = random.choice(filled, batch, replace=False)
    images, numbers = kept[0][places], kept[1][places]
    end = filled - batch
    holes = places[places < end]
    staying = np.setdiff1d(np.arange(end, filled), places)
    kept[0][holes], kept[1][holes] = kept[0][staying], kept[1][staying]
    return images, numbers
