"""inspect on a dataset with known duplicates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medssl.datasets.synthetic import write_synthetic
from medssl.errors import DataError
from medssl.stages.ingest import IngestOptions, ingest
from medssl.stages.inspect import inspect_dataset, render_text


@pytest.mark.ray
def test_facts_and_text(ray_session: Any, tmp_path: Path) -> None:
    table = write_synthetic(tmp_path, images=40, seed=2, px=64)
    lines = table.read_text().splitlines()
    images = tmp_path / "images"
    shutil.copy(images / "synthetic_00001.jpg", images / "copy.jpg")
    with Image.open(images / "synthetic_00002.jpg") as image:
        image.resize((128, 128), Image.Resampling.BICUBIC).save(images / "larger.jpg", quality=95)
    extra = [
        "images/copy.jpg,globular,other-1,,north,contact,female,50",
        "images/larger.jpg,globular,other-2,,north,contact,male,50",
    ]
    splits = ["train"] * 40 + ["test", "test"]
    rows = [f"{row},{split}" for row, split in zip([*lines[1:], *extra], splits, strict=True)]
    table.write_text("\n".join([f"{lines[0]},split", *rows]) + "\n")
    ingest(table, str(tmp_path / "out"), IngestOptions(synthetic=True, licence="CC0"))
    facts = inspect_dataset(str(tmp_path / "out"), near_bits=4)
    exact, near = facts["duplicates"]["exact"], facts["duplicates"]["near"]
    assert (exact["groups"], exact["images"], exact["across_splits"], exact["across_patients"]) == (1, 2, 1, 1)
    assert near["across_splits"] == 2
    assert {name.split()[0] for name in exact["examples"][0]} == {"copy", "synthetic_00001"}
    assert facts["card"]["duplicates_across_splits"] == 2
    assert facts["sizes"] == {"64 x 64": 41, "128 x 128": 1}
    assert sum(int(size) * number for size, number in facts["bags"].items()) == 40
    json.dumps(facts)
    text = render_text(facts)
    assert "SYNTHETIC" in text and "licence: CC0" in text and "exact duplicates: 1 groups of 2 images" in text


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset at"):
        inspect_dataset(str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        inspect_dataset(str(tmp_path / "none"))
