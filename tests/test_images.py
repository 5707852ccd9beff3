"""Decoding against PIL and closed forms; hashes of alike and unlike pictures."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from medssl.errors import DataError
from medssl.images import Depth, decode, load, perceptual_hash, probe


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(small[:, :, c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def png16(samples: np.ndarray, significant: int | None = None) -> bytes:
    """A 16-bit PNG of (H, W) or (H, W, C) samples written by hand, so that no library's rounding takes part."""
    samples = samples if samples.ndim == 3 else samples[:, :, None]
    height, width, channels = samples.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    chunks += [(b"sBIT", bytes([significant] * channels))] if significant else []
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "CMYK"])
def test_pixels_equal_those_of_pil(kind: str, mode: str) -> None:
    if (kind == "JPEG" and mode in ("1", "P", "LA", "RGBA")) or (kind == "PNG" and mode == "CMYK"):
        pytest.skip("the format has no such mode")
    data = encoded(Image.fromarray(smooth(30, 40)).convert(mode), kind)
    pixels, facts = load(data)
    with Image.open(io.BytesIO(data)) as image:
        grey = mode in ("1", "L", "LA")
        expected = np.asarray(image.convert("L" if grey else "RGB"))
    assert np.array_equal(pixels[:, :, 0] if grey else pixels, expected)
    assert (facts.format, facts.width, facts.height, facts.channels, facts.bits) == (
        kind.lower(),
        40,
        30,
        1 if grey else 3,
        8,
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_png_with_few_bits(bits: int) -> None:
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) % (1 << bits)
    packed = np.packbits(((values[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1).reshape(4, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    assert np.array_equal(load(b"\x89PNG\r\n\x1a\n" + body)[0][:, :, 0], values * (255 // ((1 << bits) - 1)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_scaled_not_clipped(channels: int) -> None:
    samples = np.linspace(0, 65535, 16 * 16 * channels).astype(np.uint16).reshape(16, 16, channels)
    pixels, facts = load(png16(samples), depth="detector")
    colours = samples[:, :, : 3 if channels >= 3 else 1]
    assert np.abs(pixels - colours / 257.0).max() <= 0.5
    assert facts.bits == 16 and len(np.unique(pixels)) > 80


@pytest.mark.parametrize("depth", ["window", "detector"])
def test_16_bit_tiff_equals_16_bit_png(depth: Depth) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    tiff = encoded(Image.fromarray(samples), "TIFF")
    assert np.array_equal(load(tiff, depth=depth)[0], load(png16(samples), depth=depth)[0])
    assert probe(tiff).bits == 16


def tiff(samples: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(out, samples, **options)
    return out.getvalue()


def test_16_bit_tiff_with_white_at_zero_is_inverted() -> None:
    samples = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    stored = tiff(samples, photometric="miniswhite")
    assert np.abs(load(stored, depth="detector")[0][:, :, 0] - (255 - samples / 257.0)).max() <= 0.5
    assert np.array_equal(load(stored)[0], 255 - load(tiff(samples, photometric="minisblack"))[0])


@pytest.mark.parametrize(
    ("largest", "significant", "full"), [(4095, None, 4095), (3000, None, 4095), (900, 12, 4095), (1000, None, 1023)]
)
def test_detector_depth(largest: int, significant: int | None, full: int) -> None:
    samples = np.linspace(0, largest, 400).astype(np.uint16).reshape(20, 20)
    pixels = load(png16(samples, significant), depth="detector")[0][:, :, 0]
    assert np.abs(pixels - samples * 255.0 / full).max() <= 0.5


def radiograph(seed: int = 0) -> np.ndarray:
    """12-bit samples of a narrow range, as detectors give them: 700 to 1700 of 0 to 4095."""
    return (smooth(64, 64, 1, seed)[:, :, 0] * (1000 / 255) + 700).astype(np.uint16)


def levels(samples: np.ndarray, depth: Depth = "window") -> int:
    return len(np.unique(load(png16(samples), depth=depth)[0]))


def test_a_narrow_range_keeps_its_levels() -> None:
    narrow = radiograph()
    assert levels(narrow, "detector") < 140 < 200 < levels(narrow)
    assert np.all(np.diff(load(png16(np.sort(narrow, axis=None)[None]))[0][0, :, 0].astype(int)) >= 0)
    pixels = load(png16(narrow))[0]
    assert pixels.min() == 0 and pixels.max() == 255


def test_borders_and_burnt_in_marks_do_not_flatten_a_radiograph() -> None:
    marked = radiograph()
    plain = load(png16(marked[8:, 4:]))[0]
    marked[:8], marked[:, :4] = 65535, 0
    assert levels(marked, "detector") < 10 and levels(marked) > 200
    pixels = load(png16(marked))[0]
    assert np.array_equal(pixels[8:, 4:], plain)
    assert (pixels[:8, 4:] == 255).all() and (pixels[8:, :4] == 0).all()


def test_neither_offset_nor_shift_nor_neighbouring_depths_change_a_windowed_image() -> None:
    samples = radiograph()
    pixels = load(png16(samples))[0]
    assert np.array_equal(load(png16(samples + 30000))[0], pixels)
    assert np.abs(load(png16(samples * 16))[0].astype(int) - pixels).max() <= 1  # 12 bits in the upper 12 of 16
    # A largest sample of 1023 or 1024 makes a factor of 4 by the detector's depth, and none by the window.
    low, high = (np.linspace(1, largest, 4096).astype(np.uint16).reshape(64, 64) for largest in (1023, 1024))
    assert np.abs(load(png16(low))[0].astype(int) - load(png16(high))[0]).max() <= 1
    assert load(png16(high), depth="detector")[0].max() < 70


def test_one_sample_in_a_thousand_is_clipped_at_either_end() -> None:
    samples = np.arange(1, 10_001, dtype=np.uint16).reshape(100, 100)
    samples[0, 0], samples[-1, -1] = 0, 65535  # these don't count: 9,998 samples do, of which 9 lie below and 10 above
    expected = np.clip((samples.astype(float) - 11) / (9990 - 11), 0, 1) * 255
    assert np.abs(load(png16(samples))[0][:, :, 0] - expected).max() <= 0.75


@pytest.mark.parametrize(
    ("values", "expected"), [((0, 5), (0, 255)), ((0, 65535), (0, 255)), ((700, 700), (174, 174)), ((0, 0), (0, 0))]
)
def test_masks_and_blank_images(values: tuple[int, int], expected: tuple[int, int]) -> None:
    samples = np.full((8, 8), values[0], np.uint16)
    samples[3:5] = values[1]
    pixels = load(png16(samples))[0]
    assert (pixels[0, 0, 0], pixels[3, 0, 0]) == expected


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_tiff_keeps_both_bytes(channels: int, order: str, compression: str | None) -> None:
    """PIL alone keeps the high byte: 16 levels of a 12-bit camera."""
    samples = np.random.default_rng(1).integers(0, 4096, (20, 30, channels), dtype=np.uint16)
    extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    stored = tiff(samples, photometric="rgb", byteorder=order, compression=compression, **extra)
    pixels, facts = load(stored)
    assert np.array_equal(pixels, load(png16(samples))[0])
    assert np.abs(pixels - samples[:, :, :3] * (255 / 4095)).max() <= 0.5
    assert (facts.channels, facts.bits) == (3, 16)


@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_tiff(order: str) -> None:
    """Hounsfield units: air, water, bone."""
    samples = np.linspace(-1000, 3000, 10_000).astype(np.int16).reshape(100, 100)
    stored = tiff(samples, photometric="minisblack", byteorder=order)
    expected = (samples.astype(float) + 1000) * 255 / 4000
    assert np.abs(load(stored)[0][:, :, 0] - expected).max() <= 1
    assert np.abs(load(stored, depth="detector")[0][:, :, 0] - (samples.astype(float) + 1000) * 255 / 4095).max() <= 0.5


def test_depth_reaches_decode_and_unknown_ones_are_refused() -> None:
    data = png16(radiograph())
    for depth in ("window", "detector"):
        out = decode(data, px=64, resize="squash", channels=1, depth=depth)
        assert np.array_equal(out, load(data, depth=depth)[0])
    with pytest.raises(DataError, match="depth is 'auto': choose window or detector"):
        load(data, depth="auto")  # type: ignore[arg-type]


def test_float_tiff_is_refused_with_advice() -> None:
    with pytest.raises(DataError, match="convert it to 8 or 16 bits"):
        load(encoded(Image.fromarray(np.ones((5, 5), np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    block = Image.Exif()
    block[0x0112] = orientation
    data = encoded(Image.fromarray(smooth(30, 40)), kind, exif=block)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    pixels, facts = load(data)
    assert np.array_equal(pixels, expected)
    assert (facts.width, facts.height) == ((30, 40) if orientation >= 5 else (40, 30))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (64, 64), (20, 30)])
def test_squash_agrees_with_pil_bilinear(shape: tuple[int, int], channels: int) -> None:
    image = Image.fromarray(smooth(*shape))
    out = decode(encoded(image, "PNG"), px=64, resize="squash", channels=channels)
    image = image.convert("L") if channels == 1 else image
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).reshape(64, 64, channels)
    assert out.dtype == np.uint8 and np.abs(out.astype(int) - expected).max() <= 1


def test_crop_keeps_the_centre_and_pad_keeps_all() -> None:
    array = np.zeros((60, 120, 3), np.uint8)
    array[:, 30:90] = 255
    data = encoded(Image.fromarray(array), "PNG")
    assert (decode(data, px=32, resize="crop") == 255).all()
    padded = decode(data, px=32, resize="pad")
    assert not padded[:8].any() and not padded[24:].any()
    assert padded[8:24].mean() == pytest.approx(127.5, abs=2)
    assert decode(data, px=32, resize="pad", channels=1).shape == (32, 32, 1)


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    out = decode(encoded(Image.fromarray(stripes), "PNG"), px=32, resize="squash")
    assert np.abs(out[:, 1:-1].astype(int) - 127).max() <= 2


def test_grey_becomes_three_equal_channels() -> None:
    out = decode(encoded(Image.fromarray(smooth(30, 40)).convert("L"), "JPEG"), px=16, resize="squash")
    assert out.shape == (16, 16, 3) and (out == out[:, :, :1]).all()


def test_huge_claims_are_refused_before_decoding() -> None:
    data = bytearray(png16(np.zeros((4, 4), np.uint16)))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DataError, match="100000 x 100000"):
        load(bytes(data))


def test_alike_pictures_have_near_hashes_and_others_do_not() -> None:
    def distance(first: str, second: str) -> int:
        return (int(first, 16) ^ int(second, 16)).bit_count()

    hashes = []
    for seed in range(12):
        image = Image.fromarray(smooth(200, 260, seed=seed))
        again = load(encoded(image.resize((130, 100)), "JPEG", quality=60))[0]
        brighter = (np.asarray(image) * 0.8 + 40).astype(np.uint8)
        own = perceptual_hash(np.asarray(image))
        assert len(own) == 16
        assert distance(own, perceptual_hash(again)) <= 4
        assert distance(own, perceptual_hash(brighter)) <= 6
        hashes.append(own)
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 10


def test_hash_agrees_with_imagehash() -> None:
    imagehash = pytest.importorskip("imagehash")
    for seed in range(5):
        array = smooth(200, 260, seed=seed)
        other = imagehash.phash(Image.fromarray(array))
        assert (int(perceptual_hash(array), 16) ^ int(str(other), 16)).bit_count() <= 4
