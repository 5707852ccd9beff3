"""Images that are parts of a file: patches of an HDF5 array, frames of a DICOM file. `path::number` names one.

Both become PNG bytes without loss of what is kept, so that everything after ingest knows JPEG, PNG and TIFF alone.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError

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
        return png(np.asarray(array[number]))
    from medssl.datasets.dicom import frame_png  # with pydicom, which is an extra

    return frame_png(read(path), number)


@functools.lru_cache(maxsize=4)
def _array(path: str) -> Any:
    """The array `x` of an HDF5 file, open for as long as the process lives: a task reads many images of one file."""
    h5py = need("h5py", "HDF5 files", "medssl[h5]")
    try:
        return h5py.File(path, "r")["x"]
    except (OSError, KeyError) as error:
        raise DataError(f"is no HDF5 file with an array x ({str(error)[:80]})") from None


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
