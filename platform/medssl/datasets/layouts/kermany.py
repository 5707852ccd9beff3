"""Kermany chest X-rays of children: normal or pneumonia, `chest_xray/{train,test,val}/{NORMAL,PNEUMONIA}/*.jpeg`; as
first published without val, whose 16 images are in train there.

The patient is in the file's name: `person1_bacteria_2.jpeg`, `BACTERIA-1008087-0001.jpeg`, `IM-0115-0001.jpeg`,
`NORMAL2-IM-0927-0001.jpeg`. The numbers of person... occur in several of the official folders, which hardly have a validation
set either (16 images): they are kept as the column official_split, and a split by patients is made.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import replace

from medssl.datasets.layouts.tree import Layout, Record, Tree, by_folder

_PERSON = re.compile(r"^(person\d+)_(bacteria|virus)_\d+$", re.IGNORECASE)
_NUMBERED = re.compile(r"^((?:NORMAL2?-)?(?:IM-)?\d+|(?:BACTERIA|VIRUS)-\d+)-\d+(?:-\d+)?$", re.IGNORECASE)


def _read(tree: Tree) -> list[Record]:
    classes = {"normal": "normal", "pneumonia": "pneumonia"}
    records = []
    cause: str | None
    for record in by_folder(tree, classes, splits={"train": "train", "val": "val", "test": "test"}, optional=("val",)):
        stem = posixpath.splitext(posixpath.basename(record.path))[0]
        person, numbered = _PERSON.match(stem), _NUMBERED.match(stem)
        if person is not None:
            patient, cause = person[1], str(person[2]).lower()
        elif numbered is not None:
            patient = numbered[1]
            cause = next((c for c in ("bacteria", "virus") if patient.lower().startswith(c)), None)
        else:
            tree.refuse(f"{record.path} does not name its patient (person1_bacteria_2, IM-0115-0001)")
        further = {"official_split": record.split, "cause": cause}
        records.append(replace(record, patient=patient, split=None, further=further))
    return records


LAYOUT = Layout(
    "Kermany chest X-rays", "NORMAL/ and PNEUMONIA/ with .jpeg images, below train/, test/ and perhaps val/", _read, images=5_856
)
