"""DICOM: pixels against arithmetic written out here, what is kept of the tags, and that nothing else gets into a dataset."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medssl.datasets.dicom import frame_png, read_facts
from medssl.datasets.layouts import read_layout
from medssl.datasets.members import member_uri, png, read_member, split_member
from medssl.errors import DataError
from medssl.images import load

CANARY = "ZEBRA^CANARY"


def dicom(samples: NDArray[Any], bits: int = 12, **tags: Any) -> bytes:
    """A DICOM file with these samples, (H, W), (F, H, W) or (H, W, 3)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = tags.pop("SOPInstanceUID", generate_uid())
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = samples.ndim == 3 and samples.shape[-1] == 3
    made.SamplesPerPixel = 3 if colour else 1
    made.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        made.PlanarConfiguration = 0
    made.Rows, made.Columns = samples.shape[:2] if colour or samples.ndim == 2 else samples.shape[1:]
    if samples.ndim == 3 and not colour:
        made.NumberOfFrames = len(samples)
    made.BitsAllocated = samples.dtype.itemsize * 8
    made.BitsStored, made.HighBit = bits, bits - 1
    made.PixelRepresentation = int(samples.dtype.kind == "i")
    made.PixelData = samples.tobytes()
    made.PatientName, made.PatientID, made.StudyInstanceUID = CANARY, "p1", "1.2.3"
    made.PatientIdentityRemoved = "YES"
    for name, value in tags.items():
        setattr(made, name, value)
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def opened(data: bytes) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(data)))


RAMP = np.arange(0, 4096, 17, dtype=np.uint16)[:240].reshape(12, 20)


def test_png_is_read_back_by_another_program() -> None:
    generator = np.random.default_rng(0)
    for shape, kind in [((5, 7), np.uint8), ((5, 7), np.uint16), ((4, 3, 3), np.uint8)]:
        pixels = generator.integers(0, np.iinfo(kind).max + 1, shape).astype(kind)
        assert np.array_equal(opened(png(pixels)), pixels)
        assert np.array_equal(opened(png(pixels, 8 if kind == np.uint8 else 12)), pixels)


def test_samples_without_a_window_stay_and_say_their_bits() -> None:
    data = frame_png(dicom(RAMP), 0)
    assert np.array_equal(opened(data), RAMP)
    expected = np.rint(RAMP.astype(float) * 255 / 4095)  # `detector` spreads the 12 stored bits
    assert np.abs(load(data, depth="detector")[0][:, :, 0] - expected).max() <= 1
    dark = load(frame_png(dicom(RAMP // 8), 0), depth="detector")[0][:, :, 0]
    assert dark.max() == round(255 * int(RAMP.max() // 8) / 4095), "an image that fills a part of its 12 bits stays dark"
    small = (RAMP // 16).astype(np.uint8)
    assert np.array_equal(opened(frame_png(dicom(small, bits=8), 0)), small)


def test_monochrome1_is_turned_and_signed_samples_are_shifted() -> None:
    assert np.array_equal(opened(frame_png(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"), 0)), 4095 - RAMP)
    signed = RAMP.astype(np.int16) - 2048
    assert np.array_equal(opened(frame_png(dicom(signed), 0)), RAMP)
    down = frame_png(dicom(RAMP, RescaleSlope=-2, RescaleIntercept=5), 0)
    assert np.array_equal(opened(down), 4095 - RAMP), "a falling rescale makes large samples dark"


def window(values: NDArray[Any], centre: float, width: float) -> NDArray[Any]:
    """PS3.3 C.11.2.1.2.1, written out."""
    low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    return np.where(values <= low, 0.0, np.where(values > high, 1.0, (values - (centre - 0.5)) / (width - 1) + 0.5)) * 65535


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2, -1000), (0.5, 3)])
def test_a_window_is_applied_after_the_rescale(slope: float, intercept: float) -> None:
    tags = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    values = RAMP.astype(float) * slope + intercept
    centre, width = float(values.mean()), float(np.ptp(values) / 3)
    found = opened(frame_png(dicom(RAMP, WindowCenter=centre, WindowWidth=width, **tags), 0))
    assert np.abs(found - window(values, centre, width)).max() <= 1 and found.min() == 0 and found.max() == 65535
    turned = dicom(RAMP, WindowCenter=centre, WindowWidth=width, PhotometricInterpretation="MONOCHROME1", **tags)
    assert np.array_equal(opened(frame_png(turned, 0)), 65535 - found)
    first = dicom(RAMP, WindowCenter=[centre, 1.0], WindowWidth=[width, 2.0], **tags)
    assert np.array_equal(opened(frame_png(first, 0)), found), "the first of several windows"


def test_padding_becomes_black() -> None:
    samples = RAMP.copy()
    samples[0] = 4000
    found = opened(frame_png(dicom(samples, PixelPaddingValue=4000), 0))
    assert (found[0] == 0).all() and np.array_equal(found[1:], RAMP[1:])


def test_frames_and_colour() -> None:
    frames = np.stack([RAMP, RAMP[::-1], RAMP // 2])
    data = dicom(frames)
    assert read_facts(data).frames == 3
    for number, frame in enumerate(frames):
        assert np.array_equal(opened(frame_png(data, number)), frame)
    with pytest.raises(DataError, match="has 3 frames, number 3 is missing"):
        frame_png(data, 3)
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    assert np.array_equal(opened(frame_png(dicom(colour, bits=8), 0)), colour)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_its_colours(bits: int) -> None:
    """PS3.3 C.7.6.3.1.5: entries of 8 or 16 bits, whatever the bits of the indices."""
    generator = np.random.default_rng(1)
    kind = np.uint8 if bits == 8 else np.uint16
    tables = {name: generator.integers(0, 1 << bits, 256).astype(kind) for name in ("Red", "Green", "Blue")}
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in tables.items():
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        tags[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    indices = generator.integers(0, 256, (6, 5)).astype(np.uint8)
    expected = np.stack([entries[indices] >> (bits - 8) for entries in tables.values()], axis=-1)
    assert np.array_equal(opened(frame_png(dicom(indices, bits=8, **tags), 0)), expected)


def lookup(entries: list[int], first: int, bits: int, **more: Any) -> Sequence:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [len(entries), first, bits], np.array(entries, np.uint16).tobytes()
    for name, value in more.items():
        setattr(table, name, value)
    return Sequence([table])


def test_tables_of_the_modality_and_of_the_display_are_applied() -> None:
    """A table's output range is that of its bits: an image that uses a part of it stays as dark as the display would show it."""
    samples = (RAMP // 16).astype(np.uint8)
    curve = [(value * value) // 128 for value in range(256)]  # up to 508 of 1023
    shown = opened(frame_png(dicom(samples, bits=8, VOILUTSequence=lookup(curve, 0, 10)), 0))
    assert np.abs(shown - np.array(curve)[samples] / 1023 * 65535).max() <= 1
    down = [1023 - 4 * value for value in range(256)]
    modality = lookup(down, 0, 16, ModalityLUTType="US")
    values = np.array(down)[samples]
    found = opened(frame_png(dicom(samples, bits=8, ModalityLUTSequence=modality), 0))
    assert np.abs(found - (values - values.min()) / np.ptp(values) * 65535).max() <= 1


def test_compressed_pixels() -> None:
    from pydicom.uid import JPEG2000Lossless, RLELossless

    samples = np.kron(RAMP, np.ones((4, 4), np.uint16))
    for syntax in (RLELossless, JPEG2000Lossless):
        made = pydicom.dcmread(io.BytesIO(dicom(samples)))
        made.compress(syntax)
        buffer = io.BytesIO()
        made.save_as(buffer)
        assert np.array_equal(opened(frame_png(buffer.getvalue(), 0)), samples)


@pytest.mark.filterwarnings("error")  # pydicom's warnings quote values
def test_what_is_kept_of_the_tags() -> None:
    tags = {"Modality": "DX", "ViewPosition": "PA", "PatientAge": "018M", "PatientSex": "F", "ManufacturerModelName": "Scan 5"}
    with warnings.catch_warnings(action="ignore"):
        odd = dicom(RAMP, BodyPartExamined="Sister's chest, Mrs Doe; see letter", **tags)
        aged, undated = (dicom(RAMP, PatientAge=age) for age in ("097Y", "old"))
    facts = read_facts(odd)
    frame_png(odd, 0)
    assert facts.further == {
        "modality": "DX", "body_part": None, "view": "PA", "laterality": None, "sex": "F", "age": 1.5, "manufacturer": None,
        "device": "Scan 5",
    }  # fmt: skip
    assert read_facts(aged).further["age"] == 90 and read_facts(undated).further["age"] is None


def test_what_is_refused() -> None:
    whole, tag = dicom(np.stack([RAMP] * 3)), b"\x28\x00\x08\x00IS\x02\x00"  # NumberOfFrames, two bytes of text
    assert whole.count(tag + b"3 ") == 1
    with pytest.raises(DataError, match="no readable DICOM"):
        read_facts(whole.replace(tag + b"3 ", tag + b"x "))
    for data, words in [
        (b"\0" * 128 + b"DICM" + b"junk" * 9, "no readable DICOM"),
        (dicom(RAMP, BurnedInAnnotation="YES"), "text is burnt into its pixels"),
        (dicom(RAMP)[:-50], "cannot be decoded"),
    ]:
        with pytest.raises(DataError, match=words):
            frame_png(data, 0)
    assert split_member("a::b/c.dcm::12") == ("a::b/c.dcm", 12) and split_member("/x/y.png") == ("/x/y.png", None)


def folder(root: Path, **tags: Any) -> Path:
    """Two patients: one with a study of three frames and a single image, one with a study of two files; names in every path."""
    studies = [("p1", "1.1", np.stack([RAMP] * 3)), ("p1", "1.2", RAMP), ("p2", "2.1", RAMP), ("p2", "2.1", RAMP // 2)]
    for number, (patient, study, samples) in enumerate(studies):
        place = root / "ZEBRA_CANARY" / f"IM{number}"
        place.parent.mkdir(parents=True, exist_ok=True)
        given = {"SOPInstanceUID": f"1.9.{number}", "PatientID": patient, "StudyInstanceUID": study} | tags
        place.write_bytes(dicom(samples, **given))
    (root / "DICOMDIR").write_bytes(b"an index")
    (root / "readme.txt").write_text("from the archive")
    return root


def test_a_folder_of_studies(tmp_path: Path) -> None:
    found = read_layout(str(folder(tmp_path / "a", Modality="CT")), "dicom").to_pandas()
    assert len(found) == 6 and found["patient_id"].value_counts().to_dict() == {"p1": 4, "p2": 2}
    assert found["bag_id"].value_counts().to_dict() == {"1.1": 3, "2.1": 2, "1.2": 1} and set(found["modality"]) == {"CT"}
    kept = found.drop(columns="uri").astype(str).to_string()
    assert "ZEBRA" not in kept and "IM0" not in kept and "1.9.0" not in kept
    for uri in found["uri"]:
        read_member(uri, lambda path: Path(path).read_bytes())
    again = read_layout(str(folder(tmp_path / "b" / "elsewhere", Modality="CT")), "dicom").to_pandas()
    assert again["image_id"].tolist() == found["image_id"].tolist(), "an image has its id wherever it lies"
    assert member_uri("x.dcm", 3) == "x.dcm::3"


def test_identities_have_to_be_removed_or_replaced(tmp_path: Path) -> None:
    root = str(folder(tmp_path, PatientIdentityRemoved="NO"))
    with pytest.raises(DataError, match=r"do not say that the patient's identity was removed .*--pseudonymise"):
        read_layout(root, "dicom")
    assert len(read_layout(root, "dicom", pseudonyms=True)) == 6


def test_without_pydicom_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)  # what an import finds where it is not installed
    with pytest.raises(DataError) as refused:
        read_layout(str(folder(tmp_path)), "dicom")
    assert str(refused.value) == "DICOM files need the package pydicom: pip install 'medssl[dicom]'"


def test_folders_that_are_not_dicom_alone(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "broken.dcm").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken.dcm is no DICOM file, or a damaged one"):
        read_layout(str(root), "dicom")
    (root / "broken.dcm").unlink()
    Image.new("L", (4, 4)).save(root / "photo.jpg")
    with pytest.raises(DataError, match=r"photo.jpg and 0 more are no DICOM files"):
        read_layout(str(root), "dicom")
