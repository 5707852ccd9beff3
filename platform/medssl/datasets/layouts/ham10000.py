"""HAM10000: 10,015 dermoscopic images with lesion ids.

`HAM10000_metadata.csv` (lesion_id, image_id, dx, dx_type, age, sex, localization; later versions also dataset) and
`HAM10000_images_part_{1,2}/*.jpg`. There are no patient ids: a lesion stands for its patient.
"""

from __future__ import annotations

from medssl.datasets.layouts.tree import Layout, Record, Tree, number


def _read(tree: Tree) -> list[Record]:
    table = tree.find("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")
    frame = tree.table(table, ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"))
    images = [path for path in tree.images if "segmentation" not in path.lower()]
    records = []
    for path, row in zip(tree.matched(list(frame["image_id"]), table, images), frame.to_dict("records"), strict=True):
        further = {"age": number(row["age"]), "sex": row["sex"], "localization": row["localization"]}
        further["confirmed_by"] = row["dx_type"]
        further |= {"source": row["dataset"]} if "dataset" in row else {}
        records.append(Record(path, (row["dx"],), patient=row["lesion_id"], bag=row["lesion_id"], further=further))
    return records


LAYOUT = Layout("HAM10000", "HAM10000_metadata.csv and HAM10000_images_part_1/, HAM10000_images_part_2/", _read)
