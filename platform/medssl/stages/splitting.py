"""The splits of what is ingested: given ones checked for patients on two sides, missing ones made."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from medssl.datasets.findings import finding_strata
from medssl.datasets.held_out import HeldOut, audit_held_out, held_out_rows, held_out_splits, remaining_shares
from medssl.datasets.leakage import Leakage, audit_leakage, check_bags
from medssl.datasets.splits import asked_shares, group_numbers, make_splits, missing_shares
from medssl.errors import DataError

if TYPE_CHECKING:
    from medssl.stages.ingest import IngestOptions


def complete_splits(rows: pa.Table, options: IngestOptions) -> tuple[pa.Table, Leakage, dict[str, float] | None]:
    """Rows with a split each, what leaks in those that are given or held out, and the shares of those that were made."""
    patients, bags, given = (rows[column].to_pylist() for column in ("patient_id", "bag_id", "split"))
    check_bags(patients, bags)
    held = held_out_rows(rows, options.held_out) if options.held_out is not None else None
    leakage = audit_leakage(patients, bags, given) if held is None else audit_held_out(patients, bags, held)
    if leakage and not options.allow_leakage:
        raise DataError(f"{leakage.describe()}: mend the split, or pass --allow-leakage to record it and go on")
    if None not in given:
        return rows, leakage, None
    ids, labels = rows["image_id"].to_pylist(), rows["labels"].to_pylist()
    names = [patient or bag or image for patient, bag, image in zip(patients, bags, ids, strict=True)]
    if options.findings:
        strata = finding_strata(rows.to_pandas(), options.findings)
    else:
        strata = ["\0".join(each) or None for each in labels]
    if held is not None:
        shares = remaining_shares(options.shares)
        splits = held_out_splits(patients, bags, names, strata, held, seed=options.seed, shares=options.shares)
        leakage = audit_leakage(patients, bags, splits)
    else:
        shares = asked_shares(options.shares, given) if options.shares else missing_shares(given)
        splits = make_splits(group_numbers(patients, bags), names, strata, given, seed=options.seed, shares=shares)
    return rows.set_column(rows.schema.get_field_index("split"), "split", pa.array(splits, pa.string())), leakage, shares


def held_out_facts(rows: pa.Table, held: HeldOut | None) -> dict[str, Any] | None:
    """What the card says of a held-out value."""
    return None if held is None else {**asdict(held), "without": rows[held.column].null_count}
