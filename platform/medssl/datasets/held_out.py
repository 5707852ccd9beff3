"""A test split of one value of a column, as in leave-one-site-out: its images are the test split, the others train and val."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from medssl.datasets.leakage import Leakage, audit_leakage
from medssl.datasets.rowset import RESERVED_COLUMNS
from medssl.datasets.splits import DEFAULT_SHARES, check_shares, group_numbers, make_splits
from medssl.errors import DataError, nearest

_LISTED = 30


@dataclass(frozen=True)
class HeldOut:
    """What is held out as the test split."""

    column: str
    """A further column (site, device, ...)."""
    value: str
    """As text: 3 for a column of numbers, true for one of booleans."""

    @classmethod
    def parse(cls, text: str) -> HeldOut:
        """From `column=value`; DataError for anything else."""
        column, equals, value = text.partition("=")
        if not (equals and column.strip() and value.strip()):
            raise DataError(f"cannot hold out {text!r}: write COLUMN=VALUE, such as site=HOSPITAL_A")
        return cls(column.strip(), value.strip())

    @property
    def text(self) -> str:
        """`column=value`."""
        return f"{self.column}={self.value}"


def held_out_rows(rows: pa.Table, held: HeldOut) -> list[bool]:
    """Whether each row has the value. A row without one has not.

    Raises:
        DataError: rows have splits already; there is no such further column, or none or all of its values are this one.
    """
    if rows["split"].null_count < len(rows):
        raise DataError(
            f"cannot hold out {held.text}: the images have splits already; take the split column out of the table, or leave out "
            "--held-out"
        )
    further = [name for name in rows.column_names if name not in RESERVED_COLUMNS]
    if held.column not in further:
        choice = nearest(held.column, further) if further else "there are none"
        raise DataError(f"cannot hold out {held.text}: there is no further column {held.column!r}; {choice}")
    try:
        values = [None if value is None else value.strip() for value in pc.cast(rows[held.column], pa.string()).to_pylist()]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        kind = rows.schema.field(held.column).type
        raise DataError(f"cannot hold out {held.text}: column {held.column!r} holds {kind}, which is no text") from None
    known = sorted({value for value in values if value})
    if held.value not in known:
        listed = ", ".join(known[:_LISTED]) + (f", ... ({len(known)} in all)" if len(known) > _LISTED else "")
        raise DataError(f"cannot hold out {held.text}: no image has that value; there are {listed or 'none'}")
    found = [value == held.value for value in values]
    if all(found):
        raise DataError(f"cannot hold out {held.text}: all images have that value, and none is left to train on")
    return found


def audit_held_out(patients: Sequence[str | None], bags: Sequence[str | None], held: Sequence[bool]) -> Leakage:
    """The patients and bags with images among the held-out ones and among the others."""
    return audit_leakage(patients, bags, ["test" if each else "the others" for each in held])


def held_out_splits(
    patients: Sequence[str | None], bags: Sequence[str | None], names: Sequence[str], labels: Sequence[str | None],
    held: Sequence[bool], *, seed: int, shares: Mapping[str, float] | None = None,
) -> list[str]:  # fmt: skip
    """test for what is held out; the others in train and val, patient-disjoint and stratified as `splits.make_splits` does.

    Args:
        names, labels: see `splits.make_splits`.
        shares: see :func:`remaining_shares`.
    """
    left = [row for row, each in enumerate(held) if not each]
    groups = group_numbers([patients[row] for row in left], [bags[row] for row in left])
    made = make_splits(
        groups, [names[row] for row in left], [labels[row] for row in left], [None] * len(left), seed=seed,
        shares=remaining_shares(shares),
    )  # fmt: skip
    splits = ["test"] * len(held)
    for row, split in zip(left, made, strict=True):
        splits[row] = split
    return splits


def remaining_shares(shares: Mapping[str, float] | None = None) -> dict[str, float]:
    """Shares of train and val among the images that are not held out: those of a common split, in the same proportion."""
    common = check_shares(shares or DEFAULT_SHARES)
    left = common["train"] + common["val"]
    if left <= 0:
        raise DataError("the shares of the splits leave nothing to train on: give train more than 0")
    return {"train": common["train"] / left, "val": common["val"] / left}
