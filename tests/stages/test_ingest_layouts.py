"""ingest of public layouts and DICOM on a real local Ray: what gets into the store, and what never does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.datasets import miniatures
from tests.datasets.test_dicom import CANARY, RAMP, dicom, folder

from medssl import cli
from medssl.datasets.dataset import open_dataset
from medssl.datasets.findings import FindingsParams, finding_labels
from medssl.errors import DataError
from medssl.images import load
from medssl.stages.ingest import IngestOptions, ingest

pytestmark = pytest.mark.ray
KEY = b"sixteen bytes or more of a key"


def images(target: Path) -> dict[str, Any]:
    """Decoded images by id."""
    dataset = open_dataset(str(target))
    found = {}
    for shard in dataset.shards:
        for row in pq.read_table(io.BytesIO(dataset.store.read(shard.path))).to_pylist():
            found[row["image_id"]] = load(row["image"])[0]
    return found


def test_dicom_leaves_no_name_path_or_uid_behind(ray_session: Any, tmp_path: Path) -> None:
    root = folder(tmp_path / "in", PatientIdentityRemoved="NO", Modality="CT", InstitutionName="ZEBRA hospital")
    (root / "ZEBRA_CANARY" / "burnt").write_bytes(dicom(RAMP, BurnedInAnnotation="YES", PatientIdentityRemoved="NO"))
    options = IngestOptions(layout="dicom", pseudonym_key=KEY, reject_limit=0.2, shard_rows=4)
    result = ingest(str(root), str(tmp_path / "out"), options)
    assert result.images == 6 and len(result.rejected) == 1 and "burnt into its pixels" in result.rejected[0].reason
    index = open_dataset(str(tmp_path / "out")).index()
    assert index["patient_id"].nunique() == 2 and index.groupby("bag_id").size().tolist().count(3) == 1
    assert index.groupby("patient_id")["split"].nunique().max() == 1
    whole = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    decoded = index.astype(str).to_string() + json.dumps(result.card)
    for secret in (CANARY, "ZEBRA", "hospital", "1.9.0", "1.2.3", "p1"):
        assert secret.encode() not in whole and secret not in decoded
    assert result.card["layout"]["name"] == "dicom"
    assert all(pixels.shape == (12, 20, 1) and np.ptp(pixels) > 200 for pixels in images(tmp_path / "out").values())


def test_layouts_through_ingest(ray_session: Any, tmp_path: Path) -> None:
    """Official splits, columns and HDF5 patches arrive; what a folder doesn't say is completed as for any table."""
    miniatures.patchcamelyon(tmp_path / "pcam")
    ingest(str(tmp_path / "pcam"), str(tmp_path / "a"), IngestOptions(layout="patchcamelyon"))
    with h5py.File(tmp_path / "pcam" / "camelyonpatch_level_2_split_train_x.h5") as file:
        assert np.array_equal(images(tmp_path / "a")["train-000002"], file["x"][2])
    miniatures.nih14(tmp_path / "nih")
    ingest(str(tmp_path / "nih"), str(tmp_path / "b"), IngestOptions(layout="nih14", findings=("Hernia",)))
    index = open_dataset(str(tmp_path / "b")).index()
    assert index.set_index("image_id").loc["00000003_000", "split"] == "test" and index["split"].notna().all()
    params = FindingsParams.model_validate({"names": ["Cardiomegaly", "Hernia"]})
    assert finding_labels(index, params, train="train").tolist() == [[1, 0], [1, 0], [0, 0], [0, 1]]


def test_a_wrong_folder_is_one_line_and_leaves_what_was_there(
    ray_session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    miniatures.ham10000(tmp_path / "ham")
    target = tmp_path / "out"
    ingest(str(tmp_path / "ham"), str(target), IngestOptions(layout="ham10000"))
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    (tmp_path / "ham" / "HAM10000_images_part_1" / "ISIC_0027419.jpg").unlink()
    for arguments in (["ham10000"], ["isic2018"], ["ham1000"], ["busi", "--drop", "x"]):
        assert cli.main(["ingest", str(tmp_path / "ham"), "--to", str(target), "--layout", *arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("medssl: ")
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    with pytest.raises(DataError, match=r"there is no layout 'ham1000': .*ham10000"):
        ingest(str(tmp_path / "ham"), str(target), IngestOptions(layout="ham1000"))


def test_findings_of_a_layout_stratify_its_splits(ray_session: Any, tmp_path: Path) -> None:
    """Without --findings too: images without a class would all go to train."""
    rows = []
    for patient in range(1, 31):
        path = f"CheXpert-v1.0-small/train/patient{patient:05d}/study1/view1_frontal.jpg"
        miniatures.draw(tmp_path / "c" / path)
        rows.append([path, "Female", 68, "Frontal", "AP", *["1.0" if patient % 2 else "0.0"], *[""] * 13])
    path = "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg"
    miniatures.draw(tmp_path / "c" / path)
    for name, table in (("train", rows), ("valid", [[path, *rows[0][1:]]])):
        miniatures.table(tmp_path / "c" / "CheXpert-v1.0-small" / f"{name}.csv", miniatures.CHEXPERT, table)
    ingest(str(tmp_path / "c"), str(tmp_path / "out"), IngestOptions(layout="chexpert"))
    index = open_dataset(str(tmp_path / "out")).index().set_index("patient_id")
    assert set(index["split"]) == {"train", "val", "test"} and index.loc["patient64541", "split"] == "test"
