"""The dataset card: what is in a dataset, how its splits came about, and the digests that later stages build on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from medssl import __version__
from medssl.datasets.leakage import Leakage
from medssl.datasets.rowset import SPLITS
from medssl.datasets.shards import ShardEntry
from medssl.datasets.splits import group_numbers

CARD = "card.json"
DIGESTED = ("image_id", "sha256", "patient_id", "bag_id", "split")
"""Columns that the digest of the images covers."""
FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """What the card records beside the images: how they came to be here, and under which terms."""

    name: str
    licence: str
    synthetic: bool
    split_seed: int | None
    """None when every split was given."""
    split_shares: dict[str, float] | None
    leakage: Leakage
    leakage_allowed: bool
    pseudonymised_columns: list[str] = field(default_factory=list)
    rejected: int = 0
    rejected_list: str | None = None
    held_out: dict[str, Any] | None = None
    """Where one value of a column is the test split: column, value, and how many images are without a value."""
    layout: dict[str, Any] | None = None
    """The public dataset's layout that it was read by: name, and the seed where it draws a split."""


def build_card(
    index: pa.Table, shards: Sequence[ShardEntry], index_path: str, index_sha256: str, provenance: Provenance
) -> dict[str, Any]:
    """The card as plain JSON values.

    Counts are of images; a multi-label image counts in each of its classes. `groups` are patients, each unknown patient
    counting as one group together with the other images of its bag.
    """
    columns = {name: index[name].to_pylist() for name in (*DIGESTED, "labels")}
    classes = sorted({label for labels in columns["labels"] for label in labels})
    present = [split for split in SPLITS if split in set(columns["split"])]
    groups = group_numbers(columns["patient_id"], columns["bag_id"])
    leakage = provenance.leakage
    return {
        "format": FORMAT,
        "medssl": __version__,
        "name": provenance.name,
        "licence": provenance.licence,
        "synthetic": provenance.synthetic,
        "images": len(index),
        "classes": classes,
        "multi_label": any(len(labels) > 1 for labels in columns["labels"]),
        "splits": {split: columns["split"].count(split) for split in present},
        "counts": {split: _class_counts(columns, split, classes) for split in present},
        "unlabelled": {split: _count(columns, split, lambda labels: not labels) for split in present},
        "groups": {split: len(_of_split(groups, columns, split)) for split in present},
        "patients": len(set(columns["patient_id"]) - {None}),
        "unknown_patients": columns["patient_id"].count(None),
        "bags": len(set(columns["bag_id"]) - {None}),
        "duplicates_across_splits": _duplicates_across_splits(columns),
        "split_seed": provenance.split_seed,
        "split_shares": provenance.split_shares,
        **({"held_out": provenance.held_out} if provenance.held_out is not None else {}),
        **({"layout": provenance.layout} if provenance.layout is not None else {}),
        "leakage": {
            "allowed": provenance.leakage_allowed, "patients": len(leakage.patients), "bags": len(leakage.bags),
        },
        "pseudonymised": bool(provenance.pseudonymised_columns),
        "pseudonymised_columns": provenance.pseudonymised_columns,
        "rejected": provenance.rejected,
        "rejected_list": provenance.rejected_list,
        "columns": {field.name: str(field.type) for field in index.schema},
        "digests": {
            "images": _digest(zip(*(columns[name] for name in DIGESTED), strict=True)),
            "labels": _digest(zip(columns["image_id"], columns["labels"], strict=True)),
        },
        "index": {"path": index_path, "rows": len(index), "sha256": index_sha256},
        "shards": [asdict(shard) for shard in shards],
    }  # fmt: skip


def _count(columns: dict[str, list[Any]], split: str, wanted: Any) -> int:
    return sum(s == split and wanted(labels) for s, labels in zip(columns["split"], columns["labels"], strict=True))


def _of_split(groups: Sequence[int], columns: dict[str, list[Any]], split: str) -> set[int]:
    return {group for group, side in zip(groups, columns["split"], strict=True) if side == split}


def _class_counts(columns: dict[str, list[Any]], split: str, classes: Sequence[str]) -> dict[str, int]:
    counts = dict.fromkeys(classes, 0)
    for row_split, labels in zip(columns["split"], columns["labels"], strict=True):
        if row_split == split:
            for label in labels:
                counts[label] += 1
    return counts


def _duplicates_across_splits(columns: dict[str, list[Any]]) -> int:
    """Images whose very bytes are in another split as well."""
    sides: dict[str, set[str]] = {}
    for sha256, split in zip(columns["sha256"], columns["split"], strict=True):
        sides.setdefault(sha256, set()).add(split)
    return sum(len(sides[sha256]) > 1 for sha256 in columns["sha256"])


def _digest(rows: Iterable[Any]) -> str:
    """SHA-256 over rows that come sorted by image id, one JSON array a line."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(list(row), separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
