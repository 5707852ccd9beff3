"""DermNet: 19,559 images of 23 groups of skin diseases, `train/GROUP/*.jpg` and `test/GROUP/*.jpg`.

Many images show one patient and there is no id of any, so the folders' split is kept as the column official_split and not
taken: most users pretrain on it (paper 000).
"""

from __future__ import annotations

from dataclasses import replace

from medssl.datasets.layouts.tree import Layout, Record, Tree, by_folder

GROUPS = (
    "Acne and Rosacea Photos", "Actinic Keratosis Basal Cell Carcinoma and other Malignant Lesions", "Atopic Dermatitis Photos",
    "Bullous Disease Photos", "Cellulitis Impetigo and other Bacterial Infections", "Eczema Photos",
    "Exanthems and Drug Eruptions", "Hair Loss Photos Alopecia and other Hair Diseases", "Herpes HPV and other STDs Photos",
    "Light Diseases and Disorders of Pigmentation", "Lupus and other Connective Tissue diseases",
    "Melanoma Skin Cancer Nevi and Moles", "Nail Fungus and other Nail Disease",
    "Poison Ivy Photos and other Contact Dermatitis", "Psoriasis pictures Lichen Planus and related diseases",
    "Scabies Lyme Disease and other Infestations and Bites", "Seborrheic Keratoses and other Benign Tumors", "Systemic Disease",
    "Tinea Ringworm Candidiasis and other Fungal Infections", "Urticaria Hives", "Vascular Tumors", "Vasculitis Photos",
    "Warts Molluscum and other Viral Infections",
)  # fmt: skip


def _read(tree: Tree) -> list[Record]:
    records = by_folder(tree, {group.lower(): group for group in GROUPS}, splits={"train": "train", "test": "test"})
    stray = next((record.path for record in records if record.split is None), None)
    if stray is not None:
        tree.refuse(f"{stray} is in neither train/ nor test/")
    return [replace(record, split=None, further={"official_split": record.split}) for record in records]


LAYOUT = Layout("DermNet", "train/ and test/ with the 23 folders of diseases, as train/Eczema Photos/", _read, images=19_559)
