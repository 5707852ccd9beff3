"""Leakage audit: patients and bags with images on two sides of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medssl.errors import DataError

_EXAMPLES = 5


@dataclass(frozen=True)
class Leakage:
    """Patients (or bags) with images in more than one split."""

    patients: dict[str, tuple[str, ...]]
    """Splits by patient id."""
    bags: dict[str, tuple[str, ...]]
    """Splits by bag id."""

    def __bool__(self) -> bool:
        return bool(self.patients or self.bags)

    def describe(self) -> str:
        """`3 patients with images in two splits (p1: train, test; p2: ...)`."""
        word, found = ("patient", self.patients) if self.patients else ("bag", self.bags)
        examples = "; ".join(f"{name}: {', '.join(splits)}" for name, splits in list(found.items())[:_EXAMPLES])
        more = "; ..." if len(found) > _EXAMPLES else ""
        return (
            f"{len(found)} {word}{'s' if len(found) != 1 else ''} with images in more than one split ({examples}{more})"
        )


def audit_leakage(patients: Sequence[str | None], bags: Sequence[str | None], splits: Sequence[str | None]) -> Leakage:
    """The patients and bags on two sides. Unknown ids (None) and rows without a split are nobody's."""
    return Leakage(_on_two_sides(patients, splits), _on_two_sides(bags, splits))


def check_bags(patients: Sequence[str | None], bags: Sequence[str | None]) -> None:
    """A bag is of one patient; DataError with examples when one has images of two."""
    owners: dict[str, set[str]] = {}
    for patient, bag in zip(patients, bags, strict=True):
        if bag is not None and patient is not None:
            owners.setdefault(bag, set()).add(patient)
    shared = sorted(bag for bag, names in owners.items() if len(names) > 1)
    if shared:
        examples = ", ".join(shared[:_EXAMPLES])
        raise DataError(
            f"{len(shared)} bags hold images of more than one patient ({examples}): "
            "bag ids must differ between patients"
        )


def _on_two_sides(names: Sequence[str | None], splits: Sequence[str | None]) -> dict[str, tuple[str, ...]]:
    sides: dict[str, set[str]] = {}
    for name, split in zip(names, splits, strict=True):
        if name is not None and split is not None:
            sides.setdefault(name, set()).add(split)
    return {name: tuple(sorted(found)) for name, found in sorted(sides.items()) if len(found) > 1}
