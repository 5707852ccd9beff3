"""COVID-19 image data collection: `metadata.csv` and `images/`.

Chest X-rays are kept, CT images and volumes are not. The label is covid19 or other, and none where the finding is unknown or
"todo"; the finding itself (`Pneumonia/Viral/COVID-19`) stays a column. For a recipe's `findings` there are the columns covid19,
pneumonia, viral and bacterial: 1, 0, -1 where the cause is not told (a plain `Pneumonia`, unknown), nothing where it is "todo".
Notes and links are left out: they tell of patients.
"""

from __future__ import annotations

from medssl.datasets.layouts.tree import Layout, Record, Tree, number

_TREE = {
    "covid19": ("Pneumonia", "Viral", "COVID-19"), "pneumonia": ("Pneumonia",), "viral": ("Pneumonia", "Viral"),
    "bacterial": ("Pneumonia", "Bacterial"),
}  # fmt: skip
_ROOTS = ("Pneumonia", "Tuberculosis", "No Finding")
FINDINGS = tuple(_TREE)
_BESIDE = {"annotations", "docs", "scripts", "volumes"}
"""Folders of the collection with masks, pictures of its pages, and no X-rays."""


def _read(tree: Tree) -> list[Record]:
    columns = ("patientid", "sex", "age", "finding", "view", "modality", "folder", "filename")
    frame = tree.table(tree.find("metadata.csv"), columns)
    named = set(frame["filename"])
    films = [path for path in tree.images if "images" in path.split("/")[:-1]]
    own = [path for path in tree.images if not _BESIDE & set(path.split("/")[:-1])]
    strangers = [path for path in own if path.rpartition("/")[2] not in named]
    if strangers:
        tree.refuse(f"{len(strangers):,} images are in no row of metadata.csv (the first: {strangers[0]})")
    frame = frame[(frame["modality"] == "X-ray") & (frame["folder"] == "images")]
    if frame.empty:
        tree.refuse("metadata.csv names no X-rays in images")
    paths = {path.rpartition("/")[2]: path for path in films}
    absent = [name for name in frame["filename"] if name not in paths]
    if absent:
        tree.refuse(f"{len(absent):,} of {len(frame):,} X-rays named in metadata.csv are missing (the first: {absent[0]})")
    records = []
    for row in frame.to_dict("records"):
        finding = row["finding"]
        unknown = finding is None or finding.lower() in ("todo", "unknown")
        label = () if unknown else ("covid19",) if "COVID-19" in finding else ("other",)
        further = {"sex": row["sex"], "age": number(row["age"]), "view": row["view"], "finding": finding}
        further |= _findings(finding)
        patient = f"p{row['patientid']}"
        records.append(Record(paths[row["filename"]], label, patient=patient, bag=patient, further=further))
    return records


def _findings(finding: str | None) -> dict[str, int | None]:
    """1 on the way to the finding in the collection's tree, -1 for what lies beyond it, 0 elsewhere."""
    if finding is None or finding.lower() == "todo":
        return dict.fromkeys(FINDINGS)
    if finding.lower() == "unknown":
        return dict.fromkeys(FINDINGS, -1)
    path = tuple(finding.split("/"))
    if path[0] not in _ROOTS:  # earlier releases give the last name alone
        return dict.fromkeys(FINDINGS) | {"covid19": int("COVID-19" in finding)}
    return {name: 1 if path[: len(node)] == node else -1 if node[: len(path)] == path else 0 for name, node in _TREE.items()}


LAYOUT = Layout("COVID-19 image data collection", "metadata.csv and images/", _read, FINDINGS)
