"""Images in an HDF5 file: what is read, and what is refused before a byte of it is, however small the file."""

from __future__ import annotations

import io
import re
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from medssl.datasets.members import member_uri, read_member
from medssl.errors import DataError
from medssl.images import MAX_PIXELS


def never(path: str) -> bytes:
    pytest.fail(f"{path} was read whole")


def of(path: Path, number: int = 0) -> bytes:
    return read_member(member_uri(str(path), number), never)


def written(path: Path, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", **options)
    return path


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 5, 7, 3), "u1"), ((2, 5, 7, 1), "u1"), ((2, 5, 7), "u1"), ((2, 5, 7, 1), "<u2"), ((2, 5, 7), ">u2")]
)
def test_an_image_of_the_array_is_given_without_loss(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    found = of(written(tmp_path / "x.h5", data=pixels, chunks=(1, *shape[1:])), 1)
    shown = np.asarray(Image.open(io.BytesIO(found)))
    assert np.array_equal(shown.reshape(pixels[1].shape), pixels[1])


SIDE = int(MAX_PIXELS**0.5) + 1
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"shape": (1, 100_000, 100_000, 3), "dtype": "u1", "chunks": (1, 64, 64, 3)},
        "100000 x 100000 pixels, more than 150,000,000",
    ),
    ({"shape": (1, SIDE, SIDE), "dtype": "u1", "chunks": (1, 64, 64)}, f"{SIDE} x {SIDE} pixels, more than 150,000,000"),
    ({"shape": (1, 64, 64, 500_000), "dtype": "u1", "chunks": (1, 8, 8, 64)}, "are 64 x 64 x 500000: give 1 or 3 channels"),
    ({"shape": (1, 64, 64, 2), "dtype": "u1"}, "are 64 x 64 x 2: give 1 or 3 channels"),
    ({"shape": (1, 0, 64, 3), "dtype": "u1"}, "are 0 x 64 x 3"),
    ({"shape": (1, 4, 64, 64, 3), "dtype": "u1", "chunks": True}, "are 4 x 64 x 64 x 3: give 1 or 3 channels"),
    ({"shape": (9,), "dtype": "u1"}, "are no images"),
    ({"shape": (), "dtype": "u1"}, "are no images"),
    ({"shape": (1, 64, 64, 3), "dtype": "f4"}, "are of float32: give uint8 or uint16"),
    ({"shape": (1, 64, 64, 3), "dtype": h5py.string_dtype()}, "are of object: give uint8 or uint16"),
    (
        {"shape": (100_000, 64, 64, 3), "dtype": "u1", "chunks": (100_000, 64, 64, 3), "compression": "gzip"},
        "in chunks of 100000 x 64 x 64 x 3, of which one is larger than",
    ),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_no_image_of_ours_is_refused_before_it_is_read(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.h5", **options)
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=re.escape(words)):
            of(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_pixels_in_other_files_are_refused(tmp_path: Path) -> None:
    """A file from elsewhere would show what the one who reads it may see: any file's bytes as pixels."""
    (tmp_path / "private").write_bytes(bytes(range(48)))
    written(tmp_path / "other.h5", data=np.zeros((1, 4, 4, 3), np.uint8))
    outer = written(tmp_path / "raw.h5", shape=(1, 4, 4, 3), dtype="u1", external=[(str(tmp_path / "private"), 0, 48)])
    linked, virtual = tmp_path / "linked.h5", tmp_path / "virtual.h5"
    with h5py.File(linked, "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
    layout = h5py.VirtualLayout((1, 4, 4, 3), "u1")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (1, 4, 4, 3))
    with h5py.File(virtual, "w") as file:
        file.create_virtual_dataset("x", layout)
    for path in (outer, linked, virtual):
        with pytest.raises(DataError, match="its images are in another file"):
            of(path)


def test_a_group_and_a_file_of_another_kind_are_no_array(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("x")
    (tmp_path / "text.h5").write_text("hello")
    for name in ("group.h5", "text.h5", "none.h5"):
        with pytest.raises(DataError, match="is no HDF5 file with an array x"):
            of(tmp_path / name)


def test_a_number_too_many_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "x.h5", shape=(2, 4, 4, 3), dtype="u1")
    with pytest.raises(DataError, match="has 2 images, number 2 is missing"):
        of(path, 2)
