"""A folder per class -> rows: `class/image.jpg`, or `train/class/image.jpg` with the names of the splits on top."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

import pyarrow as pa

from medssl.datasets.rowset import SPLIT_SYNONYMS, SPLITS, build_rows
from medssl.errors import DataError
from medssl.store import open_store

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff"})


def read_folder(source: str) -> pa.Table:
    """Rows of all images below a local folder or an `s3://` prefix.

    The label is the folder's name, deeper folders belong to it, images beside the class folders are unlabelled. When
    every folder on top is named like a split (train, val, test), classes are one level below. Hidden files are left
    out, and so is everything whose name does not end as an image's does.

    Raises:
        DataError: no such folder, or no images in it.
    """
    remote = source.startswith("s3://")
    paths = _remote_paths(source) if remote else _local_paths(Path(source).expanduser().absolute())
    if not paths:
        raise DataError(f"no images below {source}: files must end in {', '.join(sorted(SUFFIXES))}")
    root = source.rstrip("/") if remote else str(Path(source).expanduser().absolute())
    tops = {path.split("/")[0] for path in paths if "/" in path}
    has_splits = bool(tops) and all(SPLIT_SYNONYMS.get(top.lower(), top.lower()) in SPLITS for top in tops)
    splits, labels = [], []
    for path in paths:
        folders = path.split("/")[:-1]
        splits.append(folders.pop(0) if has_splits and folders else None)
        labels.append(folders[:1])
    return build_rows([f"{root}/{path}" for path in paths], paths, labels=labels, splits=splits if has_splits else None)


def _is_image(path: str) -> bool:
    hidden = any(part.startswith(".") for part in path.split("/"))
    return not hidden and posixpath.splitext(path)[1].lower() in SUFFIXES


def _local_paths(root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: check the path")
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        base = Path(folder).relative_to(root).as_posix()
        found += [name if base == "." else f"{base}/{name}" for name in names]
    return sorted(path for path in found if _is_image(path))


def _remote_paths(source: str) -> list[str]:
    return [entry.key for entry in open_store(source).list() if _is_image(entry.key)]
