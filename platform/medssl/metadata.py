"""Removes what a camera, scanner or archive wrote beside the pixels: it can name the patient, the clinic and the day.

Nothing is re-encoded: the compressed pixels are copied byte for byte, so every decoder returns the same values as
before. What may stay is a list of what decoding needs; everything else goes, known or unknown:

- JPEG: frame, tables, scans, restart markers, the JFIF header (its thumbnail removed) and Adobe's colour transform flag
  stay. EXIF, XMP, ICC profiles, IPTC, comments, maker notes, thumbnails and whatever follows the end marker go.
- PNG: header, palette, transparency, pixels and the fixed-size colour and resolution chunks stay. Text, time, EXIF,
  ICC, private chunks, animation frames and trailing data go.
- TIFF (classic and BigTIFF): the file is laid out anew with the first page's pixel data and the tags that describe it.
  Text tags, EXIF and GPS directories, XMP, private tags, further pages and unreferenced bytes go.

ICC profiles go although they change how a screen shows the colours: medssl's decoders (and PIL's and torchvision's)
ignore them, and they carry free text that names device and site. An EXIF orientation other than "upright" would turn
the picture for every viewer when dropped, so it stays, alone, in a minimal EXIF block of 26 bytes.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from medssl.errors import DataError

ImageFormat = Literal["jpeg", "png", "tiff"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHER_SIGNATURES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP or another RIFF file",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"%PDF": "PDF",
    b"SIMPLE": "FITS",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"<": "HTML, XML or SVG text",
    b"version https://git-lfs": "a Git LFS pointer, not the image itself",
}


def sniff_format(data: bytes) -> ImageFormat:
    """The format by signature, whatever the file's name says; DataError for anything but JPEG, PNG and TIFF."""
    if data[:2] == b"\xff\xd8":
        return "jpeg"
    if data[:8] == _PNG_SIGNATURE:
        return "png"
    if data[:4] in _TIFF_SIGNATURES:
        return "tiff"
    if not data:
        raise DataError("the file is empty")
    found = "DICOM (ingest a folder of it with --layout dicom)" if data[128:132] == b"DICM" else "an unknown format"
    found = next((name for signature, name in _OTHER_SIGNATURES.items() if data.startswith(signature)), found)
    raise DataError(f"not a JPEG, PNG or TIFF image but {found}")


def strip_metadata(data: bytes) -> bytes:
    """`data` without embedded metadata; the pixels are the same bytes. DataError when unreadable or cut short."""
    kind = sniff_format(data)
    if kind == "jpeg":
        return _strip_jpeg(data)
    return _strip_png(data) if kind == "png" else _strip_tiff(data)


# --------------------------------------------------------------------------------------------------------------- EXIF


def _orientation_of_exif(tiff: bytes) -> int:
    """Orientation (1..8) in an EXIF block that starts with its TIFF header; 1 when there is none or it is damaged."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == 0x0112 and kind == 3 and values == 1:
                (value,) = struct.unpack_from(order + "H", tiff, entry + 8)
                return int(value) if 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


def _minimal_exif(orientation: int) -> bytes:
    """An EXIF block (from its TIFF header on) that holds the orientation and nothing else."""
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


# --------------------------------------------------------------------------------------------------------------- JPEG

_SOI, _EOI, _SOS, _APP0, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
_JPEG_KEPT = {*range(0xC0, 0xD0), 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, _SOS} - {0xC8}
"""Frame headers, Huffman and arithmetic tables, quantisation, line count, restart interval, hierarchy, scans."""
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""Within a scan 0xFF is followed by 0 (a data byte), a restart marker or fill; anything else ends the scan."""


class JpegSegment(NamedTuple):
    """A marker segment: `data[start:end]` holds marker and payload; for a scan also the entropy-coded bytes."""

    marker: int
    start: int
    payload: int
    end: int


def jpeg_segments(data: bytes) -> Iterator[JpegSegment]:
    """The segments from SOI to EOI, both excluded. DataError when the end marker is missing or a segment is cut."""
    position = 2
    while True:
        start = data.find(b"\xff", position)
        marker_at = start + 1
        while start >= 0 and marker_at < len(data) and data[marker_at] == 0xFF:
            marker_at += 1
        if start < 0 or marker_at >= len(data):
            raise DataError("truncated: the JPEG has no end marker")
        marker = data[marker_at]
        if marker == _EOI:
            return
        if marker in (0x00, 0x01) or 0xD0 <= marker <= _SOI:  # no payload; outside scans only noise
            position = marker_at + 1
            continue
        payload = marker_at + 3
        end = marker_at + 1 + int.from_bytes(data[marker_at + 1 : payload], "big")
        if end > len(data) or payload > len(data):
            raise DataError("truncated: the JPEG ends within a segment")
        if marker == _SOS:
            scan_end = _SCAN_END.search(data, end)
            if scan_end is None:
                raise DataError("truncated: the JPEG ends within its pixels")
            end = scan_end.start()
        yield JpegSegment(marker, marker_at - 1, payload, end)
        position = end


def jpeg_orientation(data: bytes) -> int:
    """EXIF orientation (1..8) of a JPEG, 1 when there is none."""
    for segment in jpeg_segments(data):
        if segment.marker == _APP1 and data.startswith(b"Exif\0\0", segment.payload):
            return _orientation_of_exif(data[segment.payload + 6 : segment.end])
        if segment.marker == _SOS:
            break
    return 1


def _strip_jpeg(data: bytes) -> bytes:
    orientation = jpeg_orientation(data)
    kept: list[bytes] = []
    header = b""
    for marker, start, payload, end in jpeg_segments(data):
        if marker in _JPEG_KEPT:
            kept.append(data[start:end])
        elif marker == _APP0 and data.startswith(b"JFIF\0", payload) and end - payload >= 14 and not header:
            header = b"\xff\xe0\x00\x10" + data[payload : payload + 12] + b"\0\0"  # thumbnail of 0 x 0
        elif marker == _APP14 and data.startswith(b"Adobe", payload) and end - payload >= 12:
            kept.append(b"\xff\xee\x00\x0e" + data[payload : payload + 12])
    if orientation != 1:
        block = b"Exif\0\0" + _minimal_exif(orientation)
        header += b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    return b"\xff\xd8" + header + b"".join(kept) + b"\xff\xd9"


# ---------------------------------------------------------------------------------------------------------------- PNG

_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"pHYs"}


class PngChunk(NamedTuple):
    """A chunk: `data[start:end]` holds length, name, body and checksum; `body` is the content."""

    name: bytes
    start: int
    end: int
    body: memoryview


def png_chunks(data: bytes) -> Iterator[PngChunk]:
    """The chunks up to and with IEND. DataError when cut short or when the checksum of a kept chunk is wrong."""
    view = memoryview(data)
    position = 8
    while True:
        if position + 12 > len(data):
            raise DataError("truncated: the PNG has no end chunk")
        (length,) = struct.unpack_from(">I", data, position)
        name = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise DataError(f"truncated: the PNG ends within a chunk {name!r}")
        body = view[position + 8 : end - 4]
        if name in _PNG_KEPT and zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise DataError(f"damaged: wrong checksum in a PNG chunk {name!r}")
        yield PngChunk(name, position, end, body)
        if name == b"IEND":
            return
        position = end


def _strip_png(data: bytes) -> bytes:
    kept: list[bytes] = []
    orientation = 1
    for name, start, end, body in png_chunks(data):
        if name == b"eXIf":
            orientation = _orientation_of_exif(bytes(body))
        elif name in _PNG_KEPT:
            kept.append(data[start:end])
    if orientation != 1:
        body_bytes = b"eXIf" + _minimal_exif(orientation)
        chunk = struct.pack(">I", len(body_bytes) - 4) + body_bytes + struct.pack(">I", zlib.crc32(body_bytes))
        kept.insert(1, chunk)  # after IHDR, before the pixels
    return _PNG_SIGNATURE + b"".join(kept)


# --------------------------------------------------------------------------------------------------------------- TIFF

_TIFF_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_STRIPS, _TILES, _COMPRESSION, _JPEG_TABLES = (273, 279), (324, 325), 259, 347
_TIFF_KEPT = {
    *(
        256,
        257,
        258,
        259,
        262,
        266,
        274,
        277,
        278,
        280,
        281,
        282,
        283,
        284,
        292,
        293,
        296,
        317,
        320,
        322,
        323,
        338,
        339,
    ),
    *(_JPEG_TABLES, 529, 530, 531, 532, *_STRIPS, *_TILES),
}
"""Size, depth, compression, photometry, fill order, orientation, rows per strip, range, resolution, planes, fax
options, predictor, colour map, tile size, extra samples, sample format, JPEG tables, YCbCr description, where the
pixels are."""
_PIXELS_CUT = "truncated: the TIFF's pixels reach beyond its end"


class _TiffLayout(NamedTuple):
    """Byte order and field widths of a file: classic (4-byte offsets) or BigTIFF (8-byte offsets)."""

    order: str
    big: bool

    @property
    def offset(self) -> str:
        return self.order + ("Q" if self.big else "I")

    @property
    def offset_bytes(self) -> int:
        return 8 if self.big else 4

    @property
    def entries(self) -> str:
        return self.order + ("Q" if self.big else "H")


class TiffTag(NamedTuple):
    """A directory entry with its value as stored, wherever in the file that was."""

    kind: int
    values: int
    """How many; `value` holds them all."""
    value: bytes


def _tiff_layout(data: bytes) -> _TiffLayout:
    return _TiffLayout("<" if data[:2] == b"II" else ">", 43 in data[2:4])


def tiff_tags(data: bytes) -> dict[int, TiffTag]:
    """All tags of the first page. DataError when the directory or a value lies outside the file."""
    layout = _tiff_layout(data)
    tags: dict[int, TiffTag] = {}
    try:
        (at,) = struct.unpack_from(layout.offset, data, 8 if layout.big else 4)
        (entries,) = struct.unpack_from(layout.entries, data, at)
        at += struct.calcsize(layout.entries)
        entry_bytes = 4 + 2 * layout.offset_bytes
        for entry in range(at, at + min(entries, 65_536) * entry_bytes, entry_bytes):
            tag, kind = struct.unpack_from(layout.order + "HH", data, entry)
            (count,) = struct.unpack_from(layout.offset, data, entry + 4)
            size = count * _TIFF_TYPE_BYTES.get(kind, 1)
            where = entry + 4 + layout.offset_bytes
            if size > layout.offset_bytes:
                (where,) = struct.unpack_from(layout.offset, data, where)
            if tag in _TIFF_KEPT and (where + size > len(data) or kind not in _TIFF_TYPE_BYTES):
                raise DataError(f"truncated: the value of TIFF tag {tag} lies beyond the file's end")
            tags[tag] = TiffTag(kind, count, data[where : where + size])
    except (struct.error, OverflowError):
        raise DataError("truncated: the TIFF's directory lies beyond the file's end") from None
    return tags


def tiff_numbers(data: bytes, tag: TiffTag) -> tuple[int, ...]:
    """The values of an integer tag (BYTE, SHORT, LONG, LONG8)."""
    code = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(tag.kind)
    if code is None:
        raise DataError("damaged: a TIFF tag that must hold whole numbers does not")
    numbers = struct.unpack(f"{_tiff_layout(data).order}{tag.values}{code}", tag.value)
    if not numbers:
        raise DataError("damaged: a TIFF tag that must hold a number is empty")
    return numbers


def _tiff_pixels(data: bytes, tags: dict[int, TiffTag]) -> tuple[tuple[int, int], list[bytes]]:
    """The tag pair that locates the pixels, and the strips or tiles themselves."""
    pair = _TILES if _TILES[0] in tags else _STRIPS
    if pair[0] not in tags or pair[1] not in tags:
        raise DataError("damaged: the TIFF does not say where its pixels are")
    offsets, sizes = (tiff_numbers(data, tags[tag]) for tag in pair)
    if len(offsets) != len(sizes) or sum(sizes) > 4 * len(data):
        raise DataError("damaged: the TIFF's pixel offsets and sizes contradict each other")
    if any(at + size > len(data) for at, size in zip(offsets, sizes, strict=True)):
        raise DataError(_PIXELS_CUT)
    parts = [data[at : at + size] for at, size in zip(offsets, sizes, strict=True)]
    compression = tiff_numbers(data, tags[_COMPRESSION])[0] if _COMPRESSION in tags else 1
    if compression == 6:
        raise DataError("the TIFF uses the withdrawn 'old JPEG' compression: convert it first")
    if compression == 7:  # a JPEG stream per strip, which can carry comments of its own
        parts = [_strip_jpeg(part) if part[:2] == b"\xff\xd8" else part for part in parts]
    return pair, parts


def _strip_tiff(data: bytes) -> bytes:
    layout = _tiff_layout(data)
    tags = {tag: value for tag, value in tiff_tags(data).items() if tag in _TIFF_KEPT}
    pair, parts = _tiff_pixels(data, tags)
    if _JPEG_TABLES in tags and tags[_JPEG_TABLES].value[:2] == b"\xff\xd8":
        table = _strip_jpeg(tags[_JPEG_TABLES].value)
        tags[_JPEG_TABLES] = TiffTag(7, len(table), table)
    out = bytearray(data[:8] + bytes(8) if layout.big else data[:4] + bytes(4))
    offsets = []
    for part in parts:
        offsets.append(len(out))
        out += part + b"\0" * (len(part) % 2)
    wide = 16 if layout.big else 4
    for tag, numbers in zip(pair, (offsets, [len(part) for part in parts]), strict=True):
        tags[tag] = TiffTag(
            wide, len(numbers), struct.pack(f"{layout.order}{len(numbers)}{layout.offset[1]}", *numbers)
        )
    directory = struct.pack(layout.entries, len(tags))
    for tag, (kind, count, value) in sorted(tags.items()):
        if len(value) > layout.offset_bytes:
            where = struct.pack(layout.offset, len(out))
            out += value + b"\0" * (len(value) % 2)
        else:
            where = value.ljust(layout.offset_bytes, b"\0")
        directory += struct.pack(layout.order + "HH", tag, kind) + struct.pack(layout.offset, count) + where
    out += bytes(-len(out) % 8)
    struct.pack_into(layout.offset, out, 8 if layout.big else 4, len(out))
    return bytes(out) + directory + bytes(layout.offset_bytes)
