"""A dataset in the store -> decoded images for training: the resident file.

All images are decoded once into a memory-mapped uint8 file in the node's cache folder, named by a digest of images and
decoding. It is built under a file lock and renamed into place when whole, so a folder of that name is
complete, and a build that was killed leaves nothing but a folder the next build clears away.

Shapes: N images, B images of one rank in a step, H = W = decode_px, C channels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from medssl.datasets.dataset import Dataset, open_dataset
from medssl.datasets.read import Decoding, decoded_batches
from medssl.errors import DataError
from medssl.exporter import export
from medssl.streams import stream_images, user_error

if TYPE_CHECKING:

    from medssl.training.feed import ResidentImages  # torch stays out of a driver that only ingests

CACHE_VARIABLE = "MEDSSL_CACHE"
_BUILDING = ".building-"

OnProgress = Callable[[int, int], None]
Batches = Iterator[dict[str, NDArray[Any]]]


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where resident files are on this node: `cache_dir`, else $MEDSSL_CACHE, else ~/.cache/medssl."""
    return Path(cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/medssl").expanduser().absolute()


def resident_images(
    dataset: Dataset,
    decoding: Decoding,
    *,
    cache_dir: str | Path | None = None,
    progress: OnProgress | None = None,
) -> ResidentImages:
    """The decoded images on the calling node; Ray Data decodes them on the first call, later ones map the file.

    Raises:
        DataError: the images cannot be read, or the cache folder has no room.
    """

    def batches() -> Batches:
        stream = stream_images(dataset, decoding)
        try:
            for batch in stream.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
                yield cast(dict[str, NDArray[Any]], batch)
        except Exception as error:
            raise user_error(error) from error

    return _open_or_build(dataset, decoding, cache_folder(cache_dir), batches, progress)


def ensure_resident_on_nodes(
    dataset: Dataset,
    decoding: Decoding,
    *,
    cache_dir: str | Path | None = None,
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Sees to it that every alive node of the cluster has the resident file; returns the arguments of `open_resident`.

    The calling node is first and shows progress; the others, which may share its cache folder, follow side by side.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resident_images(dataset, decoding, cache_dir=cache_dir, progress=progress)
    own = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()
    others = [n["NodeID"] for n in nodes if n["Alive"] and n["NodeID"] != own and n["Resources"].get("CPU", 0) > 0]
    build = ray.remote(num_cpus=0, max_retries=2)(_build_on_node)
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in others]
    tasks = [build.options(scheduling_strategy=place).remote(dataset.uri, decoding, cache_dir) for place in places]
    try:
        ray.get(tasks)
    except ray.exceptions.RayError as error:
        raise user_error(error) from error
    return {
        "dataset_uri": dataset.uri,
        "digest": decoding.digest(dataset),
        "decoding": asdict(decoding),
        "cache_dir": str(cache_dir) if cache_dir else None,
    }


def _build_on_node(dataset_uri: str, decoding: Decoding, cache_dir: str | Path | None) -> None:
    export()
    resident_images(open_dataset(dataset_uri), decoding, cache_dir=cache_dir)


def open_resident(
    *, dataset_uri: str, digest: str, decoding: Mapping[str, Any], cache_dir: str | None = None
) -> ResidentImages:
    """The resident file of this node, by the arguments that `ensure_resident_on_nodes` returned. Needs no Ray.

    A node that joined the cluster later has none yet: it is decoded here then, in this process.

    Raises:
        DataError: the dataset was ingested anew meanwhile and the file of the old one is not here.
    """
    from medssl.training.feed import ResidentImages

    folder = cache_folder(cache_dir)
    if (folder / digest).is_dir():
        return ResidentImages.open(folder / digest)
    dataset, chosen = open_dataset(dataset_uri), Decoding(**decoding)
    if chosen.digest(dataset) != digest:
        raise DataError(f"dataset {dataset_uri} was ingested anew while it was in use: run the study again")

    def batches() -> Batches:
        for shard in dataset.shards:
            yield from decoded_batches(dataset.uri, shard, chosen)

    return _open_or_build(dataset, chosen, folder, batches, None)


def _open_or_build(
    dataset: Dataset,
    decoding: Decoding,
    folder: Path,
    batches: Callable[[], Batches],
    progress: OnProgress | None,
) -> ResidentImages:
    from medssl.training.feed import ResidentImages

    path = folder / decoding.digest(dataset)
    if not path.is_dir():
        with _locked(folder, path.name):
            if not path.is_dir():  # nobody else has built it while this process waited
                _build(dataset, decoding, path, batches(), progress)
    images = ResidentImages.open(path)
    if progress:
        progress(len(images), len(images))
    return images


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """One builder per node and file. The operating system frees the lock of a process that died."""
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"cannot write to the cache folder {folder} ({error.strerror}): set {CACHE_VARIABLE} to another"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _build(dataset: Dataset, decoding: Decoding, path: Path, batches: Batches, progress: OnProgress | None) -> None:
    """Decodes into a folder beside `path` and renames it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from medssl.training.feed import IDS_FILE, IMAGES_FILE

    for leftover in path.parent.glob(f"{path.name}{_BUILDING}*"):  # of a build that was killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    building = path.with_name(f"{path.name}{_BUILDING}{os.getpid()}")
    building.mkdir()
    try:
        total = len(dataset)
        images_NHWC = _reserve(
            building / IMAGES_FILE, (total, decoding.decode_px, decoding.decode_px, decoding.channels)
        )
        seen = np.zeros(total, bool)
        for batch in batches:
            images_NHWC[batch["row"]] = batch["image"]
            seen[batch["row"]] = True
            if progress:
                progress(int(seen.sum()), total)
        if not seen.all():
            raise DataError(
                f"{total - int(seen.sum())} images of {dataset.uri} did not arrive: was it ingested anew? Run again"
            )
        images_NHWC.flush()
        image_ids = pa.array(dataset.index()["image_id"].tolist(), pa.string())
        pq.write_table(pa.table({"image_id": image_ids}), building / IDS_FILE)
        building.rename(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _reserve(file: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    """An empty .npy file whose room on the disk is certain: a full disk would kill a process that writes to its map."""
    images: np.memmap[Any, np.dtype[np.uint8]] = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    size = file.stat().st_size
    try:
        with file.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)
    except OSError as error:
        raise DataError(
            f"no room for {size / 1e9:.1f} GB of decoded images in {file.parent.parent} ({error.strerror}): set "
            f"{CACHE_VARIABLE} to a folder with room, or lower decode_px"
        ) from None
    return images
