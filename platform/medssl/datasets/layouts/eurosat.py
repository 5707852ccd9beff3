"""EuroSAT (RGB): 27,000 satellite tiles of ten kinds of land use, a folder each (`2750/AnnualCrop/AnnualCrop_1.jpg`)."""

from __future__ import annotations

from medssl.datasets.layouts.tree import Layout, Record, Tree, by_folder

KINDS = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential", "River",
    "SeaLake",
)  # fmt: skip


def _read(tree: Tree) -> list[Record]:
    return by_folder(tree, {kind.lower(): kind for kind in KINDS})


LAYOUT = Layout("EuroSAT", "the ten folders AnnualCrop/ to SeaLake/ of .jpg tiles", _read, images=27_000)
