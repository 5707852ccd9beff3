"""A held-out value is the test split and nothing else is; the others are split without it, by patient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.datasets.card import Provenance, build_card
from medssl.datasets.held_out import HeldOut, held_out_rows, held_out_splits, remaining_shares
from medssl.datasets.leakage import audit_leakage
from medssl.datasets.rowset import build_rows
from medssl.errors import DataError
from medssl.stages.ingest import IngestOptions
from medssl.stages.inspect import _splits_line
from medssl.stages.splitting import complete_splits, held_out_facts

SITES = ["A", "B", "C"]


def rows_of(values: Any, *, splits: list[str | None] | None = None, patients: list[str | None] | None = None) -> pa.Table:
    """A row for each value of a column `site`, labels in turn."""
    count = len(values)
    return build_rows(
        [f"/images/{n:03d}.png" for n in range(count)], [f"{n:03d}.png" for n in range(count)],
        patient_ids=patients or [f"p{n}" for n in range(count)], labels=[["ab"[n % 2]] for n in range(count)], splits=splits,
        further=pa.table({"site": values}),
    )  # fmt: skip


def completed(rows: pa.Table, held: str = "site=A", **options: Any) -> tuple[list[str], Any, Any]:
    made, leakage, shares = complete_splits(rows, IngestOptions(held_out=HeldOut.parse(held), **options))
    return made["split"].to_pylist(), leakage, shares


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), st.sampled_from(["x", "y", None])), min_size=4, max_size=60),
    seed=st.integers(0, 5),
)
def test_the_others_are_split_by_patient_and_never_test(rows: list[tuple[int, int, str | None]], seed: int) -> None:
    """Whatever the patients: also one of two sites, who is on two sides then, but not in both train and val."""
    patients, held = [f"p{patient}" for patient, _, _ in rows], [site == 0 for _, site, _ in rows]
    names, labels = [f"i{n}" for n in range(len(rows))], [label for _, _, label in rows]
    splits = held_out_splits(patients, [None] * len(rows), names, labels, held, seed=seed)
    assert [split == "test" for split in splits] == held
    left = [n for n, each in enumerate(held) if not each]
    assert not audit_leakage([patients[n] for n in left], [None] * len(left), [splits[n] for n in left])
    assert splits == held_out_splits(patients, [None] * len(rows), names, labels, held, seed=seed)


def test_the_others_keep_the_proportion_of_train_and_val_in_every_class() -> None:
    sites = np.random.default_rng(0).choice(SITES, size=700)
    splits, leakage, shares = completed(rows_of(sites.tolist()))
    assert shares == {"train": pytest.approx(6 / 7), "val": pytest.approx(1 / 7)} and not leakage
    assert [split == "test" for split in splits] == (sites == "A").tolist()
    for label in (0, 1):
        own = [split for n, split in enumerate(splits) if n % 2 == label and split != "test"]
        assert own.count("val") / len(own) == pytest.approx(1 / 7, abs=0.01)
    assert completed(rows_of(sites.tolist()), shares={"train": 0.4, "val": 0.4, "test": 0.2})[2] == {"train": 0.5, "val": 0.5}
    with pytest.raises(DataError, match="nothing to train on"):
        remaining_shares({"test": 1.0})


def test_images_without_a_value_are_among_the_others_and_counted() -> None:
    rows = rows_of(["A", None, "B", None, "A", "C"])
    splits, _, _ = completed(rows)
    assert [n for n, split in enumerate(splits) if split == "test"] == [0, 4]
    assert held_out_facts(rows, HeldOut("site", "A")) == {"column": "site", "value": "A", "without": 2}


def test_the_card_says_what_was_held_out() -> None:
    held = HeldOut("site", "A")
    made, leakage, shares = complete_splits(rows_of(["A", "B", "C", None] * 3), IngestOptions(held_out=held))
    index = made.append_column("sha256", pa.array([str(n) for n in range(len(made))]))
    record = Provenance("d", "", False, 0, shares, leakage, False, held_out=held_out_facts(made, held))
    card = build_card(index, [], "index", "0", record)
    assert card["held_out"] == {"column": "site", "value": "A", "without": 3} and card["splits"]["test"] == 3
    assert "splits: test is site=A; the others, 3 without site among them, made at ingest from seed 0" in _splits_line(card)
    assert "held_out" not in build_card(index, [], "index", "0", replace(record, held_out=None))


@pytest.mark.parametrize(
    ("values", "value", "expected"),
    [([1, 2, 1], "1", [0, 2]), ([1.0, 2.5, None], "2.5", [1]), ([1.0, 2.0], "2", [1]), ([True, False], "true", [0])],
)
def test_values_are_compared_as_text(values: list[Any], value: str, expected: list[int]) -> None:
    found = held_out_rows(rows_of(values), HeldOut("site", value))
    assert [n for n, each in enumerate(found) if each] == expected


def test_a_patient_of_two_sites_is_refused_or_recorded() -> None:
    rows = rows_of(["A", "B", "B", "C"] * 10, patients=["p", "p", None, "q"] + [None] * 36)
    with pytest.raises(DataError, match=r"^1 patient with .* more than one split \(p: test, the others\).*--allow-leakage"):
        completed(rows)
    splits, leakage, _ = completed(rows, allow_leakage=True)
    assert [split == "test" for split in splits] == [True, False, False, False] * 10
    assert leakage.patients == {"p": tuple(sorted({"test", splits[1]}))}
    assert not completed(rows, "site=C")[1]


@pytest.mark.parametrize(
    ("rows", "held", "message"),
    [
        (rows_of(SITES), "sight=A", r"no further column 'sight'; did you mean 'site'"),
        (rows_of(SITES), "patient_id=p0", r"no further column 'patient_id'; choices: site"),
        (rows_of(SITES), "site=HOSPITAL_A", r"no image has that value; there are A, B, C$"),
        (rows_of([f"{n:03d}" for n in range(40)]), "site=x", r"029, \.\.\. \(40 in all\)$"),
        (rows_of(["A", "A"]), "site=A", r"none is left to train on"),
        (rows_of(SITES, splits=["train", None, None]), "site=A", r"have splits already; take the split column out"),
        (rows_of([["A"], ["B"]]), "site=A", r"holds list<"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_out_is_one_line(rows: pa.Table, held: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        completed(rows, held)
    assert str(refused.value).startswith(f"cannot hold out {held}: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["site", "=A", "site=", " = "])
def test_what_to_hold_out_is_column_and_value(text: str) -> None:
    with pytest.raises(DataError, match="write COLUMN=VALUE"):
        HeldOut.parse(text)


def test_the_value_may_hold_an_equals_sign() -> None:
    assert HeldOut.parse("site = a=b") == HeldOut("site", "a=b")
