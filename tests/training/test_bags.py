"""Bags: who is paired with whom, one bag of a patient in a batch, the same batches for every number of workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medssl.collectives import Process
from medssl.errors import DataError, RecipeError
from medssl.training.bags import Bags, ResidentBagFeed, epoch_pairs
from medssl.training.feed import Batch, ResidentImages

Patients = list[list[int]]
"""Images of each bag of each patient."""

CLINIC: Patients = [[1], [3], [2, 2], [1, 1, 4], [2], [1], [5], [1, 2], [1], [3], [1], [2, 1, 1, 1]]


def make_bags(patients: Patients, shuffle: int = 0) -> Bags:
    keys = [
        (f"bag-{p}-{b}", f"patient-{p}") for p, sizes in enumerate(patients) for b, size in enumerate(sizes) for _ in range(size)
    ]
    rows = np.random.default_rng(shuffle).permutation(len(keys))
    return Bags(rows, [bag for bag, _ in keys], [patient for _, patient in keys])


def bag_of_row(bags: Bags) -> dict[int, int]:
    return {row: bag for bag in range(len(bags)) for row in bags.of(bag)}


def test_bags_of_columns() -> None:
    bags = Bags([5, 3, 9, 4, 1, 7], ["b", "a", None, "a", np.nan, "c"], ["p", "p", None, None, "q", None])
    assert [bags.of(k) for k in range(len(bags))] == [[1], [3, 4], [5], [7], [9]]  # by first row; missing keys alone
    assert bags.counts() == {1: 4, 2: 1}
    groups = bags.groups.tolist()
    assert groups[1] == groups[2] and len(set(groups)) == 4  # an image without a patient goes with its bag


def test_the_order_of_rows_does_not_matter() -> None:
    rows, bag_keys, groups = [0, 1, 2, 3, 4, 5], list("aabbcd"), list("ppqqrr")
    order = [4, 1, 5, 0, 3, 2]
    one = Bags(rows, bag_keys, groups)
    other = Bags([rows[k] for k in order], [bag_keys[k] for k in order], [groups[k] for k in order])
    assert [one.of(k) for k in range(4)] == [other.of(k) for k in range(4)]
    for epoch in range(3):
        assert np.array_equal(epoch_pairs(one, 0, epoch, 2), epoch_pairs(other, 0, epoch, 2))


def test_what_are_no_bags() -> None:
    with pytest.raises(DataError, match=r"1 bags hold images of more than one patient \(a\)"):
        Bags([0, 1, 2], ["a", "a", "b"], ["p", "q", "q"])
    for wrong in (([0, 0], ["a", "b"], ["p", "q"]), ([0, 1], ["a"], ["p", "q"]), ([], [], [])):
        with pytest.raises(ValueError, match="each row once"):
            Bags(*wrong)


def test_bags_of_an_index() -> None:
    index = pd.DataFrame({"bag_id": ["a", "a", np.nan, "b"], "patient_id": ["p", "p", "p", np.nan]})
    bags = Bags.of_index(index, [3, 1, 0, 2])
    assert [bags.of(k) for k in range(3)] == [[0, 1], [2], [3]] and bags.groups[0] == bags.groups[1] != bags.groups[2]
    with pytest.raises(DataError, match="none of the 3 bags has two images"):
        Bags.of_index(index, [1, 2, 3])


@settings(max_examples=300, deadline=None)
@given(
    patients=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=9), min_size=2, max_size=25),
    batch_size=st.integers(2, 7),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_of_pairs(patients: Patients, batch_size: int, seed: int, epoch: int) -> None:
    assume(len(patients) >= batch_size)
    bags = make_bags(patients)
    steps = bags.steps_per_epoch(batch_size)
    firsts, seconds = epoch_pairs(bags, seed, epoch, batch_size)
    assert firsts.shape == seconds.shape == (steps, batch_size) and steps >= 1
    owner = bag_of_row(bags)
    drawn = [owner[row] for row in firsts.ravel().tolist()]
    assert len(set(drawn)) == len(drawn)  # each bag once at most
    assert drawn == [owner[row] for row in seconds.ravel().tolist()]
    assert np.array_equal(firsts.ravel() != seconds.ravel(), bags.sizes[drawn] > 1)
    groups = bags.groups[np.reshape(drawn, firsts.shape)]
    assert all(len(set(batch)) == batch_size for batch in groups.tolist())
    # No schedule has more batches: a patient gives one bag to each at most.
    assert sum(min(len(sizes), steps + 1) for sizes in patients) < (steps + 1) * batch_size
    assert np.array_equal(epoch_pairs(bags, seed, epoch, batch_size), (firsts, seconds))


def test_a_batch_of_all_patients_is_exact() -> None:
    """Seven patients of five bags: seven a batch leave no choice of patients, and no bag out."""
    bags = make_bags([[1, 2, 1, 3, 1]] * 7)
    for epoch in range(20):
        firsts, _ = epoch_pairs(bags, 3, epoch, 7)
        assert firsts.shape == (5, 7)
        assert {bag_of_row(bags)[row] for row in firsts.ravel().tolist()} == set(range(35))


def test_one_patient_with_half_of_all_bags_costs_steps() -> None:
    bags = make_bags([[1] * 40, *([2] for _ in range(40))])
    assert bags.steps_per_epoch(8) == 5  # 5 batches need 40 of 40 + 5 bags, 6 would need 48 of 40 + 6
    for epoch in range(50):
        firsts, _ = epoch_pairs(bags, 0, epoch, 8)
        assert firsts.shape == (5, 8)
    with pytest.raises(RecipeError, match="batch_size 42 needs as many bags of different patients and there are 41"):
        bags.steps_per_epoch(42)


def test_unknown_patients_are_a_permutation_of_the_bags() -> None:
    bags = Bags(range(50), [f"bag-{k // 2}" for k in range(50)], [None] * 50)
    owner = bag_of_row(bags)
    epochs = [[owner[row] for row in epoch_pairs(bags, 1, epoch, 6)[0].ravel().tolist()] for epoch in range(100)]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 100
    left_out = Counter(bag for epoch in epochs for bag in set(range(25)) - set(epoch))
    assert len(left_out) == 25 and max(left_out.values()) < 14  # 4 expected of each


def test_each_ordered_pair_of_a_bag_is_as_frequent() -> None:
    bags, pairs, left_out, epochs = make_bags([[3], [1], [2], [4], [1]]), Counter[tuple[int, int]](), Counter[int](), 3000
    owner, three = bag_of_row(bags), next(k for k in range(5) if bags.sizes[k] == 3)
    for epoch in range(epochs):
        firsts, seconds = (rows.ravel().tolist() for rows in epoch_pairs(bags, 0, epoch, 2))
        pairs.update((a, b) for a, b in zip(firsts, seconds, strict=True) if owner[a] == three)
        left_out.update(set(range(5)) - {owner[row] for row in firsts})
    assert len(pairs) == 6
    assert chi_square(pairs) < 20.5  # 5 degrees of freedom, p = 0.001
    assert sum(left_out.values()) == epochs and chi_square(left_out) < 18.5  # 4 degrees of freedom


def chi_square(counts: Counter[int] | Counter[tuple[int, int]]) -> float:
    expected = sum(counts.values()) / len(counts)
    return sum((count - expected) ** 2 for count in counts.values()) / expected


def test_two_patients_meet_as_often_as_chance_has_it() -> None:
    """Ten patients of two bags each, 4 batches of 5: any two patients meet in as many batches as any other two."""
    bags, met = make_bags([[1, 1]] * 10), Counter[tuple[int, int]]()
    owner, epochs = bag_of_row(bags), 1500
    for epoch in range(epochs):
        for batch in epoch_pairs(bags, 0, epoch, 5)[0].tolist():
            groups = sorted(int(bags.groups[owner[row]]) for row in batch)
            met.update((a, b) for k, a in enumerate(groups) for b in groups[k + 1 :])
    assert len(met) == 45 and sum(met.values()) == epochs * 4 * 10
    expected = epochs * 40 / 45
    assert max(abs(count - expected) for count in met.values()) < 5 * (expected * 1.2) ** 0.5


# ---------------------------------------------------------------------------------------------------------------- feed


@pytest.fixture
def images(tmp_path: Path) -> ResidentImages:
    total = sum(map(sum, CLINIC))
    array = np.random.default_rng(0).integers(0, 256, (total, 4, 5, 3), dtype=np.uint8)
    return ResidentImages.write(tmp_path / "digest", array, [f"image-{k:02d}" for k in range(total)])


def feed(images: ResidentImages, rank: int = 0, world: int = 1, batch_size: int = 6) -> ResidentBagFeed:
    return ResidentBagFeed(images, make_bags(CLINIC), batch_size, 1, Process(rank, world, torch.device("cpu")))


def joined(parts: list[Batch]) -> list[torch.Tensor]:
    return [torch.cat([part[field] for part in parts]) for field in range(4)]  # type: ignore[misc]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_global_batch(images: ResidentImages, world: int) -> None:
    bags, steps = make_bags(CLINIC), feed(images).steps_per_epoch
    owner = bag_of_row(bags)
    whole = list(feed(images).batches(2))
    parts = [list(feed(images, rank, world).batches(2)) for rank in range(world)]
    assert len(whole) == steps == 3 and all(len(part) == steps for part in parts)
    for step, batch in enumerate(whole):
        for one, other in zip(batch, joined([part[step] for part in parts]), strict=True):
            assert one is not None and torch.equal(one, other)
        assert batch.second_BHWC is not None and batch.second_rows_B is not None
        assert batch.images_BHWC.dtype == torch.uint8 and batch.images_BHWC.shape == (6, 4, 5, 3)
        assert np.array_equal(batch.images_BHWC.numpy(), images.images[batch.rows_B.numpy()])
        assert np.array_equal(batch.second_BHWC.numpy(), images.images[batch.second_rows_B.numpy()])
        assert len(set(bags.groups[[owner[row] for row in batch.rows_B.tolist()]].tolist())) == 6


def test_starting_within_an_epoch(images: ResidentImages) -> None:
    whole, rest = list(feed(images).batches(4)), list(feed(images).batches(4, start_step=2))
    assert len(rest) == 1 and all(torch.equal(a, b) for a, b in zip(rest[0], whole[2], strict=True))  # type: ignore[arg-type]
    assert list(feed(images).batches(4, start_step=3)) == []


@pytest.mark.parametrize(
    ("batch_size", "world", "words"),
    [(6, 4, "cannot be shared evenly by 4 workers"), (13, 1, "needs as many bags of different patients"), (3, 3, "one image")],
)
def test_impossible_batches(images: ResidentImages, batch_size: int, world: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        feed(images, 0, world, batch_size)
