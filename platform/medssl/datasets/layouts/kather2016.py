"""Kather colorectal 2016: 5,000 tiles of eight tissues from ten slides, `Kather_texture_2016_image_tiles_5000/01_TUMOR/*.tif`.

The slide is in the file's name (`10009_CRC-Prim-HE-03_009.tif_Row_301_Col_151.tif`); all tiles of one stay together.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import replace

from medssl.datasets.layouts.tree import Layout, Record, Tree, by_folder

TISSUES = {
    "01_tumor": "tumor", "02_stroma": "stroma", "03_complex": "complex", "04_lympho": "lympho", "05_debris": "debris",
    "06_mucosa": "mucosa", "07_adipose": "adipose", "08_empty": "empty",
}  # fmt: skip
_SLIDE = re.compile(r"(CRC-Prim-HE-\d+)")


def _read(tree: Tree) -> list[Record]:
    records = []
    for record in by_folder(tree, TISSUES):
        found = _SLIDE.search(posixpath.basename(record.path))
        if found is None:
            tree.refuse(f"{record.path} does not name its slide (CRC-Prim-HE-03)")
        records.append(replace(record, patient=found[1]))
    return records


LAYOUT = Layout("Kather colorectal 2016", "the eight folders 01_TUMOR/ to 08_EMPTY/ of .tif tiles", _read, images=5_000)
