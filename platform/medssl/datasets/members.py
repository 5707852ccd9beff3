"""Images that are parts of a file: patches of an HDF5 array, frames of a DICOM file. `path::number` names one.

Both become PNG bytes without loss of what is kept, so that everything after ingest knows JPEG, PNG and TIFF alone.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError
from medssl.images import MAX_PIXELS

_MARK = "::"
_PNG = b"\x89PNG\r\n\x1a\n"


def member_uri(path: str, number: int) -> str:
    """Name of one part of a file."""
    return f"{path}{_MARK}{number}"


def split_member(uri: str) -> tuple[str, int | None]:
    """The file and the part's number; None for a whole file."""
    path, mark, number = uri.rpartition(_MARK)
    return (path, int(number)) if mark and number.isdecimal() else (uri, None)


def read_member(uri: str, read: Callable[[str], bytes]) -> bytes:
    """PNG of a part; `read` gives the bytes of a whole file.

    Raises:
        DataError: it has no such part, or it cannot be decoded.
    """
    path, number = split_member(uri)
    assert number is not None
    if path.endswith((".h5", ".hdf5")):
        array = _array(path)
        if number >= len(array):
            raise DataError(f"has {len(array)} images, number {number} is missing")
        return png(np.asarray(array[number], dtype=array.dtype.newbyteorder("=")))
    from medssl.datasets.dicom import frame_png  # with pydicom, which is an extra

    return frame_png(read(path), number)


@functools.lru_cache(maxsize=4)
def _array(path: str) -> Any:
    """The array `x` of an HDF5 file, open for as long as the process lives: a task reads many images of one file."""
    h5py = need("h5py", "HDF5 files", "medssl[h5]")
    try:
        file = h5py.File(path, "r")
        array = file["x"]
        shape = array.shape
    except (OSError, KeyError, AttributeError) as error:  # of a group the last
        raise DataError(f"is no HDF5 file with an array x ({str(error)[:80]})") from None
    if array.file.filename != file.filename or array.external or array.is_virtual:  # any file's bytes could be shown as pixels
        raise DataError("has an array x, but its images are in another file: copy them into this one")
    _check_array(shape, array.chunks, array.dtype)
    return array


def _check_array(shape: tuple[int, ...], chunks: tuple[int, ...] | None, dtype: np.dtype[Any]) -> None:
    """Refuses what is no array of images, before anything of it is read: a file of a few KB may claim any size."""
    text = " x ".join(map(str, shape[1:]))
    if len(shape) < 3:
        raise DataError(f"its array x has {len(shape)} axes, which are no images: give images x height x width x channels")
    if len(shape) > 4 or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape[1:]:
        raise DataError(f"the images of its array x are {text}: give 1 or 3 channels of at least one pixel")
    if dtype.name not in ("uint8", "uint16"):
        raise DataError(f"the images of its array x are of {dtype.name}: give uint8 or uint16")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise DataError(f"the images of its array x have {shape[1]} x {shape[2]} pixels, more than {MAX_PIXELS:,}")
    if chunks is not None and math.prod(chunks) > 3 * MAX_PIXELS:  # one is decompressed as a whole
        raise DataError(
            f"its array x is stored in chunks of {' x '.join(map(str, chunks))}, of which one is larger than any image may be "
            f"({MAX_PIXELS:,} pixels): store it in chunks of an image"
        )


def need(package: str, what: str, extra: str) -> Any:
    """An optional package; DataError says what to install."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise DataError(f"{what} need the package {package}: pip install '{extra}'") from None


def png(pixels: NDArray[Any], significant: int | None = None) -> bytes:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 or uint16 as PNG; `significant` bits of a sample go into its sBIT chunk."""
    samples = pixels[:, :, None] if pixels.ndim == 2 else pixels
    height, width, channels = samples.shape
    bits = {"uint8": 8, "uint16": 16}[str(samples.dtype)]
    rows = np.ascontiguousarray(samples.astype(">u2") if bits == 16 else samples).view(np.uint8).reshape(height, -1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, {1: 0, 3: 2}[channels], 0, 0, 0))]
    if significant is not None:
        chunks.append((b"sBIT", bytes([significant] * channels)))
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks]
    return _PNG + b"".join(parts)
