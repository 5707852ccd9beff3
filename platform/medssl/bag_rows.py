"""Bags from the store through Ray Data: images in an order given row by row, read singly, and pairs made of them.

The pairs of an epoch (:func:`medssl.training.bags.epoch_pairs`) are the same for streaming and for resident images, and so
are the batches. They take images in an order that has nothing to do with shards, and both images of a pair may lie far
apart: on HAM10000 in 40 shards, batch 128, reading the row groups of every 128 images would come to 71 times the dataset
in an epoch. So the encoded images are copied once to where each can be read by itself
(:mod:`medssl.datasets.packed`: one more copy of the dataset in the store, made by reading it once), and an epoch then reads
the images it shows and nothing else, with one request each. Each rank streams its own part of the batches, in order.

Shapes: N images, B bags of one rank in a step, T steps, H = W = decode_px, C channels.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medssl.datasets.dataset import Dataset, Shard
from medssl.datasets.packed import Packed, open_packed, pack_shard, packed_name, read_packed, write_places
from medssl.datasets.read import Decoding, decode_row
from medssl.errors import DataError
from medssl.exporter import export
from medssl.rows import OnProgress
from medssl.store import Store, open_for_writing, open_store
from medssl.streams import pausing, quiet_ray_data, user_error

if TYPE_CHECKING:
    from medssl.collectives import Process
    from medssl.training.bags import Bags, Rows
    from medssl.training.feed import Batch

PACKED = "packed"
"""Folder of a store for packed images."""
_PIECE_IMAGES = 128
"""Images that one task reads and decodes: seconds of work, and at 256 x 256 pixels 25 MB of result."""
_MOST_PIECES = 2000
"""Pieces of a stream; a longer one has larger pieces, since each costs Ray Data a few milliseconds beforehand."""
_PIECES_AHEAD = 4
_TASKS = 2
"""Tasks of one rank that read at a time. The ranks' streams share the CPUs that training leaves free."""


def ensure_packed(dataset: Dataset, store: Store, *, tasks: int | None = None, progress: OnProgress | None = None) -> str:
    """URI of the dataset's images, each to be read by itself, below `packed/` in `store`; Ray Data makes it if missing.

    At most `tasks` shards are packed at once, by default as many as CPUs are free. Cut short, it goes on where it was.
    Remove the folder when no more bags are streamed: it is made anew when needed.

    Raises:
        DataError: a shard is gone or does not hold what the card says.
    """
    import ray.data

    target = store.sub(f"{PACKED}/{packed_name(dataset)}")
    if open_packed(target) is not None:
        return target.uri
    quiet_ray_data()
    shards = dataset.shards
    items = [{"shard": number, "path": s.path, "rows": s.rows, "first_row": s.first_row} for number, s in enumerate(shards)]
    made: dict[int, tuple[str, list[int]]] = {}
    stream = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _pack_shards,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=tasks),
        fn_kwargs={"dataset_uri": dataset.uri, "target_uri": target.uri},
    )
    try:
        for batch in stream.iter_batches(batch_size=1, batch_format="pyarrow"):
            number = batch["shard"][0].as_py()
            made[number] = batch["object"][0].as_py(), batch["bytes"][0].as_py()
            if progress:
                progress(sum(len(lengths) for _, lengths in made.values()), len(dataset))
    except Exception as error:
        raise user_error(error) from error
    objects, lengths = zip(*(made[number] for number in range(len(shards))), strict=True)
    write_places(target, objects, lengths)
    return target.uri


# The tasks are generators: Ray Data forgets what a plain function has raised, and keeps what breaks a generator.


def _pack_shards(batch: Any, *, dataset_uri: str, target_uri: str) -> Iterator[Any]:
    """The Ray Data task of packing: shards in, what they became out."""
    import pyarrow as pa

    export()
    target = open_for_writing(target_uri)
    shards = [Shard(item["path"], item["rows"], item["first_row"]) for item in batch.to_pylist()]
    made = [pack_shard(dataset_uri, shard, target) for shard in shards]
    yield pa.table(
        {
            "shard": batch["shard"],
            "object": pa.array([key for key, _ in made], pa.string()),
            "bytes": pa.array([lengths for _, lengths in made], pa.list_(pa.int64())),
        }
    )


def stream_rows(packed: Packed, rows: Rows, decoding: Decoding, *, tasks: int = _TASKS) -> Iterator[NDArray[np.uint8]]:
    """The images of `rows` in exactly this order, in arrays (n, H, W, C) of changing length, through Ray Data.

    `tasks` read and decode pieces side by side, a few ahead of what is taken; memory holds no more. To be called where the
    images are wanted: in a Ray Train worker, or in a driver.

    Raises:
        DataError: the images are gone, or one cannot be decoded any more.
    """
    import ray.data

    quiet_ray_data()
    piece = max(_PIECE_IMAGES, -(-len(rows) // _MOST_PIECES))
    parts = [rows[start : start + piece] for start in range(0, len(rows), piece)]
    items = [{"rows": part.tobytes(), "places": pickle.dumps(packed.take(part))} for part in parts]
    piece_bytes = piece * decoding.decode_px**2 * decoding.channels
    stream: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    # One block per task: a task that waited for its second or third to be taken would keep its CPU from the peers' tasks,
    # while this rank waits for those peers in a collective.
    stream.context.target_max_block_size = 2 * piece_bytes
    stream.context.custom_execution_callback_classes = [pausing()]
    options = stream.context.execution_options
    options.preserve_order = True
    options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=_PIECES_AHEAD * piece_bytes)
    stream = stream.map_batches(
        _decode_rows,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=tasks),
        fn_kwargs={"decoding": decoding},
    )
    try:
        for batch in stream.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            yield batch["image"]
    except Exception as error:
        raise user_error(error) from error


def _decode_rows(batch: Any, *, decoding: Decoding) -> Iterator[dict[str, NDArray[np.uint8]]]:
    """The Ray Data task of streaming: one piece's places in, its images out."""
    import torch

    export()
    torch.set_num_threads(1)  # a task has one CPU
    rows, packed = np.frombuffer(batch["rows"][0].as_py(), np.int64), pickle.loads(batch["places"][0].as_py())
    images = read_packed(packed)
    yield {"image": np.stack([decode_row(row, data, decoding, packed.uri) for row, data in zip(rows, images, strict=True)])}


class StreamBagFeed:
    """Batches of pairs of one rank, streamed; the Feed of `medssl.training.feed` for bags in the store.

    The batches are those of :class:`medssl.training.bags.ResidentBagFeed` for the same bags and seed, on as many ranks, and
    an epoch may be taken up at any step.
    """

    starts_within_epoch = True

    def __init__(
        self, packed_uri: str, bags: Bags, batch_size: int, seed: int, process: Process, decoding: Decoding,
        tasks: int | None = None,
    ) -> None:  # fmt: skip
        """`packed_uri` is what `ensure_packed` returned, `batch_size` counts bags over all ranks, `tasks` what reads for all of
        them at once; each has one.

        Raises:
            RecipeError: the batch cannot be made of bags of different patients, or not be shared by the ranks.
            DataError: the packed images are not there.
        """
        from medssl.training.feed import rank_slice

        packed = open_packed(open_store(packed_uri))
        if packed is None:
            raise DataError(f"there are no packed images at {packed_uri}: were they removed? Run again")
        if bags.rows.max() >= len(packed):
            raise ValueError(f"row {bags.rows.max()} of {len(packed)} packed images")
        self.bags = bags
        self.batch_size = batch_size
        self.steps_per_epoch = bags.steps_per_epoch(batch_size)
        self.seed = seed
        self._packed = packed
        self._decoding = decoding
        self._tasks = _TASKS if tasks is None else max(1, min(_TASKS, tasks // process.world))
        self._slice = rank_slice(batch_size, process)
        self._pin = process.device.type == "cuda"

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See `medssl.training.feed.Feed`. The next batch is put together while the current one trains."""
        from medssl.training.bags import epoch_pairs
        from medssl.training.feed import ahead

        pairs = epoch_pairs(self.bags, self.seed, epoch, self.batch_size)
        return ahead(self._batches(*(rows_TG[start_step:, self._slice] for rows_TG in pairs)))

    def _batches(self, firsts_TB: Rows, seconds_TB: Rows) -> Iterator[Batch]:
        """Streams first and second image of each bag one after the other, a bag's only image once."""
        import torch

        from medssl.training.feed import Batch

        paired_TB = firsts_TB != seconds_TB
        shown = np.stack([np.ones_like(paired_TB), paired_TB], axis=-1)
        rows = np.stack([firsts_TB, seconds_TB], axis=-1)[shown]
        if not len(rows):
            return
        take = _taker(stream_rows(self._packed, rows, self._decoding, tasks=self._tasks))
        for first_B, second_B, paired_B in zip(firsts_TB, seconds_TB, paired_TB, strict=True):
            images = torch.from_numpy(take(len(paired_B) + int(paired_B.sum())))
            place_B = torch.from_numpy(np.arange(len(paired_B)) + np.cumsum(paired_B) - paired_B)
            found = [images[place_B], images[place_B + torch.from_numpy(paired_B)]]
            image_BHWC, second_BHWC = (each.pin_memory() for each in found) if self._pin else found
            yield Batch(image_BHWC, torch.from_numpy(first_B.copy()), second_BHWC, torch.from_numpy(second_B.copy()))


def _taker(arrays: Iterator[NDArray[np.uint8]]) -> Callable[[int], NDArray[np.uint8]]:
    """A function that takes the next so many images from a stream of arrays of any length."""
    rest: list[NDArray[np.uint8]] = []

    def take(count: int) -> NDArray[np.uint8]:
        taken: list[NDArray[np.uint8]] = []
        while count:
            array = rest.pop() if rest else next(arrays, None)
            if array is None:
                raise DataError(f"the stream ended {count} images too early: run again")
            taken.append(array[:count])
            if len(array) > count:
                rest.append(array[count:])
            count -= len(taken[-1])
        return np.concatenate(taken)

    return take
