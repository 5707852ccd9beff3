"""A folder of DICOM files, of any depth and whatever their names: each frame an image, the images of a study a bag.

File names and folders are not kept, since they often hold names; an image is called by a hash of its instance's UID. Patient ids
are kept where the files say that identity was removed (PatientIdentityRemoved); elsewhere ingest asks for `--pseudonymise`.
"""

from __future__ import annotations

import posixpath
from pathlib import Path

from medssl.datasets.dicom import is_dicom, read_facts
from medssl.datasets.layouts.tree import Layout, Record, Tree
from medssl.datasets.members import member_uri, need
from medssl.errors import DataError


def _read(tree: Tree) -> list[Record]:
    if tree.images:
        tree.refuse(f"{tree.images[0]} and {len(tree.images) - 1} more are no DICOM files: ingest them by themselves")
    need("pydicom", "DICOM files", "medssl[dicom]")  # said before any file is called damaged
    records = []
    removed: list[bool] = []
    for path in tree.files:
        named = posixpath.splitext(path)[1].lower() in (".dcm", ".dicom")
        if posixpath.basename(path).upper() == "DICOMDIR":
            continue
        if not is_dicom(_head(tree, path)):
            if named:
                tree.refuse(f"{path} is no DICOM file, or a damaged one")
            continue
        try:
            facts = read_facts(tree.read(path))
        except DataError as error:
            tree.refuse(f"{path} {error}")
        removed.append(facts.identity_removed)
        for frame in range(facts.frames):
            name = facts.image_id if facts.frames == 1 else f"{facts.image_id}-{frame:04d}"
            records.append(
                Record(member_uri(path, frame), patient=facts.patient, bag=facts.study, further=facts.further, image_id=name)
            )
    tree.identified = not all(removed)
    return records


def _head(tree: Tree, path: str) -> bytes:
    if tree.remote:
        return tree.read(path)[:132]
    with Path(tree.root, path).open("rb") as file:
        return file.read(132)


LAYOUT = Layout("DICOM", "DICOM files (with DICM at byte 128), and no images of other formats", _read)
