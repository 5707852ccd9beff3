"""BUSI breast ultrasound: `benign/benign (1).png` with masks beside (`benign (1)_mask.png`), malignant, normal.

Masks are left out. There are no patient ids, though several images are of one patient.
"""

from __future__ import annotations

import re

from medssl.datasets.layouts.tree import Layout, Record, Tree, by_folder

_MASK = re.compile(r"_mask(_\d+)?\.png$")
_NAME = re.compile(r"/(benign|malignant|normal) \(\d+\)\.png$")


def _read(tree: Tree) -> list[Record]:
    images = [path for path in tree.images if not _MASK.search(path)]
    stray = next((path for path in images if not _NAME.search(f"/{path}")), None)
    if stray is not None:
        tree.refuse(f"{stray} is not named as an image of BUSI (benign (1).png)")
    return by_folder(tree, {name: name for name in ("benign", "malignant", "normal")}, images=images)


LAYOUT = Layout(
    "BUSI breast ultrasound", "benign/, malignant/ and normal/ with 'benign (1).png', 'benign (1)_mask.png'", _read, images=780
)
