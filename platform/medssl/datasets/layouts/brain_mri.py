"""Brain MRI in folders: `Training/`, `Testing/` with glioma, meningioma, notumor, pituitary, or the older set of `yes/`, `no/`.

The official test folder is the test split; there are no patient ids. Releases with four classes differ in their number of images,
3,264 at least; the older set has 253.
"""

from __future__ import annotations

from dataclasses import replace

from medssl.datasets.layouts.tree import Layout, Record, Tree, by_folder

_FOUR = {name: name for name in ("glioma", "meningioma", "notumor", "pituitary")}
_FOUR |= {"glioma_tumor": "glioma", "meningioma_tumor": "meningioma", "no_tumor": "notumor", "pituitary_tumor": "pituitary"}
_TWO = {"yes": "tumor", "no": "notumor"}
_FOUR_IMAGES, _TWO_IMAGES = 3_264, 253


def _read(tree: Tree) -> list[Record]:
    folders = {part.lower() for path in tree.images for part in path.split("/")[:-1]}
    if not folders & _FOUR.keys():
        tree.whole = _TWO_IMAGES
        return by_folder(tree, _TWO)
    records = by_folder(tree, _FOUR, splits={"training": "train", "testing": "test"})
    for split in {record.split for record in records}:
        there = {record.labels[0] for record in records if record.split == split}
        absent = sorted(set(_FOUR.values()) - there)
        if absent:
            tree.refuse(f"there are no images of class {absent[0]} in {'testing' if split == 'test' else 'training'}/")
    tree.whole = _FOUR_IMAGES
    return [replace(record, split="test" if record.split == "test" else None) for record in records]


_EXPECTED = "Training/ and Testing/ with glioma/, meningioma/, notumor/ and pituitary/, or the folders yes/ and no/"
LAYOUT = Layout("brain MRI", _EXPECTED, _read)
