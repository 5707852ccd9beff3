"""ISIC 2017, part 3: 2,750 dermoscopic images of melanomas, seborrhoeic keratoses and nevi, in official splits.

Classes have the names of HAM10000 and the later challenges (mel, bkl, nv), so that a classifier of these is judged on it without
further ado; bkl holds seborrhoeic keratoses alone. The column `diagnosis` has ISIC 2017's own.

`ISIC-2017_{Training,Validation,Test_v2}_Data/*.jpg` (with superpixel masks beside, which are left out), each with
`ISIC-2017_..._Part3_GroundTruth.csv` (image_id, melanoma, seborrheic_keratosis) and `ISIC-2017_..._Data_metadata.csv`.
"""

from __future__ import annotations

from medssl.datasets.layouts.challenge import challenge_parts, official_split
from medssl.datasets.layouts.tree import Layout, Record, Tree, number

_PARTS = {"Training": "train", "Validation": "val", "Test_v2": "test"}
_LABELS: dict[tuple[float | None, float | None], tuple[str, str]] = {
    (1, 0): ("mel", "melanoma"), (0, 1): ("bkl", "seborrheic_keratosis"), (0, 0): ("nv", "nevus"),
}  # fmt: skip


def _read(tree: Tree) -> list[Record]:
    parts = challenge_parts(tree, "ISIC-2017_{}_Data", _PARTS)
    records = []
    for part, shown in parts.items():
        truth = f"ISIC-2017_{part}_Part3_GroundTruth.csv"
        frame = tree.table(tree.find(truth), ("image_id", "melanoma", "seborrheic_keratosis"))
        metadata = tree.find_optional(f"ISIC-2017_{part}_Data_metadata.csv")
        known = tree.table(metadata, ("image_id", "age_approximate", "sex")) if metadata else None
        facts = {} if known is None else known.set_index("image_id").to_dict("index")
        images = [path for path in shown if not path.endswith("_superpixels.png")]
        for path, row in zip(tree.matched(list(frame["image_id"]), truth, images), frame.to_dict("records"), strict=True):
            label = _LABELS.get((number(row["melanoma"]), number(row["seborrheic_keratosis"])))
            if label is None:
                tree.refuse(f"{truth} says {row['melanoma']}, {row['seborrheic_keratosis']} of {row['image_id']}")
            fact = facts.get(row["image_id"], {})
            further = {"age": number(fact.get("age_approximate")), "sex": fact.get("sex"), "diagnosis": label[1]}
            records.append(Record(path, label[:1], split=official_split(part, parts, _PARTS), further=further))
    return records


LAYOUT = Layout(
    "ISIC 2017 part 3",
    "ISIC-2017_Training_Data/ and ISIC-2017_Training_Part3_GroundTruth.csv, and perhaps the same of Validation and Test_v2",
    _read,
)
