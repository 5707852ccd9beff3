"""Draws of the labelled subset: which training images have labels in one repeat of a study."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.errors import DataError


def label_draw(index: pd.DataFrame, *, labels: int | float | None, draw: int, split: str = "train") -> NDArray[np.int64]:
    """Row numbers of one stratified draw of labelled images, sorted.

    Each class gets its share of `labels` (largest remainders, at least one image). Within a class, images are ordered by a
    hash of (draw, image id), so the draw depends on nothing else: adding or mending one image moves that image, not the
    others, and a larger draw contains the smaller one as far as the shares allow.

    Args:
        index: `Dataset.index()`, with columns image_id, label, split.
        labels: images to draw, or as a float below 1 the share of each class (rounded, at least one image), of which a smaller
            one is always part of a larger one; None takes every labelled image of the split.
        draw: number of the draw.
        split: split to draw from.

    Raises:
        DataError: the split has no labelled images, or fewer than asked for.
    """
    candidates = index[(index["split"] == split) & index["label"].notna()]
    if candidates.empty:
        raise DataError(f"split '{split}' has no labelled images: the protocols need labels to train on")
    if labels is None:
        return candidates.index.to_numpy(dtype=np.int64)
    counts = {str(name): int(number) for name, number in candidates["label"].value_counts().sort_index().items()}
    if isinstance(labels, float):
        return _first(candidates, {name: max(1, round(labels * number)) for name, number in counts.items()}, draw)
    if labels > len(candidates):
        raise DataError(
            f"labels is {labels}, but split '{split}' has {len(candidates)} labelled images: lower it"
        )
    if labels < len(counts):
        raise DataError(f"labels is {labels}, less than the {len(counts)} classes: raise it")
    return _first(candidates, _shares(counts, labels), draw)


def finding_draw(index: pd.DataFrame, known_N: NDArray[np.bool_], *, labels: int | float | None, draw: int) -> NDArray[np.int64]:
    """Row numbers of one draw of images of which a finding is known, sorted; a larger draw always contains the smaller one.

    The images are ordered by a hash of (draw, image id) as for classes, but the draw is plain: images with several findings
    belong to no one stratum.

    Args:
        index: `Dataset.index()`.
        known_N: images that may be drawn.
        labels: images to draw, or as a float below 1 the share of them; None takes all.
        draw: number of the draw.

    Raises:
        DataError: there are no such images, or fewer than asked for.
    """
    rows = np.flatnonzero(known_N)
    if not len(rows):
        raise DataError("no training image has a known finding: the protocols need labels to train on")
    if labels is None:
        return rows
    number = max(1, round(labels * len(rows))) if isinstance(labels, float) else labels
    if number > len(rows):
        raise DataError(f"labels is {labels}, but the training split has {len(rows)} images with a known finding: lower it")
    ids = index["image_id"].to_numpy()
    return np.sort(np.array(sorted(rows, key=lambda row: _rank(draw, str(ids[row])))[:number], dtype=np.int64))


def _first(candidates: pd.DataFrame, share: dict[str, int], draw: int) -> NDArray[np.int64]:
    """Rows of each class's first images in the order of the draw, sorted."""
    chosen: list[int] = []
    for name, rows in candidates.groupby("label", sort=True):
        ranks = sorted((_rank(draw, image_id), row) for row, image_id in rows["image_id"].items())
        chosen += [int(str(row)) for _, row in ranks[: share[str(name)]]]
    return np.array(sorted(chosen), dtype=np.int64)


def _rank(draw: int, image_id: str) -> bytes:
    return hashlib.sha256(f"{draw}\0{image_id}".encode()).digest()


def _shares(counts: dict[str, int], labels: int) -> dict[str, int]:
    total = sum(counts.values())
    exact = {name: count * labels / total for name, count in counts.items()}
    share = {name: max(int(value), 1) for name, value in exact.items()}
    # largest remainders first; classes raised to their one image take it from the largest share
    for name in sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name)):
        if sum(share.values()) < labels and share[name] < counts[name]:
            share[name] += 1
    while sum(share.values()) > labels:
        share[max(share, key=lambda name: (share[name], name))] -= 1
    return share
