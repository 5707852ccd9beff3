"""ISIC 2018, task 3: the HAM10000 images as training set, with the challenge's validation and test images where they are there.

`ISIC2018_Task3_{Training,Validation,Test}_Input/` and `..._GroundTruth/..._GroundTruth.csv` with one column per class; lesion
ids of the training images in `ISIC2018_Task3_Training_LesionGroupings.csv` (columns image, lesion_id, diagnosis_confirm_type).
"""

from __future__ import annotations

from medssl.datasets.layouts.challenge import challenge_parts, official_split, one_hot_labels
from medssl.datasets.layouts.tree import Layout, Record, Tree

CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_SPLITS = {"Training": "train", "Validation": "val", "Test": "test"}


def _read(tree: Tree) -> list[Record]:
    groupings = tree.table(tree.find("ISIC2018_Task3_Training_LesionGroupings.csv"), ("image", "lesion_id"))
    lesions = dict(zip(groupings["image"], groupings["lesion_id"], strict=True))
    confirmations = groupings.get("diagnosis_confirm_type", [None] * len(groupings))
    confirmed = dict(zip(groupings["image"], confirmations, strict=True))
    parts = challenge_parts(tree, "ISIC2018_Task3_{}_Input", _SPLITS)
    records = []
    for part, images in parts.items():
        truth = f"ISIC2018_Task3_{part}_GroundTruth.csv"
        frame = tree.table(tree.find(truth), ("image", *CLASSES))
        paths = tree.matched(list(frame["image"]), truth, images)
        labels = one_hot_labels(tree, frame, CLASSES, truth)
        for path, name, label in zip(paths, frame["image"], labels, strict=True):
            lesion = lesions.get(name)
            further = {"confirmed_by": confirmed.get(name) if lesion else None}
            split = official_split(part, parts, _SPLITS)
            records.append(Record(path, (label,), patient=lesion, bag=lesion, split=split, further=further))
    unknown = next((r.path for r in records if r.bag is None and "_Training_" in r.path), None)
    return records if unknown is None else tree.refuse(f"LesionGroupings.csv has no lesion of {unknown}")


LAYOUT = Layout(
    "ISIC 2018 task 3",
    "ISIC2018_Task3_Training_Input/, ISIC2018_Task3_Training_GroundTruth.csv, ISIC2018_Task3_Training_LesionGroupings.csv, and "
    "perhaps the same of Validation and Test",
    _read,
)
