"""Brain MRI in folders: `Training/`, `Testing/` with glioma, meningioma, notumor, pituitary, or the older set of `yes/`, `no/`.

The official test folder is the test split; there are no patient ids.
"""

from __future__ import annotations

from dataclasses import replace

from medssl.datasets.layouts.tree import Layout, Record, Tree, by_folder

_FOUR = {name: name for name in ("glioma", "meningioma", "notumor", "pituitary")}
_FOUR |= {"glioma_tumor": "glioma", "meningioma_tumor": "meningioma", "no_tumor": "notumor", "pituitary_tumor": "pituitary"}
_TWO = {"yes": "tumor", "no": "notumor"}


def _read(tree: Tree) -> list[Record]:
    folders = {part.lower() for path in tree.images for part in path.split("/")[:-1]}
    if not folders & _FOUR.keys():
        # the older set comes with a second copy of itself in a folder of its name
        twice = "brain_tumor_dataset"
        images = [path for path in tree.images if twice not in path.split("/")[:-1]] or tree.images
        return by_folder(tree, _TWO, images=images)
    records = by_folder(tree, _FOUR, splits={"training": "train", "testing": "test"})
    return [replace(record, split="test" if record.split == "test" else None) for record in records]


_EXPECTED = "Training/ and Testing/ with glioma/, meningioma/, notumor/ and pituitary/, or the folders yes/ and no/"
LAYOUT = Layout("brain MRI", _EXPECTED, _read)
