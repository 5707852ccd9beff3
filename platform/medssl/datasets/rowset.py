"""The rows a dataset is made from: where each image is and what is known of it, before any image has been read."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from medssl.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_SYNONYMS = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}
KEY_COLUMNS = ("image_id", "patient_id", "bag_id", "label", "labels", "split")
"""Columns that every set of rows has beside `uri`; all but image_id may hold nulls. `labels` is a list of strings."""
MEASURED_COLUMNS = ("image", "width", "height", "sha256", "phash")
"""Columns that ingest adds from the image itself."""
RESERVED_COLUMNS = frozenset({"uri", *KEY_COLUMNS, *MEASURED_COLUMNS})

_STRING_LIST = pa.list_(pa.string())


def build_rows(
    uris: Sequence[str],
    relative_paths: Sequence[str],
    *,
    image_ids: Sequence[str | None] | None = None,
    patient_ids: Sequence[str | None] | None = None,
    bag_ids: Sequence[str | None] | None = None,
    labels: Sequence[Sequence[str]],
    splits: Sequence[str | None] | None = None,
    further: pa.Table | None = None,
) -> pa.Table:
    """The rows, sorted by image id: `uri`, KEY_COLUMNS, then the further columns with their types.

    Without `image_ids` an image's id is its file's stem where all stems differ, else its relative path, for the whole
    set.

    Raises:
        DataError: no rows, an image id that occurs twice or is empty, or an unknown split.
    """
    if not len(uris):
        raise DataError("there are no images: the table has no rows, or the folder no image files")
    ids = list(image_ids) if image_ids is not None else default_image_ids(relative_paths)
    count = len(uris)
    columns = {
        "uri": pa.array(uris, pa.string()),
        "image_id": pa.array(ids, pa.string()),
        "patient_id": pa.array(patient_ids or [None] * count, pa.string()),
        "bag_id": pa.array(bag_ids or [None] * count, pa.string()),
        "label": pa.array([each[0] if len(each) == 1 else None for each in labels], pa.string()),
        "labels": pa.array([list(each) for each in labels], _STRING_LIST),
        "split": pa.array(_canonical_splits(splits) if splits else [None] * count, pa.string()),
    }
    table = pa.table(columns)
    if further is not None:
        for field, values in zip(further.schema, further.columns, strict=True):
            table = table.append_column(pa.field(field.name, field.type), values)
    _check_ids(table)
    return sorted_by_id(table)


def sorted_by_id(rows: pa.Table) -> pa.Table:
    """The rows in order of image id, by UTF-8 bytes, which is Python's order of strings."""
    return rows.take(pc.sort_indices(pc.cast(rows["image_id"], pa.binary()))).combine_chunks()


def default_image_ids(relative_paths: Sequence[str]) -> list[str]:
    """File stems where all differ, else the relative paths."""
    stems = [posixpath.splitext(posixpath.basename(path))[0] for path in relative_paths]
    if len(set(stems)) == len(stems) and all(stems):
        return stems
    return [posixpath.normpath(path) for path in relative_paths]


def resolve_uri(path: str, root: str) -> str:
    """URI or absolute path of an image: of a relative path below `root`, of an absolute one or a URI itself.

    Raises:
        DataError: it is not below `root`: a table from elsewhere must not reach other files by the way.
    """
    root, path = (unquote(urlsplit(text).path) if text.startswith("file://") else text for text in (root, path))
    base = root.rstrip("/") if root.startswith("s3://") else str(Path(root).expanduser().absolute())
    relative = not path.startswith(("s3://", "/"))
    full = f"{base.rstrip('/')}/{path}" if relative else path
    if not _below(full, base):
        raise DataError(
            f"image path {path!r} leads out of {root}: write paths below it, or give --root a folder or s3:// URI that holds all"
        )
    if not full.startswith("s3://"):  # what climbs is written out: behind a link the system would climb elsewhere
        return posixpath.normpath(full)
    bucket, _, key = full.removeprefix("s3://").partition("/")
    return f"s3://{bucket}/{posixpath.normpath(key)}" if relative else full


def _below(full: str, base: str) -> bool:
    """Whether a location is below another by its name. (Links that lie there are followed: the folder's owner made them.)"""
    if full.startswith("s3://") != base.startswith("s3://"):
        return False
    inner, outer = (posixpath.normpath("/" + place.removeprefix("s3://").lstrip("/")) for place in (full, base))
    return inner.startswith(outer.rstrip("/") + "/")


def _canonical_splits(splits: Sequence[str | None]) -> list[str | None]:
    names = {split: SPLIT_SYNONYMS.get(split.lower(), split.lower()) for split in set(splits) if split is not None}
    unknown = sorted(given for given, name in names.items() if name not in SPLITS)
    if unknown:
        raise DataError(
            f"unknown split {unknown[0]!r} (and {len(unknown) - 1} more): write train, val, test, or leave it empty"
            if len(unknown) > 1
            else f"unknown split {unknown[0]!r}: write train, val, test, or leave it empty"
        )
    return [None if split is None else names[split] for split in splits]


def _check_ids(table: pa.Table) -> None:
    ids = table["image_id"]
    if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
        raise DataError("some rows have no image id: fill the column or leave it out")
    counts = pc.value_counts(ids.combine_chunks())
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    if twice:
        examples = ", ".join(sorted(twice)[:3])
        raise DataError(f"{len(twice)} image ids occur more than once ({examples}): each image may have one row only")
