"""A table of images (CSV, TSV or Parquet) -> rows. Identifiers stay text; further columns keep their types."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from medssl.datasets.rowset import RESERVED_COLUMNS, build_rows, resolve_uri
from medssl.errors import DataError, MissingKey, nearest
from medssl.store import open_store

_NUMBER_NULLS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]


@dataclass(frozen=True)
class TableColumns:
    """Names of the table's columns by role. None takes the usual name where the table has it (`USUAL_NAMES`)."""

    image: str | None = None
    """Path or URI of the image, relative to the root."""
    image_id: str | None = None
    label: str | None = None
    patient: str | None = None
    bag: str | None = None
    """Lesion or case: all images of one finding."""
    split: str | None = None
    site: str | None = None
    device: str | None = None
    sex: str | None = None
    age: str | None = None


USUAL_NAMES = {
    "image": ("image", "image_path", "path", "file", "filename"),
    "image_id": ("image_id",),
    "label": ("label",),
    "patient": ("patient_id", "patient"),
    "bag": ("bag_id", "bag"),
    "split": ("split",),
    "site": ("site",),
    "device": ("device",),
    "sex": ("sex",),
    "age": ("age",),
}
_TEXT_ROLES = ("image", "image_id", "label", "patient", "bag", "split")
_KEPT_ROLES = ("site", "device", "sex", "age")


def read_table(
    source: str,
    columns: TableColumns | None = None,
    *,
    root: str | None = None,
    label_separator: str | None = None,
    drop: Sequence[str] = (),
) -> pa.Table:
    """Rows (see `rowset.build_rows`) of a table at a path or `s3://` URI.

    Args:
        source: `.csv`, `.tsv` or `.parquet`.
        columns: names by role.
        root: folder or `s3://` URI that relative image paths start from and that none may leave; the table's own folder when
            None.
        label_separator: splits a label into several ("a|b" with "|"); None takes a label as one.
        drop: columns to leave out.

    Raises:
        DataError: the table cannot be read, or a named column is not in it.
    """
    folder = source.rpartition("/")[0] or "." if "://" in source else str(Path(source).expanduser().absolute().parent)
    data = _read_bytes(source)
    kind = posixpath.splitext(source)[1].lower()
    if kind in (".parquet", ".pq"):
        table = _read_parquet(data, source)
    elif kind in (".csv", ".tsv", ".txt"):
        table = _read_csv(data, source, kind, columns or TableColumns())
    else:
        raise DataError(f"{source} is neither a folder nor a table: give a .csv, .tsv or .parquet file")
    return _rows(table, source, columns or TableColumns(), root or folder, label_separator, drop)


def _rows(
    table: pa.Table, source: str, columns: TableColumns, root: str, label_separator: str | None, drop: Sequence[str]
) -> pa.Table:
    names = _named_columns(table.column_names, columns, source)
    text = {role: _text(table[name], name) for role, name in names.items() if role in _TEXT_ROLES}
    paths = text["image"]
    missing = [row for row, path in enumerate(paths) if path is None]
    if missing:
        raise DataError(
            f"{len(missing)} rows of {source} have no image path (the first: row {missing[0] + 1}): remove them"
        )
    relative = [str(path) for path in paths]
    return build_rows(
        [resolve_uri(path, root) for path in relative],
        relative,
        image_ids=text.get("image_id"),
        patient_ids=text.get("patient"),
        bag_ids=text.get("bag"),
        labels=_labels(text.get("label") or [None] * len(relative), label_separator),
        splits=text.get("split"),
        further=_further(table, names, drop, source),
    )


def _labels(values: Sequence[str | None], separator: str | None) -> list[list[str]]:
    if separator is None:
        return [[] if value is None else [value] for value in values]
    return [sorted({part.strip() for part in (value or "").split(separator)} - {""}) for value in values]


def _named_columns(present: Sequence[str], columns: TableColumns, source: str) -> dict[str, str]:
    """Column name by role, for the roles that the table has."""
    twice = sorted({name for name in present if list(present).count(name) > 1})
    if twice:
        raise DataError(f"{source} has two columns named {twice[0]!r}: rename one")
    names: dict[str, str] = {}
    for field in fields(columns):
        wanted = getattr(columns, field.name)
        if wanted is not None and wanted not in present:
            raise DataError(f"{source} has no column {wanted!r} ({field.name}): {nearest(wanted, present)}")
        usual = next((name for name in USUAL_NAMES[field.name] if name in present), None)
        if wanted or usual:
            names[field.name] = wanted or str(usual)
    if "image" not in names:
        raise DataError(
            f"{source} has no column named image: name the one with the image paths; {nearest('image', present)}"
        )
    return names


def _further(table: pa.Table, names: dict[str, str], drop: Sequence[str], source: str) -> pa.Table:
    """Site, device, sex and age under those names, then all other columns, with their types."""
    absent = [name for name in drop if name not in table.column_names]
    if absent:
        raise DataError(f"{source} has no column {absent[0]!r} to drop: {nearest(absent[0], table.column_names)}")
    kept = {role: names[role] for role in _KEPT_ROLES if role in names and names[role] not in drop}
    taken = {name for role, name in names.items() if role in _TEXT_ROLES} | set(kept.values()) | set(drop)
    others = [name for name in table.column_names if name not in taken]
    clash = [name for name in others if name in RESERVED_COLUMNS or name in kept]
    if clash:
        raise DataError(f"{source}: column name {clash[0]!r} is taken by medssl itself: rename the column or drop it")
    columns = {name: table[source_name] for name, source_name in [*kept.items(), *((name, name) for name in others)]}
    return pa.table({name: _plain(values) for name, values in columns.items()}) if columns else None


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Empty text is null; dictionary-encoded columns are unpacked, so that shards do not differ by their
    dictionaries.
    """
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    if pa.types.is_null(values.type):
        return pc.cast(values, pa.string())
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = pc.cast(values, pa.string())
        return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
    return values


def _text(values: pa.ChunkedArray, name: str) -> list[str | None]:
    """A column as text: trimmed, empty is None; whole numbers that pandas has made 3.0 read 3."""
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    if pa.types.is_floating(values.type):
        whole = pc.all(pc.equal(values, pc.floor(values)), skip_nulls=True).as_py()
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        if whole is not False:
            values = pc.cast(values, pa.int64())
    try:
        values = pc.utf8_trim_whitespace(pc.cast(values, pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"column {name!r} holds {values.type}, which is no text: name another column") from None
    return [value or None for value in values.to_pylist()]


def _read_bytes(source: str) -> bytes:
    try:
        if "://" in source:
            parent, _, name = source.rpartition("/")
            return open_store(parent).read(name)
        return Path(source).expanduser().read_bytes()
    except (FileNotFoundError, MissingKey):
        raise DataError(f"there is no table or folder at {source}: check the path") from None
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from None


def _read_parquet(data: bytes, source: str) -> pa.Table:
    try:
        return pa.parquet.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{source} is not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _read_csv(data: bytes, source: str, kind: str, columns: TableColumns) -> pa.Table:
    if not data.strip():
        raise DataError(f"{source} is empty: its first line must name the columns")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{source} is not UTF-8 text (line {line}): save it as UTF-8") from None
    head = data.lstrip(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    delimiter = "\t" if kind == ".tsv" else max(",;\t", key=lambda mark: head.count(mark.encode()))
    named = {getattr(columns, role) for role in _TEXT_ROLES} - {None}
    usual = {name for role in _TEXT_ROLES for name in USUAL_NAMES[role]}
    try:
        return pa.csv.read_csv(
            io.BytesIO(data),
            # one block: types are inferred from all rows, not from the first megabyte
            read_options=pa.csv.ReadOptions(block_size=max(len(data) + 1, 1 << 20), use_threads=False),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(named | usual, pa.string()),
                null_values=_NUMBER_NULLS,
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0][:160]
        raise DataError(f"{source} is not a readable table ({reason}): check quotes and columns") from None
