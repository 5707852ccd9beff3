"""PatchCamelyon: 327,680 patches of lymph-node slides, 96 px, with tumour in their centre or not.

`camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`, unpacked, and `..._meta.csv` (coord_y, coord_x, tumor_patch,
center_tumor_patch, wsi). A slide (wsi) stands for its patient. h5py is an extra.
"""

from __future__ import annotations

from typing import Any

from medssl.datasets.layouts.tree import Layout, Record, Tree
from medssl.datasets.members import member_uri, need

_PARTS = {"train": "train", "valid": "val", "test": "test"}


def _read(tree: Tree) -> list[Record]:
    if tree.remote:
        tree.refuse("HDF5 files are read from a local folder")
    if tree.images:
        tree.refuse(f"{tree.images[0]} and {len(tree.images) - 1} more are images of something else")
    h5py = need("h5py", "HDF5 files", "medssl[h5]")
    records = []
    for part, split in _PARTS.items():
        stem = f"camelyonpatch_level_2_split_{part}"
        packed = tree.find_optional(f"{stem}_x.h5.gz")
        if packed is not None and tree.find_optional(f"{stem}_x.h5") is None:
            tree.refuse(f"{packed} is still packed: run gunzip on it")
        images, labels = tree.find(f"{stem}_x.h5"), tree.find(f"{stem}_y.h5")
        meta = tree.table(tree.find(f"{stem}_meta.csv"), ("wsi", "center_tumor_patch"))
        with _opened(tree, h5py, images, "x") as pixels, _opened(tree, h5py, labels, "y") as truth:
            shape, values = pixels["x"].shape, truth["y"][()].reshape(-1).tolist()
        if len(shape) != 4 or shape[3] != 3:
            tree.refuse(f"{images} holds an array of shape {shape}, (N, 96, 96, 3) is expected")
        if not shape[0] == len(values) == len(meta):
            tree.refuse(f"{stem}: {shape[0]:,} images, {len(values):,} labels, {len(meta):,} rows of meta.csv")
        for number, (value, slide) in enumerate(zip(values, meta["wsi"], strict=True)):
            label = "tumor" if value else "normal"
            name = f"{part}-{number:06d}"
            records.append(Record(member_uri(images, number), (label,), patient=slide, split=split, image_id=name))
    return records


def _opened(tree: Tree, h5py: Any, path: str, key: str) -> Any:
    try:
        file = h5py.File(tree.uri(path), "r")
    except OSError as error:
        tree.refuse(f"{path} is no readable HDF5 file ({str(error)[:80]})")
    return file if key in file else tree.refuse(f"{path} has no array {key}")


_EXPECTED = "camelyonpatch_level_2_split_train_x.h5, ..._y.h5 and ..._meta.csv, and the same of valid and test"
LAYOUT = Layout("PatchCamelyon", _EXPECTED, _read)
