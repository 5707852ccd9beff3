"""Oral histopathology: normal epithelium or oral squamous cell carcinoma (OSCC), a folder each.

As distributed in two sets of 100x and 400x ("100x Normal Oral Cavity Histopathological Images", "100x OSCC Histopathological
Images"; 1,224 images) or as `train/Normal`, `train/OSCC` and so on (5,192 images). There are no patient ids.

Paper 000 judges on 59 normal and 187 OSCC images (table 9), which are `val/` and `test/` of the second form together: layout
oral-paper000 makes both its test split.
"""

from __future__ import annotations

import re
from dataclasses import replace

from medssl.datasets.layouts.tree import Layout, Record, Tree

_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_CLASSES = (("oscc", re.compile(r"\boscc\b")), ("normal", re.compile(r"\bnormal\b")))
_MAGNIFICATION = re.compile(r"\b([14]00)x\b")
_SCALED_IMAGES, _SPLIT_IMAGES = 1_224, 5_192


def _read(tree: Tree) -> list[Record]:
    records = []
    for path in tree.images:
        folders = [folder.lower().replace("_", " ") for folder in path.split("/")[:-1]]
        named = {label for folder in folders for label, pattern in _CLASSES if pattern.search(folder)}
        if len(named) != 1:
            tree.refuse(f"{path} is in {'both' if named else 'neither'} of a folder of normal and of OSCC images")
        split = next((_SPLITS[folder] for folder in folders if folder in _SPLITS), None)
        scale = next((found[1] for folder in reversed(folders) if (found := _MAGNIFICATION.search(folder))), None)
        records.append(Record(path, (named.pop(),), split=split, further={"magnification": scale}))
    _require_both(tree, records)
    if any(record.further["magnification"] for record in records):
        tree.whole = _SCALED_IMAGES
    elif any(record.split for record in records):
        tree.whole = _SPLIT_IMAGES
    return records


def _require_both(tree: Tree, records: list[Record]) -> None:
    """Refuses a magnification or a split with one class alone, which would tell the classes apart."""
    groups: dict[str, set[str]] = {"": {record.labels[0] for record in records}}
    for record in records:
        scale, split = record.further["magnification"], record.split
        for name in (f" at {scale}x" if scale else "", f" in {split}/" if split else ""):
            groups.setdefault(name, set()).add(record.labels[0])
    for name, there in groups.items():
        absent = sorted({label for label, _ in _CLASSES} - there)
        if absent:
            tree.refuse(f"there are no images of class {absent[0]}{name}")


def _read_paper_000(tree: Tree) -> list[Record]:
    records = _read(tree)
    lacking = next((split for split in ("train", "val", "test") if split not in {record.split for record in records}), None)
    if lacking is not None:
        tree.refuse(f"there are no images in {lacking}/")
    return [replace(record, split=None if record.split == "train" else "test") for record in records]


_EXPECTED = "a folder of normal and one of OSCC images, as Normal/ and OSCC/, perhaps below train/, val/, test/"
LAYOUT = Layout("oral histopathology", _EXPECTED, _read)
PAPER_000_LAYOUT = Layout(
    "oral histopathology (split of paper 000)", "Normal/ and OSCC/ below train/, val/ and test/", _read_paper_000
)
