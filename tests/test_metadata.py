"""Embedded metadata goes, pixels stay: judged by PIL, which shares no code with the stripper."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from medssl.errors import DataError
from medssl.metadata import strip_metadata

SECRET = b"DOE^JANE 1961-02-03"


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8))
    return noise.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """As a viewer shows them."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def exif(orientation: int | None = None) -> bytes:
    block = Image.Exif()
    block[0x010E] = SECRET.decode()  # image description
    block[0x013B] = SECRET.decode()  # artist
    if orientation:
        block[0x0112] = orientation
    block.get_ifd(0x8769)[0x9286] = SECRET  # user comment
    return block.tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def app(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 98}, {"restart_marker_rows": 1}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_loses_all_text_and_keeps_its_pixels(mode: str, options: dict[str, object]) -> None:
    plain = encoded(picture(mode), "JPEG", exif=exif(), comment=SECRET, icc_profile=b"ICC" + SECRET, **options)
    noisy = [app(marker, b"maker\0" + SECRET) for marker in range(0xE0, 0xF0)]
    data = plain[:2] + b"".join(noisy) + plain[2:] + b"PK" + SECRET
    stripped = strip_metadata(data)
    assert SECRET not in stripped and SECRET in data
    assert np.array_equal(pixels(stripped), pixels(plain))
    assert strip_metadata(stripped) == stripped
    with Image.open(io.BytesIO(stripped)) as image:
        assert not image.getexif() and "icc_profile" not in image.info and "comment" not in image.info


def test_jpeg_comment_between_the_scans_of_a_progressive_file_goes() -> None:
    plain = encoded(picture(), "JPEG", progressive=True)
    second_scan = plain.index(b"\xff\xda", plain.index(b"\xff\xda") + 2)
    table = (
        plain.rindex(b"\xff\xc4", 0, second_scan)
        if b"\xff\xc4" in plain[second_scan - 200 : second_scan]
        else second_scan
    )
    data = plain[:table] + app(0xFE, SECRET) + plain[table:]
    assert np.array_equal(pixels(data), pixels(plain))
    assert SECRET not in strip_metadata(data)
    assert np.array_equal(pixels(strip_metadata(data)), pixels(plain))


def test_jfif_thumbnail_goes() -> None:
    plain = encoded(picture(), "JPEG")
    assert plain[2:4] == b"\xff\xe0"
    thumb = app(0xE0, b"JFIF\0\1\1\0\0\1\0\1\2\2" + SECRET[:12]) + app(0xE0, b"JFXX\0\x10" + SECRET)
    stripped = strip_metadata(plain[:2] + thumb + plain[20:])
    assert SECRET[:12] not in stripped
    assert np.array_equal(pixels(stripped), pixels(plain))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_survives_alone(kind: str, orientation: int) -> None:
    data = encoded(picture(), kind, exif=exif(orientation))
    stripped = strip_metadata(data)
    assert SECRET in data and SECRET not in stripped
    assert np.array_equal(pixels(stripped), pixels(data))
    with Image.open(io.BytesIO(stripped)) as image:
        assert dict(image.getexif()) == ({} if orientation == 1 else {0x0112: orientation})


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_png_loses_all_text_and_keeps_its_pixels(mode: str) -> None:
    image = picture("L").convert("I").point(lambda v: v * 257).convert("I;16") if mode == "I;16" else picture(mode)
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", SECRET.decode())
    info.add_text("Packed", SECRET.decode() * 40, zip=True)
    info.add_itxt("Name", SECRET.decode())
    plain = encoded(image, "PNG", pnginfo=info, exif=exif(), icc_profile=SECRET)
    body = chunk(b"prVt", SECRET) + chunk(b"tIME", b"\x07\xe0\1\1\1\1\1")
    data = plain[:33] + body + plain[33:] + SECRET
    stripped = strip_metadata(data)
    kept = set()
    at = 8
    while at < len(stripped):
        (length,) = struct.unpack(">I", stripped[at : at + 4])
        kept.add(stripped[at + 4 : at + 8])
        at += 12 + length
    assert kept <= {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"pHYs"}
    assert SECRET not in stripped
    assert np.array_equal(pixels(stripped), pixels(plain))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_tiff_loses_all_text_and_keeps_its_pixels(mode: str, compression: str, big: bool) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (270, 305, 306, 315, 316, 33432, 65000):
        info[tag] = SECRET.decode()
    page = picture(mode, seed=1)
    data = encoded(
        picture(mode), "TIFF", tiffinfo=info, compression=compression, big_tiff=big, append_images=[page], save_all=True
    )
    stripped = strip_metadata(data + SECRET)
    assert SECRET in data and SECRET not in stripped
    assert np.array_equal(pixels(stripped), pixels(data))
    with Image.open(io.BytesIO(stripped)) as image:
        assert getattr(image, "n_frames", 1) == 1
        assert not {270, 305, 306, 315, 316, 33432, 65000} & set(image.tag_v2)  # type: ignore[attr-defined]
    assert strip_metadata(stripped) == stripped


def test_tiff_of_the_other_byte_order_and_in_tiles() -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 65536, (70, 90), dtype=np.uint16)
    out = io.BytesIO()
    tifffile.imwrite(out, values, byteorder=">", tile=(32, 32), description=SECRET.decode(), software=SECRET.decode())
    stripped = strip_metadata(out.getvalue())
    assert SECRET not in stripped
    assert np.array_equal(tifffile.imread(io.BytesIO(stripped)), values)


def test_tiff_strips_of_jpeg_lose_their_comments() -> None:
    data = encoded(picture(), "TIFF", compression="jpeg")
    with Image.open(io.BytesIO(data)) as image:
        offset, size = image.tag_v2[273][0], image.tag_v2[279][0]  # type: ignore[attr-defined]
    strip = data[offset : offset + size]
    assert strip[:2] == b"\xff\xd8"
    longer = strip[:2] + app(0xFE, SECRET) + strip[2:]
    moved = data + longer
    entry = struct.pack("<HHI", 273, 4, 1)
    at = moved.index(entry)
    moved = moved[: at + 8] + struct.pack("<I", len(data)) + moved[at + 12 :]
    at = moved.index(struct.pack("<H", 279), at)
    moved = moved[: at + 2] + struct.pack("<HII", 4, 1, len(longer)) + moved[at + 12 :]
    assert np.array_equal(pixels(moved), pixels(data))
    assert SECRET not in strip_metadata(moved)
    assert np.array_equal(pixels(strip_metadata(moved)), pixels(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 0.999))
def test_every_cut_is_noticed_or_harmless(kind: str, share: float) -> None:
    """A cut file is refused with a DataError, never another exception; a TIFF may lose trailing bytes nobody refers
    to.
    """
    from medssl.images import load

    data = encoded(picture(), kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    cut = data[: int(share * len(data))]
    with pytest.raises(DataError):
        load(strip_metadata(cut))


@settings(deadline=None, max_examples=200)
@given(
    data=st.binary(max_size=200), head=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0+"])
)
def test_noise_is_a_data_error_and_nothing_else(head: bytes, data: bytes) -> None:
    from medssl.images import load

    with pytest.raises(DataError):
        load(strip_metadata(head + data))


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "empty"), (b"GIF89a" + bytes(50), "GIF"), (bytes(128) + b"DICM" + bytes(9), "DICOM")]
)
def test_other_formats_are_named(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        strip_metadata(data)


def test_a_flipped_byte_in_a_png_is_noticed() -> None:
    data = bytearray(encoded(picture(), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(DataError, match="checksum"):
        strip_metadata(bytes(data))
