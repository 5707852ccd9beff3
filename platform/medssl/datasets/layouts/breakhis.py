"""BreaKHis at 400x: 1,820 breast tumour images of 82 patients, benign or malignant.

`histology_slides/breast/{benign,malignant}/SOB/SUBTYPE/SLIDE/400X/SOB_B_A-14-22549AB-400-001.png`: procedure, class, subtype,
year, slide, magnification, number. Year and slide name the patient; one of them (13412) was put under two subtypes.
"""

from __future__ import annotations

import posixpath
import re

from medssl.datasets.layouts.tree import Layout, Record, Tree

_NAME = re.compile(r"^[A-Z]+_([BM])_([A-Z]+)-(\d+)-([0-9A-Z]+)-(\d+)-(\d+)\.png$", re.IGNORECASE)
_SUBTYPES = {
    "A": "adenosis", "F": "fibroadenoma", "PT": "phyllodes_tumor", "TA": "tubular_adenoma", "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma", "MC": "mucinous_carcinoma", "PC": "papillary_carcinoma",
}  # fmt: skip


def _read(tree: Tree) -> list[Record]:
    records = []
    for path in tree.images:
        found = _NAME.match(posixpath.basename(path))
        if found is None or found[2].upper() not in _SUBTYPES:
            tree.refuse(f"{path} is not named as an image of BreaKHis (SOB_B_A-14-22549AB-400-001.png)")
        if found[5] != "400":
            continue
        label = {"B": "benign", "M": "malignant"}[found[1].upper()]
        further = {"subtype": _SUBTYPES[found[2].upper()]}
        records.append(Record(path, (label,), patient=f"{found[3]}-{found[4]}", further=further))
    for label in ("benign", "malignant"):
        if not any(record.labels[0] == label for record in records):
            tree.refuse(f"there are no {label} images at 400x")
    return records


_EXPECTED = "histology_slides/breast/ with benign/ and malignant/ down to 400X/SOB_B_A-14-22549AB-400-001.png"
LAYOUT = Layout("BreaKHis 400x", _EXPECTED, _read, images=1_820)
