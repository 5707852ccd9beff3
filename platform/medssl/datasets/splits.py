"""Missing splits: patient-disjoint, stratified by label, from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence

from medssl.datasets.rowset import SPLITS
from medssl.errors import DataError

DEFAULT_SHARES: dict[str, float] = {"train": 0.6, "val": 0.1, "test": 0.3}


def group_numbers(*keys: Sequence[Hashable | None]) -> list[int]:
    """A group number per row: rows that share a value in any of the key columns are one group, None is shared with
    nobody.

    With patients and bags as keys a group holds all that must stay on one side. Numbers count groups by first row.
    """
    count = len(keys[0])
    parent = list(range(count))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for column in keys:
        first: dict[Hashable, int] = {}
        for row, value in enumerate(column):
            if value is not None:
                low, high = sorted((find(first.setdefault(value, row)), find(row)))
                parent[high] = low
    numbers: dict[int, int] = {}
    return [numbers.setdefault(find(row), len(numbers)) for row in range(count)]


def make_splits(
    groups: Sequence[int],
    names: Sequence[str],
    labels: Sequence[str | None],
    given: Sequence[str | None],
    *,
    seed: int,
    shares: Mapping[str, float] | None = None,
) -> list[str]:
    """A split for every row; given ones stay, and a group with a given one follows it as a whole.

    Within each class (of a group: its most frequent label) the groups are put in the order of a hash of (seed, name),
    and cut at the shares of images; a class of as many groups as splits or more has one in each. So one row more, or
    one label mended, moves few others. Groups without any label go to train: nothing else can use them. Where classes have so few
    groups (ten slides of eight tissues) that a split would stay empty, all groups are cut together.

    Args:
        groups: group number of each row.
        names: a name of each row that survives re-ingesting (patient, else bag, else image id); a group is called by
            its smallest.
        labels: None is unlabelled.
        given: split of each row, None where missing.
        seed: the order is a function of it.
        shares: share of images by split, summing to 1; `DEFAULT_SHARES` when None.
    """
    shares = check_shares(shares or DEFAULT_SHARES)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    chosen: dict[int, str] = {}
    strata: dict[str, list[tuple[bytes, int, int]]] = {}
    for group, rows in members.items():
        known = sorted({split for row in rows if (split := given[row]) is not None}, key=SPLITS.index)
        label = _most_frequent([labels[row] for row in rows])
        if known:
            chosen[group] = known[0]
        elif label is None:
            chosen[group] = "train"
        else:
            name = min(names[row] for row in rows)
            strata.setdefault(label, []).append((hashlib.sha256(f"{seed}\0{name}".encode()).digest(), group, len(rows)))
    made = _cut_each(strata.values(), shares)
    lacking = {split for split, share in shares.items() if share > 0} - set(chosen.values()) - set(made.values())
    if lacking and strata:
        made = _cut_each([[group for stratum in strata.values() for group in stratum]], shares)
    chosen |= made
    return [split if (split := given[row]) is not None else chosen[group] for row, group in enumerate(groups)]


def missing_shares(given: Sequence[str | None]) -> dict[str, float]:
    """Shares of the rows without a split: `DEFAULT_SHARES` of train and of what no row is given.

    A test or validation split that somebody gave is whole: what is left beside it goes to train and, if there is none,
    to val (to test likewise).
    """
    whole = {split for split in given if split is not None} - {"train"}
    left = {split: share for split, share in DEFAULT_SHARES.items() if split not in whole}
    return check_shares({split: share / sum(left.values()) for split, share in left.items()})


def asked_shares(shares: Mapping[str, float], given: Sequence[str | None]) -> dict[str, float]:
    """Shares that somebody asks for, of the rows without a split.

    A test or validation split that somebody gave is whole: scores on it compare with those of others only while nothing is added.

    Raises:
        DataError: they are no shares, or one above 0 is of a test or validation split that is given.
    """
    asked = check_shares(shares)
    whole = {split: images for split in SPLITS if split != "train" and (images := sum(each == split for each in given))}
    added = next((split for split in whole if asked[split] > 0), None)
    if added is None:
        return asked
    left = {split: 0.0 if split in whole else share for split, share in asked.items()}
    total = sum(left.values())
    instead = {split: share / total for split, share in left.items()} if total > 0 else {"train": 1.0, "val": 0.0, "test": 0.0}
    there = "1 image" if whole[added] == 1 else f"{whole[added]:,} images"
    raise DataError(
        f"the shares add {asked[added]:g} of the other images to split '{added}', which is given ({there}) and stays as it is: "
        f"give 0 for it, as in {','.join(f'{instead[split]:g}' for split in SPLITS)}"
    )


def check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """The shares in the order train, val, test; DataError unless they are shares of known splits that sum to 1."""
    unknown = sorted(set(shares) - set(SPLITS))
    if unknown:
        raise DataError(f"unknown split {unknown[0]!r} in the shares: choices: {', '.join(SPLITS)}")
    ordered = {split: float(shares.get(split, 0)) for split in SPLITS}
    if min(ordered.values()) < 0 or abs(sum(ordered.values()) - 1) > 1e-6:
        text = ", ".join(f"{split} {share:g}" for split, share in ordered.items())
        raise DataError(f"the shares of the splits are {text}: they must be between 0 and 1 and sum to 1")
    return ordered


def read_shares(text: str) -> dict[str, float]:
    """Shares of train, val and test from `0.7,0.1,0.2`.

    Raises:
        DataError: not three numbers between 0 and 1 that sum to 1.
    """
    try:
        return check_shares(dict(zip(SPLITS, map(float, text.split(",")), strict=True)))
    except ValueError:
        raise DataError(f"shares '{text}' are not three numbers for {', '.join(SPLITS)}: give them as 0.7,0.1,0.2") from None


def _most_frequent(labels: Sequence[str | None]) -> str | None:
    counts: dict[str, int] = {}
    for label in labels:
        if label is not None:
            counts[label] = counts.get(label, 0) + 1
    return min(counts, key=lambda label: (-counts[label], label)) if counts else None


def _cut_each(strata: Iterable[Sequence[tuple[bytes, int, int]]], shares: Mapping[str, float]) -> dict[int, str]:
    """Split by group, for (order, group, images) stratum by stratum."""
    chosen: dict[int, str] = {}
    for stratum in strata:
        chosen |= _cut([(group, size) for _, group, size in sorted(stratum)], shares)
    return chosen


def _cut(ordered: Sequence[tuple[int, int]], shares: Mapping[str, float]) -> dict[int, str]:
    """Split by group: consecutive runs of the ordered (group, images), as near to the shares of images as groups
    allow.
    """
    wanted = [split for split, share in shares.items() if share > 0]
    total = sum(size for _, size in ordered)
    bounds, position, share = [], 0, 0.0
    filled = 0
    for split in wanted[:-1]:
        share += shares[split]
        while position < len(ordered) and filled + ordered[position][1] / 2 <= share * total:
            filled += ordered[position][1]
            position += 1
        bounds.append(position)
    if len(ordered) >= len(wanted):  # enough groups for one in each split
        for place in range(len(bounds)):
            bounds[place] = max(bounds[place], (bounds[place - 1] if place else 0) + 1)
        for place in reversed(range(len(bounds))):
            limit = bounds[place + 1] if place + 1 < len(bounds) else len(ordered)
            bounds[place] = min(bounds[place], limit - 1)
    edges = [0, *bounds, len(ordered)]
    return {
        group: split
        for split, start, stop in zip(wanted, edges[:-1], edges[1:], strict=True)
        for group, _ in ordered[start:stop]
    }
