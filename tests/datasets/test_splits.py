"""Splits: disjoint by patient and bag, stratified, stable; whatever the input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.datasets.leakage import audit_leakage, check_bags
from medssl.datasets.rowset import build_rows
from medssl.datasets.splits import group_numbers, make_splits, missing_shares, read_shares
from medssl.errors import DataError
from medssl.stages.ingest import IngestOptions
from medssl.stages.splitting import complete_splits

SPLIT = st.sampled_from(["train", "val", "test"])
ROW = st.tuples(
    st.one_of(st.none(), st.integers(0, 12).map(lambda n: f"p{n}")),
    st.one_of(st.none(), st.integers(0, 12).map(lambda n: f"b{n}")),
    st.one_of(st.none(), st.sampled_from("xyz")),
)


def split_rows(rows: list[tuple[str | None, str | None, str | None]], seed: int = 0, **options: object) -> list[str]:
    patients, bags, labels = (list(column) for column in zip(*rows, strict=True))
    names = [patient or bag or f"image{row}" for row, (patient, bag, _) in enumerate(rows)]
    groups = group_numbers(patients, bags)
    return make_splits(groups, names, labels, [None] * len(rows), seed=seed, **options)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=60), seed=st.integers(0, 5))
def test_no_patient_and_no_bag_is_on_two_sides(
    rows: list[tuple[str | None, str | None, str | None]], seed: int
) -> None:
    splits = split_rows(rows, seed)
    assert set(splits) <= {"train", "val", "test"}
    assert not audit_leakage([row[0] for row in rows], [row[1] for row in rows], splits)
    assert splits == split_rows(rows, seed)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(ROW, st.one_of(st.none(), SPLIT)), min_size=1, max_size=40))
def test_given_splits_stay_and_their_groups_follow(
    rows: list[tuple[tuple[str | None, str | None, str | None], str | None]],
) -> None:
    patients, bags = [row[0] for row, _ in rows], [row[1] for row, _ in rows]
    given_splits = [split for _, split in rows]
    groups = group_numbers(patients, bags)
    splits = make_splits(groups, [str(n) for n in groups], [row[2] for row, _ in rows], given_splits, seed=0)
    for group in set(groups):
        members = [row for row, number in enumerate(groups) if number == group]
        known = {given_splits[row] for row in members} - {None}
        for row in members:
            assert splits[row] == given_splits[row] if given_splits[row] else splits[row] in (known or set(splits))


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(3, 60), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_every_class_is_spread_as_asked(counts: list[int], seed: int) -> None:
    """With one image per patient each class is within one image of its shares, and in every split from 3 images on."""
    rows: list[tuple[str | None, str | None, str | None]] = [
        (f"{label}-{number}", None, str(label)) for label, count in enumerate(counts) for number in range(count)
    ]
    splits = split_rows(rows, seed)
    for label, count in enumerate(counts):
        own = [split for split, row in zip(splits, rows, strict=True) if row[2] == str(label)]
        for split, share in {"train": 0.6, "val": 0.1, "test": 0.3}.items():
            assert own.count(split) >= 1
            assert abs(own.count(split) - share * count) <= 1.5


def test_large_groups_stay_near_the_shares() -> None:
    rng = np.random.default_rng(0)
    rows: list[tuple[str | None, str | None, str | None]] = []
    for patient in range(400):
        label = str(rng.choice(["a", "b"], p=[0.9, 0.1]))
        rows += [(f"p{patient}", None, label)] * int(rng.integers(1, 7))
    splits = np.array(split_rows(rows))
    for label in "ab":
        own = splits[np.array([row[2] == label for row in rows])]
        assert abs((own == "train").mean() - 0.6) < 0.03
        assert abs((own == "val").mean() - 0.1) < 0.03


def test_one_row_more_moves_few_others() -> None:
    rows: list[tuple[str | None, str | None, str | None]] = [
        (f"p{number}", None, "ab"[number % 2]) for number in range(600)
    ]
    before = split_rows(rows)
    after = split_rows([*rows, ("new", None, "a")])[:-1]
    assert sum(one != other for one, other in zip(before, after, strict=True)) <= 2
    mended = [*rows]
    mended[17] = ("p17", None, "a")
    assert sum(one != other for one, other in zip(before, split_rows(mended), strict=True)) <= 5
    assert before != split_rows(rows, seed=1)


def test_groups_without_a_label_go_to_train() -> None:
    assert split_rows([(f"p{n}", None, None) for n in range(20)]) == ["train"] * 20


def test_shares_are_checked_and_used() -> None:
    rows: list[tuple[str | None, str | None, str | None]] = [(f"p{n}", None, "a") for n in range(100)]
    splits = split_rows(rows, shares={"train": 0.8, "test": 0.2})
    assert (splits.count("train"), splits.count("val"), splits.count("test")) == (80, 0, 20)
    with pytest.raises(DataError, match="sum to 1"):
        split_rows(rows, shares={"train": 0.8, "test": 0.3})
    with pytest.raises(DataError, match="'dev'"):
        split_rows(rows, shares={"train": 0.8, "dev": 0.2})


def test_groups_connect_through_patients_and_bags() -> None:
    assert group_numbers(["p", "p", None, None, None], [None, "b", "b", None, None]) == [0, 0, 0, 1, 2]


def test_audit_counts_and_names_the_patients() -> None:
    leakage = audit_leakage(["p1", "p1", "p2", None, None], [None] * 5, ["train", "test", "val", "train", "test"])
    assert leakage.patients == {"p1": ("test", "train")}
    assert "1 patient with images in more than one split (p1: test, train)" in leakage.describe()


def test_a_bag_of_two_patients_is_refused() -> None:
    check_bags(["p1", None, "p1"], ["b", "b", "b"])
    with pytest.raises(DataError, match=r"more than one patient \(b\)"):
        check_bags(["p1", "p2"], ["b", "b"])


def test_shares_are_read_and_what_is_given_is_whole() -> None:
    assert read_shares("0.7,0.1,0.2") == {"train": 0.7, "val": 0.1, "test": 0.2}
    for wrong in ("0.7,0.1", "0.7,0.1,0.3", "a,b,c", "1.2,-0.1,-0.1", ""):
        with pytest.raises(DataError, match="shares"):
            read_shares(wrong)
    sevenths = {"train": 6 / 7, "val": 1 / 7, "test": 0}
    assert missing_shares([None, "test"]) == pytest.approx(sevenths)
    assert missing_shares([None, "val"]) == pytest.approx({"train": 2 / 3, "val": 0, "test": 1 / 3})
    assert missing_shares([None, "val", "test"]) == {"train": 1, "val": 0, "test": 0}
    assert missing_shares([None, "train"]) == missing_shares([None]) == {"train": 0.6, "val": 0.1, "test": 0.3}


def completed(given_splits: list[str | None], shares: str) -> list[str]:
    names = [f"{n:03d}.png" for n in range(len(given_splits))]
    rows = build_rows(names, names, patient_ids=names, labels=[["a"]] * len(names), splits=given_splits)
    made, _, _ = complete_splits(rows, IngestOptions(shares=read_shares(shares)))
    return list(made["split"].to_pylist())


@pytest.mark.parametrize(
    ("whole", "shares", "instead"),
    [
        (["test"], "0.7,0.1,0.2", "0.875,0.125,0"),
        (["val"], "0.6,0.2,0.2", "0.75,0,0.25"),
        (["val", "test"], "0.7,0.1,0.2", "1,0,0"),
        (["test"], "0,0,1", "1,0,0"),
    ],
)
def test_shares_add_nothing_to_a_test_or_validation_split_that_is_given(whole: list[str], shares: str, instead: str) -> None:
    given_splits: list[str | None] = [split for split in whole for _ in range(5)] + [None] * 50
    with pytest.raises(DataError) as caught:
        completed(given_splits, shares)
    said = str(caught.value)
    assert f"split '{whole[0]}', which is given (5 images)" in said and said.endswith(f"give 0 for it, as in {instead}")
    assert "\n" not in said
    splits = completed(given_splits, instead)
    assert all(splits.count(split) == 5 for split in whole) and splits[:5] == [whole[0]] * 5


def test_shares_may_add_to_a_given_training_split() -> None:
    assert sorted(set(completed(["train"] * 5 + [None] * 50, "0.7,0.1,0.2")[5:])) == ["test", "train", "val"]


def test_few_groups_of_many_classes_leave_no_split_empty() -> None:
    """Ten slides with the tiles of eight tissues, as in Kather's set: most tissues lead in one slide, which would go to train."""
    groups = [slide for slide in range(10) for _ in range(50)]
    labels = [f"tissue {slide % 8}" for slide in groups]
    names, shares = [f"slide {slide}" for slide in groups], read_shares("0.7,0.1,0.2")
    for seed in range(5):
        splits = make_splits(groups, names, labels, [None] * 500, seed=seed, shares=shares)
        assert {split: splits.count(split) for split in ("train", "val", "test")} == {"train": 350, "val": 50, "test": 100}
        assert len(set(zip(groups, splits, strict=True))) == 10
