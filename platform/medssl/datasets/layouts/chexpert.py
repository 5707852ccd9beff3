"""CheXpert: 224,316 chest X-rays of 65,240 patients with 14 findings (1, 0, -1 for uncertain, nothing for not mentioned).

`train.csv` and `valid.csv` (Path, Sex, Age, Frontal/Lateral, AP/PA, the findings) and `train/patient00001/study1/*.jpg`. The
findings stay columns, for a recipe's `findings`. The radiologists' `valid` becomes the test split, the images of a study a bag;
train and val are drawn from `train` by patients.
"""

from __future__ import annotations

from medssl.datasets.layouts.tree import Layout, Record, Tree, number

FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip


def _read(tree: Tree) -> list[Record]:
    by_end = {"/".join(path.split("/")[-4:]): path for path in tree.images}
    records, seen = list[Record](), set[str]()
    for table, split in (("train.csv", None), ("valid.csv", "test")):
        frame = tree.table(tree.find(table), ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS))
        for row in frame.to_dict("records"):
            end = "/".join(str(row["Path"]).split("/")[-4:])
            if end not in by_end:
                tree.refuse(f"{row['Path']}, named in {table}, is missing")
            seen.add(end)
            patient, study = end.split("/")[1:3]
            further = {"sex": row["Sex"], "age": number(row["Age"]), "view": row["Frontal/Lateral"], "projection": row["AP/PA"]}
            further |= {name: number(row[name]) for name in FINDINGS}
            records.append(Record(by_end[end], patient=patient, bag=f"{patient}/{study}", split=split, further=further))
    strangers = sorted(set(by_end) - seen)
    if strangers:
        tree.refuse(f"{len(strangers):,} images are in no row of train.csv and valid.csv (the first: {by_end[strangers[0]]})")
    return records


LAYOUT = Layout("CheXpert", "train.csv, valid.csv and train/patient00001/study1/view1_frontal.jpg and so on", _read, FINDINGS)
