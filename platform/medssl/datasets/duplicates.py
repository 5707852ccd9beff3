"""Exact and near duplicates by hash, without comparing every pair.

N hashes of 64 bits. Two that differ in at most b bits agree in at least one of b + 1 bands of neighbouring bits, so
only hashes that share a band are compared, in numpy. Equal hashes are merged first: a thousand copies are one hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64


def groups_of_equal(values: Sequence[str]) -> list[list[int]]:
    """Positions of values that occur more than once, group by group, in order of first position."""
    places: dict[str, list[int]] = {}
    for position, value in enumerate(values):
        places.setdefault(value, []).append(position)
    return [found for found in places.values() if len(found) > 1]


def near_pairs(hashes: Sequence[str], bits: int) -> NDArray[np.int64]:
    """Pairs (M, 2) of positions i < j in `hashes` (hex) that differ in at most `bits` of 64 bits, sorted.

    Of equal hashes only neighbours are paired (i with the next), so n copies give n - 1 pairs.
    """
    if not 0 <= bits < HASH_BITS // 2:
        raise ValueError(f"bits is {bits}: give 0 to {HASH_BITS // 2 - 1}")
    if not len(hashes):
        return np.empty((0, 2), np.int64)
    values = np.array([int(value, 16) for value in hashes], np.uint64)
    unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.lexsort((np.arange(len(values)), inverse))
    neighbours = inverse[order][1:] == inverse[order][:-1]
    pairs = [np.stack([order[:-1][neighbours], order[1:][neighbours]], axis=1)]
    keys: set[int] = set()
    for left, right in _candidates(unique, bits):
        close = np.bitwise_count(unique[left] ^ unique[right]) <= bits
        keys.update((left[close] * len(unique) + right[close]).tolist())
    if keys:
        found = np.array(sorted(keys), np.int64)
        pairs.append(np.stack([first[found // len(unique)], first[found % len(unique)]], axis=1))
    joined = np.sort(np.concatenate(pairs).astype(np.int64), axis=1)
    return joined[np.lexsort((joined[:, 1], joined[:, 0]))]


def connected(pairs: NDArray[np.int64], count: int) -> list[list[int]]:
    """Groups of positions that pairs connect, directly or through others; each sorted, in order of first position."""
    if not len(pairs):
        return []
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    members: dict[int, list[int]] = {}
    for position in np.unique(pairs).tolist():
        members.setdefault(int(component[position]), []).append(position)
    return list(members.values())


def _candidates(unique: NDArray[np.uint64], bits: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Position pairs (left < right) of the sorted hashes that agree in a band, a part at a time."""
    edges = np.linspace(0, HASH_BITS, bits + 2).astype(int)
    for low, high in pairwise(edges):
        mask = np.uint64(((1 << int(high - low)) - 1) << int(low))
        band = unique & mask
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        # every hash against the one `step` further on, as long as that is in the same band
        here, step = np.arange(len(order)), 1
        while True:
            here = here[: np.searchsorted(here, len(order) - step)]
            here = here[ordered[here] == ordered[here + step]]
            if not len(here):
                break
            yield order[here], order[here + step]
            step += 1
