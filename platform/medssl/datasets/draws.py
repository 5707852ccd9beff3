"""Draws of the labelled subset: which training images have labels in one repeat of a study."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.errors import DataError


def label_draw(index: pd.DataFrame, *, labels: int | None, draw: int, split: str = "train") -> NDArray[np.int64]:
    """Row numbers of one stratified draw of labelled images, sorted.

    Each class gets its share of `labels` (largest remainders, at least one image). Within a class, images are ordered by a
    hash of (draw, image id), so the draw depends on nothing else: adding or mending one image moves that image, not the
    others, and a larger draw contains the smaller one as far as the shares allow.

    Args:
        index: `Dataset.index()`, with columns image_id, label, split.
        labels: images to draw; None takes every labelled image of the split.
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
    if labels > len(candidates):
        raise DataError(
            f"repeats.labels is {labels}, but split '{split}' has {len(candidates)} labelled images: lower it"
        )
    counts = candidates["label"].value_counts().sort_index()
    if labels < len(counts):
        raise DataError(f"repeats.labels is {labels}, less than the {len(counts)} classes: raise it")
    share = _shares(counts, labels)
    chosen: list[int] = []
    for name, rows in candidates.groupby("label", sort=True):
        order = sorted(rows.index, key=lambda row, ids=rows["image_id"]: _rank(draw, ids[row]))
        chosen += order[: share[str(name)]]
    return np.array(sorted(chosen), dtype=np.int64)


def _rank(draw: int, image_id: str) -> bytes:
    return hashlib.sha256(f"{draw}\0{image_id}".encode()).digest()


def _shares(counts: pd.Series[int], labels: int) -> dict[str, int]:
    exact = counts * (labels / counts.sum())
    share = np.maximum(np.floor(exact), 1).astype(int)
    # largest remainders first; classes raised to their one image give back from the largest class
    for name in (exact - np.floor(exact)).sort_values(ascending=False, kind="stable").index:
        if share.sum() >= labels:
            break
        if share[name] < counts[name]:
            share[name] += 1
    while share.sum() > labels:
        share[share.idxmax()] -= 1
    while share.sum() < labels:
        share[(counts - share).idxmax()] += 1
    return {str(name): int(number) for name, number in share.items()}
