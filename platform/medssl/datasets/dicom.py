"""DICOM: what is kept of a file's tags, and its frames as PNG (pydicom, an extra).

Only the tags of `KEPT` become columns, and of these only short codes; patient, study and instance ids are read to group images.
No other tag is looked at: names, dates, free text and private tags never leave the file. Pixels follow PS3.3 C.7.6.3 and C.11:
modality rescale or table, then the window (or VOI table) that the file gives, spread over 16 bits; a file without a window keeps
its samples, with the bits stored noted, so that `images.depth` decides as for any 16-bit image. MONOCHROME1 is turned, so that
white is high; padding becomes black.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from medssl.datasets.members import need, png
from medssl.errors import DataError
from medssl.images import MAX_PIXELS

P = ParamSpec("P")
R = TypeVar("R")

KEPT = {
    "Modality": "modality", "BodyPartExamined": "body_part", "ViewPosition": "view", "ImageLaterality": "laterality",
    "PatientSex": "sex", "PatientAge": "age", "Manufacturer": "manufacturer", "ManufacturerModelName": "device",
}  # fmt: skip
"""Tags that become columns, by the tag's keyword."""
_GROUPING = ("PatientID", "StudyInstanceUID", "SOPInstanceUID", "NumberOfFrames", "PatientIdentityRemoved", "Rows")
_CODE = re.compile(r"^[A-Za-z0-9 ._/+()-]{1,40}$")
_AGE = re.compile(r"^(\d{3})([DWMY])$")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
_OLDEST = 90
"""Higher ages identify by themselves and are counted as this."""


@dataclass(frozen=True)
class DicomFacts:
    """What is kept of a file beside its pixels."""

    image_id: str
    """Hash of the instance's UID: the same file has the same one wherever it lies."""
    patient: str | None
    study: str | None
    frames: int
    identity_removed: bool
    """Whether the file says so (0012,0062)."""
    further: dict[str, Any]


def is_dicom(head: bytes) -> bool:
    """Whether a file that starts with these 132 bytes or more is DICOM."""
    return head[128:132] == b"DICM"


def _quietly(function: Callable[P, R]) -> Callable[P, R]:
    """Without pydicom's warnings, which quote the values of tags."""

    @functools.wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings(action="ignore"):
            return function(*args, **kwargs)

    return quiet


@_quietly
def read_facts(data: bytes) -> DicomFacts:
    """The facts of a DICOM file; DataError when it is none or has no pixels."""
    pydicom = need("pydicom", "DICOM files", "medssl[dicom]")
    try:
        tags = [*KEPT, *_GROUPING]
        dataset = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=tags)
        values = {name: str(dataset.get(name) or "").strip() for name in tags}
        frames = int(values["NumberOfFrames"] or 1)
    except Exception as error:  # pydicom raises many kinds for broken files
        raise DataError(f"is no readable DICOM file ({type(error).__name__})") from None
    if not values["Rows"]:
        raise DataError("is a DICOM file without an image")
    if not values["SOPInstanceUID"]:
        raise DataError("is a DICOM file without an instance UID")
    further: dict[str, Any] = {column: _code(values[name]) for name, column in KEPT.items() if name != "PatientAge"}
    further["age"] = _age(values["PatientAge"])
    return DicomFacts(
        hashlib.sha256(values["SOPInstanceUID"].encode()).hexdigest()[:20], values["PatientID"] or None,
        values["StudyInstanceUID"] or None, frames,
        values["PatientIdentityRemoved"].upper() == "YES", further,
    )  # fmt: skip


def _code(value: str) -> str | None:
    return value if _CODE.match(value) else None


def _age(value: str) -> float | None:
    found = _AGE.match(value.upper())
    return None if found is None else min(_OLDEST, round(int(found[1]) * _YEARS[found[2]], 1))


@_quietly
def frame_png(data: bytes, frame: int) -> bytes:
    """One frame as PNG: 8-bit colour, or grey of 8 or 16 bits.

    Raises:
        DataError: it cannot be decoded, has no such frame, is too large, or says that text is burnt into it.
    """
    pydicom = need("pydicom", "DICOM files", "medssl[dicom]")
    from pydicom.pixels import pixel_array  # type: ignore[attr-defined]

    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        frames = int(dataset.get("NumberOfFrames") or 1)
        pixels_in_all = int(dataset.Rows) * int(dataset.Columns)
    except Exception as error:
        raise DataError(f"is no readable DICOM file ({type(error).__name__})") from None
    if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES":
        raise DataError("says that text is burnt into its pixels (BurnedInAnnotation), which may name the patient")
    if frame >= frames:
        raise DataError(f"has {frames} frames, number {frame} is missing")
    if pixels_in_all > MAX_PIXELS:
        raise DataError(f"has {pixels_in_all:,} pixels a frame, more than {MAX_PIXELS:,}")
    try:
        samples = pixel_array(dataset, index=frame)
        return _colour(samples, dataset) if samples.ndim == 3 or "PALETTE" in _photometric(dataset) else _grey(samples, dataset)
    except Exception as error:
        syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
        name = getattr(syntax, "name", "no transfer syntax")
        raise DataError(f"its pixels ({name}) cannot be decoded ({type(error).__name__})") from None


def _photometric(dataset: Any) -> str:
    return str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").upper()


def _colour(samples: NDArray[Any], dataset: Any) -> bytes:
    from pydicom.pixels import apply_color_lut  # type: ignore[attr-defined]

    if "PALETTE" in _photometric(dataset):
        samples = apply_color_lut(samples, dataset)
        if samples.dtype != np.uint8:  # entries of 16 bits, however few the indices have
            samples = (samples >> 8).astype(np.uint8)
    elif samples.dtype != np.uint8:
        samples = (samples.astype(np.uint32) >> max(0, int(dataset.BitsStored) - 8)).astype(np.uint8)
    return png(samples[:, :, :3])


def _grey(samples: NDArray[Any], dataset: Any) -> bytes:
    from pydicom.pixels import apply_modality_lut  # type: ignore[attr-defined]

    bits = int(dataset.BitsStored)
    padding = dataset.get("PixelPaddingValue")
    padded = samples == int(padding) if padding is not None else np.zeros(samples.shape, bool)
    slope = float(dataset.get("RescaleSlope") or 1)
    if "ModalityLUTSequence" in dataset or dataset.get("WindowCenter") is not None or "VOILUTSequence" in dataset:
        levels, significant = _windowed(np.asarray(apply_modality_lut(samples, dataset), np.float64), dataset), 16
        down = False
    else:  # rescaling is linear: the samples carry as much
        signed = int(dataset.get("PixelRepresentation") or 0) == 1
        levels = (samples.astype(np.int64) + (1 << (bits - 1) if signed else 0)).clip(0, (1 << bits) - 1)
        significant, down = bits, slope < 0
    full = (1 << significant) - 1
    if (_photometric(dataset) == "MONOCHROME1") != down:
        levels = full - levels
    levels = np.where(padded, 0, levels)
    return png(levels.astype(np.uint8)) if significant == 8 else png(levels.astype(np.uint16), significant)


def _windowed(values: NDArray[np.float64], dataset: Any) -> NDArray[np.int64]:
    """The first window or VOI table of a file over 0 to 65535; values without one from their smallest to their largest."""
    from pydicom.pixels import apply_voi_lut  # type: ignore[attr-defined]

    low, high = float(values.min()), float(values.max())
    if "VOILUTSequence" in dataset:
        values = np.asarray(apply_voi_lut(values.astype(np.int64), dataset), np.float64)
        low, high = 0.0, float((1 << int(dataset.VOILUTSequence[0].LUTDescriptor[2])) - 1)
    elif dataset.get("WindowCenter") is not None:
        # What lies far outside on either side shows which output stands for black and for white.
        ends = np.array([values.min() - 1e9, values.max() + 1e9])
        shown = np.asarray(apply_voi_lut(np.concatenate([values.ravel(), ends]), dataset), np.float64)
        values, (low, high) = shown[:-2].reshape(values.shape), sorted(shown[-2:])
    if high <= low:
        return np.zeros(values.shape, np.int64)
    scaled: NDArray[np.int64] = np.rint((values - low) / (high - low) * 65535).clip(0, 65535).astype(np.int64)
    return scaled
