"""The files below a folder or an `s3://` prefix as a layout sees them, and what a layout makes of them."""

from __future__ import annotations

import io
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pyarrow as pa

from medssl.datasets.rowset import build_rows
from medssl.errors import DataError, MissingKey
from medssl.store import open_store

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff"})
NULLS = ("", "NA", "N/A", "nan", "NaN", "None", "null")


@dataclass(frozen=True)
class Record:
    """One image of a public dataset."""

    path: str
    """Relative to the folder."""
    labels: tuple[str, ...] = ()
    patient: str | None = None
    bag: str | None = None
    split: str | None = None
    further: Mapping[str, Any] = field(default_factory=dict)
    """Further columns: text, numbers or None."""
    image_id: str | None = None
    """None takes the file's name, or its path where names are not unique."""


@dataclass(frozen=True)
class Layout:
    """How one public dataset lies on a disk after its archives are unpacked."""

    title: str
    """The dataset's name for people."""
    expected: str
    """What has to be there, in a line."""
    read: Callable[[Tree], list[Record]]
    """The images; refuses through the tree."""
    findings: tuple[str, ...] = ()
    """Columns that are findings: missing splits are stratified by them, unless the user names others."""
    images: int | None = None
    """Images of the dataset as it is published, where no table in it says so; a folder with fewer is not whole, one with more
    is something else too."""


class Tree:
    """All files below a folder, and refusals that say what was expected and what was found."""

    def __init__(self, source: str, layout: Layout, name: str, seed: int = 0) -> None:
        """Lists the folder. `seed` is for layouts that draw.

        Raises:
            DataError: there is no such folder.
        """
        self.layout, self.name, self.seed = layout, name, seed
        self.whole = layout.images
        """Images of the dataset, or the fewest of its releases: a layout of several forms says here which it has found."""
        self.identified = False
        """Whether patient ids may be real ones, which have to be replaced."""
        self.remote = source.startswith("s3://")
        self.root = source.rstrip("/") if self.remote else str(Path(source).expanduser().absolute())
        found = [entry.key for entry in open_store(self.root).list()] if self.remote else self._walk()
        self.files = sorted(path for path in found if not any(part.startswith((".", "__MACOSX")) for part in path.split("/")))

    def _walk(self) -> list[str]:
        if not Path(self.root).is_dir():
            raise DataError(f"there is no folder {self.root}: layout {self.name} reads an unpacked {self.layout.title}")
        found = []
        for folder, _, names in os.walk(self.root, followlinks=True):
            base = Path(folder).relative_to(self.root).as_posix()
            found += [name if base == "." else f"{base}/{name}" for name in names]
        return found

    # -- reading -----------------------------------------------------------------------------------------------

    @cached_property
    def images(self) -> list[str]:
        """Relative paths of all image files, without what `copies` finds."""
        found = [path for path in self.files if posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES]
        twice = copies(found)
        return [path for path in found if path not in twice]

    def uri(self, path: str) -> str:
        """URI or absolute path of a file."""
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes:
        """A file's bytes."""
        try:
            return open_store(self.root).read(path) if self.remote else Path(self.root, path).read_bytes()
        except (OSError, MissingKey) as error:
            raise DataError(f"cannot read {self.uri(path)}: {error}") from None

    def find(self, *names: str) -> str:
        """Path of the one file with any of these names, at any depth; refuses when there is none or several."""
        path = self.find_optional(*names)
        return path if path is not None else self.refuse(f"there is no {' or '.join(names)}")

    def find_optional(self, *names: str) -> str | None:
        """The same, None when there is none."""
        wanted = {name.lower() for name in names}
        found = [path for path in self.files if posixpath.basename(path).lower() in wanted]
        if len(found) > 1:
            self.refuse(f"there are {len(found)} of {names[0]} ({', '.join(found[:3])}): give the folder of one of them")
        return found[0] if found else None

    def table(self, path: str, columns: Iterable[str]) -> pd.DataFrame:
        """A CSV file, all columns as text and empty fields as None; refuses when one of `columns` is missing."""
        try:
            frame = pd.read_csv(io.BytesIO(self.read(path)), dtype=str, keep_default_na=False, encoding="utf-8-sig", sep=None,
                                engine="python")  # fmt: skip
        except (ValueError, pd.errors.ParserError) as error:
            self.refuse(f"{path} is no readable table ({str(error).splitlines()[0][:100]})")
        missing = [column for column in columns if column not in frame.columns]
        if missing:
            self.refuse(f"{path} has no column '{missing[0]}', it has {', '.join(map(str, frame.columns[:8]))}")
        if frame.empty:
            self.refuse(f"{path} has no rows")
        cleaned: pd.DataFrame = frame.apply(lambda column: column.str.strip()).astype(object)
        return cleaned.where(~cleaned.isin(NULLS), None)

    # -- refusing ----------------------------------------------------------------------------------------------

    def refuse(self, reason: str) -> NoReturn:
        """Raises DataError: what was expected, what is wrong, what was found."""
        tops = Counter(path.split("/")[0] + ("/" if "/" in path else "") for path in self.files)
        shown = ", ".join(f"{top} ({count:,} files)" if top.endswith("/") else top for top, count in list(tops.items())[:5])
        more = f" and {len(tops) - 5} more" if len(tops) > 5 else ""
        raise DataError(
            f"{self.root} is no whole {self.layout.title} ({self.name}): {reason}; expected: {self.layout.expected}; found: "
            f"{shown or 'no files'}{more}; nothing was published"
        )

    def matched(self, names: Sequence[str], where: str, images: Sequence[str] | None = None) -> list[str]:
        """Paths of the images that a table names (file names, with or without suffix), in that order.

        Refuses when one of them is not there, when a name stands twice, and when an image of `images` (all by default) is
        named by no row: a part of the download is missing, or another dataset lies in the folder.
        """
        by_name: dict[str, str] = {}
        for path in self.images if images is None else images:
            for key in (posixpath.basename(path), posixpath.splitext(posixpath.basename(path))[0]):
                if by_name.setdefault(key, path) != path:
                    self.refuse(f"two images are named {key} ({by_name[key]}, {path})")
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            self.refuse(f"{where} has two rows of {twice}")
        absent = [name for name in names if name not in by_name]
        if absent:
            self.refuse(f"{len(absent):,} of {len(names):,} images named in {where} are missing (the first: {absent[0]})")
        paths = [by_name[name] for name in names]
        strangers = sorted(set(by_name.values()) - set(paths))
        if strangers:
            self.refuse(f"{len(strangers):,} images are in no row of {where} (the first: {strangers[0]})")
        return paths

    def rows(self, *, partial: bool = False) -> pa.Table:
        """The layout's images as rows (see `rowset.build_rows`); `partial` takes fewer than the dataset has.

        Raises:
            DataError: the folder is another one, or not whole.
        """
        records = self.layout.read(self)
        if not records:
            self.refuse("there are no images")
        published = self.layout.images
        if published is not None and len(records) > published:
            self.refuse(f"{len(records):,} images are there, it has {published:,}")
        if self.whole is not None and len(records) < self.whole and not partial:
            self.refuse(f"{len(records):,} images of {self.whole:,} are there (--partial takes a part of {self.layout.title})")
        columns = list(dict.fromkeys(name for record in records for name in record.further))
        further = {name: [record.further.get(name) for record in records] for name in columns}
        return build_rows(
            [self.uri(record.path) for record in records],
            [record.path for record in records],
            image_ids=[r.image_id for r in records] if all(r.image_id for r in records) else None,
            patient_ids=[record.patient for record in records],
            bag_ids=[record.bag for record in records],
            labels=[record.labels for record in records],
            splits=[record.split for record in records],
            further=pa.table({name: _typed(values) for name, values in further.items()}) if further else None,
        )


def copies(paths: Sequence[str]) -> set[str]:
    """Those that lie in a copy of the folder around them: everything below `a/b/` is below `a/` too, under the same names.

    Some archives hold the whole dataset twice, once in a folder of its own name.
    """
    there, below = set(paths), dict[tuple[str, str], list[str]]()
    for path in paths:
        parts = path.split("/")
        for depth in range(len(parts) - 1):
            below.setdefault(("/".join(parts[:depth]), parts[depth]), []).append(path)
    found = set[str]()
    for (around, name), inside in below.items():
        base = f"{around}/" if around else ""
        within = [path[len(base) + len(name) + 1 :] for path in inside]
        # A folder of nothing but images may be a class with the file names of another.
        if any("/" in path for path in within) and all(base + path in there for path in within):
            found.update(inside)
    return found


def _typed(values: Sequence[Any]) -> pa.Array:
    """Numbers where every value is one, else text."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        whole = all(float(value).is_integer() for value in present)
        return pa.array(values, pa.int64() if whole and not any(isinstance(v, float) for v in present) else pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def number(text: str | None) -> float | None:
    """A number of a table; None for what is none."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def by_folder(
    tree: Tree,
    classes: Mapping[str, str],
    *,
    splits: Mapping[str, str] | None = None,
    images: Sequence[str] | None = None,
    optional: Collection[str] = (),
    exact: bool = True,
) -> list[Record]:
    """One record per image whose folder is one of `classes` (folder name in lower case -> label), with the split of the nearest
    folder above that `splits` names.

    Refuses an image in no such folder, and (`exact`) a class or, where some images have a split, a split without images that is
    not `optional`.
    """
    records = []
    for path in tree.images if images is None else images:
        folders = [part.lower() for part in path.split("/")[:-1]]
        named = [folder for folder in folders if folder in classes]
        if not named:
            tree.refuse(f"{path} is in no folder of a class")
        split = next((splits[folder] for folder in reversed(folders) if splits and folder in splits), None)
        records.append(Record(path, (classes[named[-1]],), split=split))
    there = {record.labels[0] for record in records}
    absent = sorted(set(classes.values()) - there)
    if records and exact and absent:
        tree.refuse(f"there are no images of class {absent[0]}")
    parts = {record.split for record in records}
    lacking = next((folder for folder, split in (splits or {}).items() if split not in {*parts, *optional}), None)
    if exact and parts != {None} and lacking is not None:
        tree.refuse(f"there are no images in {lacking}/")
    return records
