"""Public datasets as people download them: one file per dataset, and a literal table of them.

A layout refuses a folder that is another one, not whole, or mixed with something else, in one line that says what was expected
and what was found.
"""

from __future__ import annotations

import pyarrow as pa

from medssl.datasets.layouts import (
    brain_mri,
    breakhis,
    busi,
    chexpert,
    covid_cxr,
    dermnet,
    dicom,
    eurosat,
    ham10000,
    isic2017,
    isic2018,
    isic2019,
    kather2016,
    kermany,
    nih14,
    oral,
    padufes20,
    patchcamelyon,
)  # fmt: skip
from medssl.datasets.layouts.tree import Layout, Tree
from medssl.errors import DataError, nearest

LAYOUTS: dict[str, Layout] = {
    "isic2018": isic2018.LAYOUT,
    "isic2019": isic2019.LAYOUT,
    "isic2019-paper000": isic2019.PAPER_000_LAYOUT,
    "ham10000": ham10000.LAYOUT,
    "isic2017": isic2017.LAYOUT,
    "padufes20": padufes20.LAYOUT,
    "dermnet": dermnet.LAYOUT,
    "oral": oral.LAYOUT,
    "oral-paper000": oral.PAPER_000_LAYOUT,
    "breakhis400": breakhis.LAYOUT,
    "kather2016": kather2016.LAYOUT,
    "patchcamelyon": patchcamelyon.LAYOUT,
    "kermany": kermany.LAYOUT,
    "chexpert": chexpert.LAYOUT,
    "nih14": nih14.LAYOUT,
    "covid-cxr": covid_cxr.LAYOUT,
    "busi": busi.LAYOUT,
    "brain-mri": brain_mri.LAYOUT,
    "eurosat": eurosat.LAYOUT,
    "dicom": dicom.LAYOUT,
}
"""Layouts by the name that `medssl ingest --layout` takes."""


def findings_of_layout(name: str) -> tuple[str, ...]:
    """Columns of a layout that are findings; none of one that there is not, which reading it refuses."""
    return LAYOUTS[name].findings if name in LAYOUTS else ()


def read_layout(source: str, name: str, *, seed: int = 0, pseudonyms: bool = False, partial: bool = False) -> pa.Table:
    """Rows (see `rowset.build_rows`) of a public dataset's unpacked folder, or of the same below an `s3://` prefix.

    Args:
        source: the folder.
        name: one of `LAYOUTS`.
        seed: of layouts that draw a split.
        pseudonyms: whether patient ids will be replaced.
        partial: takes fewer images than the dataset has as it is published.

    Raises:
        DataError: no such layout, or the folder is not a whole one of it.
    """
    if name not in LAYOUTS:
        raise DataError(f"there is no layout '{name}': {nearest(name, LAYOUTS)}")
    tree = Tree(source, LAYOUTS[name], name, seed)
    rows = tree.rows(partial=partial)
    if tree.identified and not pseudonyms:
        raise DataError(
            f"some files of {tree.root} do not say that the patient's identity was removed (PatientIdentityRemoved): give "
            "--pseudonymise, which replaces patient and study ids by keyed hashes"
        )
    return rows
