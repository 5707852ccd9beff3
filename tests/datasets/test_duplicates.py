"""Duplicate search against comparing every pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.datasets.duplicates import connected, groups_of_equal, near_pairs


def naive(hashes: list[str], bits: int) -> list[list[int]]:
    """Groups connected by pairs within `bits`, by comparing all."""
    parent = list(range(len(hashes)))

    def find(i: int) -> int:
        return i if parent[i] == i else find(parent[i])

    for i, one in enumerate(hashes):
        for j in range(i):
            if (int(one, 16) ^ int(hashes[j], 16)).bit_count() <= bits:
                low, high = sorted((find(i), find(j)))
                parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(len(hashes)):
        groups.setdefault(find(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8),
    flips=st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 63), max_size=7)), max_size=25),
    bits=st.integers(0, 6),
)
def test_groups_equal_those_of_all_pairs(seeds: list[int], flips: list[tuple[int, set[int]]], bits: int) -> None:
    values = [*seeds, *(seeds[k % len(seeds)] ^ sum(1 << bit for bit in places) for k, places in flips)]
    hashes = [f"{value:016x}" for value in values]
    assert connected(near_pairs(hashes, bits), len(hashes)) == naive(hashes, bits)


def test_pairs_are_each_once_and_within_the_bound() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 200).tolist()
    hashes = [f"{value ^ (1 << int(rng.integers(0, 60))):016x}" for value in base for _ in range(3)]
    pairs = near_pairs(hashes, 2)
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    assert all(i < j and (int(hashes[i], 16) ^ int(hashes[j], 16)).bit_count() <= 2 for i, j in pairs.tolist())


def test_a_thousand_copies_are_no_million_pairs() -> None:
    assert len(near_pairs(["00000000000000ff"] * 1000, 2)) == 999


def test_exact_groups_and_bounds() -> None:
    assert groups_of_equal(["a", "b", "a", "c", "b"]) == [[0, 2], [1, 4]]
    assert near_pairs([], 2).shape == (0, 2)
    with pytest.raises(ValueError, match="bits is 40"):
        near_pairs(["00"], 40)
