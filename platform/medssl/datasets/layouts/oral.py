"""Oral histopathology: normal epithelium or oral squamous cell carcinoma (OSCC), a folder each.

As distributed in two sets of 100x and 400x ("100x Normal Oral Cavity Histopathological Images", "100x OSCC Histopathological
Images") or as `train/Normal`, `train/OSCC` and so on. There are no patient ids.
"""

from __future__ import annotations

import re

from medssl.datasets.layouts.tree import Layout, Record, Tree

_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_CLASSES = (("oscc", re.compile(r"\boscc\b")), ("normal", re.compile(r"\bnormal\b")))
_MAGNIFICATION = re.compile(r"\b([14]00)x\b")


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
    absent = {label for label, _ in _CLASSES} - {record.labels[0] for record in records}
    return records if not absent else tree.refuse(f"there are no images of class {min(absent)}")


_EXPECTED = "a folder of normal and one of OSCC images, as Normal/ and OSCC/, perhaps below train/, val/, test/"
LAYOUT = Layout("oral histopathology", _EXPECTED, _read)
