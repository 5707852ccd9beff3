"""Bytes -> pixels: JPEG, PNG and TIFF with 8 or 16 bits, grey, palette, colour or with transparency.

JPEG and PNG go through torchvision's decoder (about twice PIL's speed per core), TIFF through PIL. Shapes: H height,
W width, C channels; what callers get is uint8 and (H, W, C).

Depth: 16-bit images become 8-bit ones here, once, by one of two rules (:data:`Depth`). Views, caches and encoders see
256 levels, so the rule decides how much of a radiograph is left.

- `window`, the default, spreads what the image holds: from the smallest to the largest sample but for 1 in 1000 at
  either end, which is clipped. Samples of exactly 0 and 65535 don't count where there are others: collimated borders,
  padding and burnt-in marks have these values, and one mark would otherwise leave a 12-bit radiograph 16 levels. So
  images of 10, 12 or 14 bits, with or without an offset, all keep 256 levels, whatever their neighbours hold; what is
  lost is the absolute intensity, which is arbitrary in radiographs (exposure) and most MR images.
- `detector` keeps it, for calibrated images such as CT: 0 to the detector's full scale. A PNG says its depth in its
  sBIT chunk; where nothing says it, it is the smallest of 10, 12, 14 and 16 bits that holds the largest sample.
  Signed samples are counted from the smallest.

Colour images take `detector` under either name: stretched channels would be other colours.

Transparency is dropped (the stored colours are what the camera saw). Palettes are expanded. EXIF orientation is
applied, so pixels are as a viewer shows them. Formats are told by signature, not by file name.
"""

from __future__ import annotations

import io
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError
from medssl.metadata import (
    ImageFormat,
    TiffTag,
    jpeg_orientation,
    jpeg_segments,
    png_chunks,
    sniff_format,
    strip_metadata,
    tiff_numbers,
    tiff_tags,
)

if TYPE_CHECKING:
    import torch

__all__ = ["DECODER", "Depth", "ImageFacts", "Resize", "decode", "load", "perceptual_hash", "probe", "strip_metadata"]

Resize = Literal["squash", "crop", "pad"]
Depth = Literal["window", "detector"]
"""How 16 bits become 8; the text at the top of this file tells both."""
Pixels = NDArray[np.uint8]

DECODER = 2
"""Raised when the pixels of a stored image change, so that none decoded before are taken for them. 2: `window`."""

MAX_PIXELS = 150_000_000
"""Larger images are refused: one would need over 450 MB decoded (and a small file can claim any size)."""

_DETECTOR_BITS = (10, 12, 14, 16)
_CLIPPED_ONE_IN = 1000
"""Of the samples that count, one in this many is clipped at either end of a window."""


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image once it has been decoded in full."""

    format: ImageFormat
    width: int
    """Pixels across as shown, that is after the EXIF orientation."""
    height: int
    channels: int
    """1 or 3; transparency is not counted, palettes count as 3."""
    bits: int
    """Bits of a stored sample: 8 (also for 1, 2 and 4) or 16."""


def load(data: bytes, *, depth: Depth = "window") -> tuple[Pixels, ImageFacts]:
    """Decodes in full at the stored size: (H, W, C) uint8 with C 1 or 3, and the facts. DataError says why not.

    `depth` is how 16-bit samples become 8-bit ones; images of 8 bits come as they are stored.
    """
    if depth not in ("window", "detector"):
        raise DataError(f"depth is {depth!r}: choose window or detector")
    kind = sniff_format(data)
    stored = {"jpeg": _load_jpeg, "png": _load_png, "tiff": _load_tiff}[kind](data)
    pixels = stored.samples if stored.samples.dtype == np.uint8 else _to_8_bits(stored, depth)
    height, width, channels = pixels.shape
    return pixels, ImageFacts(kind, width, height, channels, stored.bits)


def probe(data: bytes) -> ImageFacts:
    """Facts of an image, found by decoding all of it; DataError with the reason when it is unreadable or truncated."""
    return load(data)[1]


def decode(data: bytes, *, px: int, resize: Resize, channels: int = 3, depth: Depth = "window") -> Pixels:
    """Decodes to (px, px, channels) uint8 with antialiased bilinear resizing.

    `resize`: "squash" ignores the aspect ratio, "crop" keeps the centre square, "pad" adds black bars.
    `channels`: 3 repeats grey images, 1 takes the luminance of colour ones (ITU-R 601, as PIL's "L").
    `depth`: how 16-bit samples become 8-bit ones, before the resizing.
    """
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}: choose 1 or 3")
    pixels, _ = load(data, depth=depth)
    if channels == 1:
        pixels = _to_grey(pixels)
    if resize == "crop":
        side = min(pixels.shape[:2])
        top, left = ((size - side) // 2 for size in pixels.shape[:2])
        pixels = pixels[top : top + side, left : left + side]
    if resize == "pad":
        pixels = _pad(pixels, px)
    elif resize in ("squash", "crop"):
        pixels = _resized(pixels, px, px)
    else:
        raise DataError(f"resize is {resize!r}: choose squash, crop or pad")
    return pixels if pixels.shape[2] == channels else np.repeat(pixels, channels, axis=2)


def perceptual_hash(pixels: Pixels) -> str:
    """64-bit perceptual hash of (H, W, C) uint8 pixels as 16 hex digits; alike pictures differ in few bits.

    pHash: the 8 x 8 lowest frequencies of the discrete cosine transform of the 32 x 32 luminance, each compared with
    their median (Zauner 2010; the `imagehash` package computes the same up to the resizing filter).
    """
    small_HW = _to_grey(_resized(pixels, 32, 32))[:, :, 0].astype(np.float64)
    low = _DCT @ small_HW @ _DCT.T
    return np.packbits(low > np.median(low)).tobytes().hex()


_DCT = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32)[None, :] + 1) / 64)
"""The first 8 rows of the 32-point type-II cosine transform."""


# ------------------------------------------------------------------------------------------------------------ resizing


def _to_grey(pixels: Pixels) -> Pixels:
    if pixels.shape[2] == 1:
        return pixels
    red, green, blue = (pixels[:, :, channel].astype(np.uint32) for channel in range(3))
    weighted = 19595 * red + 38470 * green + 7471 * blue  # PIL's fixed-point weights
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def _resized(pixels: Pixels, height: int, width: int) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    import torch

    writable = np.require(pixels, requirements=["C", "W"])  # torch warns of read-only memory
    source = torch.from_numpy(writable).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(source, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def _pad(pixels: Pixels, px: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = px / max(height, width)
    inner = _resized(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
    canvas = np.zeros((px, px, pixels.shape[2]), np.uint8)
    top, left = (px - inner.shape[0]) // 2, (px - inner.shape[1]) // 2
    canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return canvas


# --------------------------------------------------------------------------------------------------------------- depth


class _Stored(NamedTuple):
    """An image as its file holds it."""

    samples: NDArray[Any]
    """(H, W, C) uint8 or uint16."""
    bits: int
    """Of a stored sample: 8 or 16."""
    significant: int | None = None
    """Bits that the detector fills, where the file says so."""
    inverted: bool = False
    """Whether white is zero."""
    signed: bool = False
    """Whether the samples were signed; they come with 32768 added."""


def _to_8_bits(stored: _Stored, depth: Depth) -> Pixels:
    samples: NDArray[np.uint16] = stored.samples
    limits = _window(samples) if depth == "window" and samples.shape[2] == 1 else None
    if limits is None:
        low = int(samples.min(initial=65535)) if stored.signed else 0
        limits = low, low + _full_scale(int(samples.max(initial=low)) - low, stored.significant)
    low, high = limits
    # A table of all 65,536 levels is faster than arithmetic on each pixel, and rounds the same everywhere.
    levels = np.clip(np.arange(65536, dtype=np.int64), low, high) - low
    table = ((levels * 255 + (high - low) // 2) // (high - low)).astype(np.uint8)
    pixels: Pixels = table[samples]
    return 255 - pixels if stored.inverted else pixels


def _full_scale(largest: int, significant: int | None) -> int:
    """The largest sample a detector could have given."""
    if significant is None or largest >= 1 << significant:
        significant = next(bits for bits in _DETECTOR_BITS if largest < 1 << bits)
    return (1 << significant) - 1


def _window(samples: NDArray[np.uint16]) -> tuple[int, int] | None:
    """The samples that become 0 and 255; None when all are the same."""
    counts = np.bincount(samples.ravel(), minlength=65536)
    present = np.flatnonzero(counts)
    if len(present) < 2:
        return None
    inner = counts.copy()
    inner[[0, -1]] = 0  # borders and marks
    if inner.any():
        below = inner.cumsum()
        low = int(np.argmax(below * _CLIPPED_ONE_IN > below[-1]))
        high = int(np.argmax(below * _CLIPPED_ONE_IN >= below[-1] * (_CLIPPED_ONE_IN - 1)))
        if low < high:
            return low, high
    return int(present[0]), int(present[-1])  # a mask, or hardly more


# ------------------------------------------------------------------------------------------------------------ decoders


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DataError(f"the image is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise DataError(f"the image has {width} x {height} pixels: at most {MAX_PIXELS:,} are decoded")


def _as_tensor(data: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _reason(error: Exception) -> str:
    """The decoder's own words without its source path; the first line only."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "truncated" in text.lower():
        return "truncated: the pixels end early"
    return f"cannot be decoded: {text.rsplit(': ', 1)[-1][:120]}"


def _load_jpeg(data: bytes) -> _Stored:
    from torchvision.io import ImageReadMode, decode_jpeg

    frame = next(
        (s for s in jpeg_segments(data) if 0xC0 <= s.marker <= 0xCF and s.marker not in (0xC4, 0xC8, 0xCC)), None
    )
    if frame is None or frame.end - frame.payload < 6:
        raise DataError("damaged: the JPEG has no frame header")
    bits, high, low, wide, narrow, components = data[frame.payload : frame.payload + 6]
    _check_size(wide << 8 | narrow, high << 8 | low)
    if bits != 8:
        raise DataError(f"a JPEG with {bits} bits a sample: only 8 are decoded")
    mode = ImageReadMode.GRAY if components == 1 else ImageReadMode.RGB
    try:
        image_CHW = decode_jpeg(_as_tensor(data), mode=mode, apply_exif_orientation=jpeg_orientation(data) != 1)
    except RuntimeError as error:
        raise DataError(_reason(error)) from None
    return _Stored(_rows_columns_channels(image_CHW), 8)


def _load_png(data: bytes) -> _Stored:
    import torch
    from torchvision.io import ImageReadMode, decode_png

    chunks = {chunk.name: chunk.body for chunk in png_chunks(data) if chunk.name in (b"IHDR", b"sBIT", b"eXIf")}
    if len(chunks.get(b"IHDR", b"")) != 13:
        raise DataError("damaged: the PNG has no header")
    header = bytes(chunks[b"IHDR"])
    depth, colour = header[8], header[9]
    _check_size(int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big"))
    palette = colour == 3
    try:
        image_CHW = decode_png(
            _as_tensor(data),
            mode=ImageReadMode.RGB if palette else ImageReadMode.UNCHANGED,
            apply_exif_orientation=b"eXIf" in chunks,
        )
    except RuntimeError as error:
        raise DataError(_reason(error)) from None
    image_CHW = image_CHW[: 3 if image_CHW.shape[0] >= 3 else 1]  # drops transparency
    significant = None
    if image_CHW.dtype != torch.uint8 and chunks.get(b"sBIT"):
        significant = max(bytes(chunks[b"sBIT"])[: image_CHW.shape[0]])
    return _Stored(_rows_columns_channels(image_CHW), 16 if depth == 16 else 8, significant)


def _rows_columns_channels(image_CHW: torch.Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(image_CHW.permute(1, 2, 0).contiguous().numpy())


def _load_tiff(data: bytes) -> _Stored:
    tags = tiff_tags(data)
    if 256 not in tags or 257 not in tags:
        raise DataError("damaged: the TIFF does not say its size")
    _check_size(tiff_numbers(data, tags[256])[0], tiff_numbers(data, tags[257])[0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of sizes that _check_size has let pass, and of odd tags
            return _from_pil(data, tags)
    except DataError:
        raise
    except Exception as error:  # PIL raises nearly anything on damaged files
        raise DataError(_reason(error)) from None


def _from_pil(data: bytes, tags: dict[int, TiffTag]) -> _Stored:
    image, raw_mode = _opened_tiff(data)
    bits = max(tiff_numbers(data, tags[258])) if 258 in tags else 1
    inverted = 262 in tags and tiff_numbers(data, tags[262])[0] == 0  # white is zero; PIL inverts 8-bit pixels only
    if image.mode.startswith("I;16"):
        return _Stored(np.asarray(image).astype(np.uint16)[:, :, None], 16, inverted=inverted)
    if image.mode == "I" and bits == 16:
        samples = (np.asarray(image) + 32768).astype(np.uint16)
        return _Stored(samples[:, :, None], 16, inverted=inverted, signed=True)
    if image.mode in ("F", "I"):
        raise DataError("a TIFF with floating-point or 32-bit samples: convert it to 8 or 16 bits first")
    if bits == 16 and raw_mode.startswith(("RGB;16", "RGBX;16", "RGBA;16")):
        low, _ = _opened_tiff(data, low_bytes=True)
        high_HWC, low_HWC = (np.asarray(part)[:, :, :3].astype(np.uint16) for part in (image, low))
        return _Stored(high_HWC << 8 | low_HWC, 16)
    grey = image.mode in ("1", "L", "LA", "La")
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return _Stored(pixels[:, :, None] if grey else pixels, 16 if bits > 8 else 8)


def _opened_tiff(data: bytes, low_bytes: bool = False) -> tuple[Any, str]:
    """PIL's image, loaded and upright, and the layout of its samples.

    PIL keeps the high byte of 16-bit colours alone, which leaves 16 levels of 12 bits. Told that the samples have the
    other byte order, it keeps the low one (`low_bytes`).
    """
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
        tiles: list[Any] = list(image.tile)  # (decoder, extents, offset, (layout, ...))
        raw_mode = str(tiles[0].args[0])
        if low_bytes:
            order = raw_mode[-1] if raw_mode[-1] != "N" else {"little": "L", "big": "B"}[sys.byteorder]
            other = raw_mode[:-1] + {"L": "B", "B": "L"}[order]
            image.tile = [tile._replace(args=(other, *tile.args[1:])) for tile in tiles]
        image.load()  # applies the orientation tag
        return image, raw_mode
