"""NIH ChestX-ray14: 112,120 X-rays of 30,805 patients with 14 findings.

`Data_Entry_2017.csv` (or `..._v2020.csv`: Image Index, Finding Labels separated by |, Follow-up #, Patient ID, Patient Age,
Patient Gender, View Position), `images_001/images/*.png` and so on, `test_list.txt` and `train_val_list.txt`. Every finding is a
column of 1 and 0, for a recipe's `findings`. The official test list, by patients, is the test split.
"""

from __future__ import annotations

from medssl.datasets.layouts.tree import Layout, Record, Tree, number

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation",
    "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
_NONE = "No Finding"


def _read(tree: Tree) -> list[Record]:
    table = tree.find("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
    columns = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position")
    frame = tree.table(table, columns)
    test = set(tree.read(tree.find("test_list.txt")).decode().split())
    training = set(tree.read(tree.find("train_val_list.txt")).decode().split())
    records = []
    for path, row in zip(tree.matched(list(frame["Image Index"]), table), frame.to_dict("records"), strict=True):
        name, there = row["Image Index"], set(str(row["Finding Labels"]).split("|"))
        unknown = sorted(there - {*FINDINGS, _NONE})
        if unknown:
            tree.refuse(f"{table} has finding {unknown[0]} of {name}, which is none of the 14")
        if (name in test) == (name in training):
            tree.refuse(f"{name} is in {'both' if name in test else 'neither'} of test_list.txt and train_val_list.txt")
        further = {"age": number(row["Patient Age"]), "sex": row["Patient Gender"], "view": row["View Position"]}
        further |= {finding: int(finding in there) for finding in FINDINGS}
        split = "test" if name in test else None
        records.append(Record(path, tuple(sorted(there)), patient=row["Patient ID"], split=split, further=further))
    return records


LAYOUT = Layout(
    "NIH ChestX-ray14",
    "Data_Entry_2017.csv, test_list.txt, train_val_list.txt and the images, as in images_001/images/00000001_000.png",
    _read,
    FINDINGS,
)
