"""The split that paper 000 made of ISIC 2019: its counts of each class, by a seed, and no lesion cut."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tests.datasets import miniatures

from medssl.datasets.layouts import read_layout
from medssl.datasets.layouts.isic2019 import PAPER_000, PAPER_000_VAL, draw_counts
from medssl.datasets.layouts.tree import Record
from medssl.errors import DataError


def isic2019_in_full() -> list[Record]:
    """As many images of each class as ISIC 2019 has, two in three in lesions of one to six images."""
    counts = {"mel": 4522, "nv": 12875, "bcc": 3323, "ak": 867, "bkl": 2624, "df": 239, "vasc": 253, "scc": 628}
    records, generator = [], np.random.default_rng(0)
    for label, count in counts.items():
        at, lesion = 0, 0
        while at < count:
            size = min(count - at, int(generator.integers(1, 7)))
            lesion += 1
            for n in range(size):
                bag = f"{label}{lesion}" if lesion % 3 else None
                records.append(Record(f"{label}-{at + n}.jpg", (label,), patient=bag, bag=bag))
            at += size
    return records


def test_paper_000s_split_has_its_counts_and_cuts_no_lesion() -> None:
    records = isic2019_in_full()
    splits = draw_counts(records, PAPER_000, PAPER_000_VAL, seed=1)
    assert isinstance(splits, list)
    found = Counter((split, record.labels[0]) for split, record in zip(splits, records, strict=True))
    for split, counts in PAPER_000.items():
        assert {label: found[split, label] for label in counts} == counts
    assert [sum(n for (s, _), n in found.items() if s == split) for split in ("train", "test", "val")] == [2554, 19423, 1280]
    sides: dict[str, set[str | None]] = {}
    for split, record in zip(splits, records, strict=True):
        if record.bag:
            sides.setdefault(record.bag, set()).add(split)
    assert max(len(split) for split in sides.values()) == 1
    assert draw_counts(records, PAPER_000, PAPER_000_VAL, seed=1) == splits
    assert draw_counts(records, PAPER_000, PAPER_000_VAL, seed=2) != splits


def test_counts_that_cannot_be_met() -> None:
    pair = [Record(f"{n}.jpg", ("a",), bag="one") for n in range(2)]
    assert "cannot be met without cutting a lesion" in str(draw_counts(pair, {"train": {"a": 1}, "test": {"a": 1}}, 0, 0))
    assert "1 images fewer" in str(draw_counts(pair, {"train": {"a": 3}, "test": {}}, 0, 0))


def test_a_lesion_of_two_classes_is_left_out() -> None:
    one = [Record("x.jpg", ("a",), bag="one"), Record("y.jpg", ("b",), bag="one")]
    torn = [*one, Record("z.jpg", ("a",)), Record("w.jpg", ("b",))]
    assert draw_counts(torn, {"train": {"a": 1}}, 1, 0) == [None, None, "train", "val"]
    assert "1 images fewer" in str(draw_counts(torn, {"train": {"a": 2}}, 0, 0))


def test_the_layout_of_the_whole_download(tmp_path: Path) -> None:
    """As many rows and files as ISIC 2019 has; a layout opens no image."""
    records = isic2019_in_full()
    images = tmp_path / "ISIC_2019_Training_Input"
    images.mkdir()
    names = [record.path.removesuffix(".jpg") for record in records]
    for record in records:
        (images / record.path).touch()
    classes = miniatures.ISIC2019
    labels = [[name, *miniatures.one_hot(classes, r.labels[0].upper())] for name, r in zip(names, records, strict=True)]
    miniatures.table(tmp_path / "ISIC_2019_Training_GroundTruth.csv", "image," + ",".join(classes), labels)
    facts = [[name, 55, "anterior torso", record.bag or "", "female"] for name, record in zip(names, records, strict=True)]
    table = tmp_path / "ISIC_2019_Training_Metadata.csv"
    miniatures.table(table, "image,age_approx,anatom_site_general,lesion_id,sex", facts)
    rows = read_layout(str(tmp_path), "isic2019-paper000").to_pandas()
    found = rows.groupby(["split", "label"]).size()
    assert all(found[split].reindex(counts).to_dict() == counts for split, counts in PAPER_000.items())
    assert len(rows) == 2554 + 19423 + 1280 and rows.groupby("bag_id")["split"].nunique().max() == 1


def test_paper_000s_layout_refuses_a_part_of_the_dataset(tmp_path: Path) -> None:
    miniatures.isic2019(tmp_path)
    with pytest.raises(DataError, match="images fewer than the paper's split asks for"):
        read_layout(str(tmp_path), "isic2019-paper000")
