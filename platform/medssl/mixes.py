"""What a pretraining is shown: images of one dataset or of several, some of them more than once an epoch.

The images of all sources are numbered one source after the other: the number of an image is its row in its dataset's index
plus the images of all datasets before it. With one source it is the row itself.

Shapes: N numbers of an epoch, an image that is shown k times counted k times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medssl.datasets.dataset import Shard
from medssl.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Source:
    """Images of one dataset, by value: pickles, and opens again where it is needed."""

    dataset_uri: str
    images: int
    """Images in the whole dataset."""
    rows: list[int]
    """Rows of its index that are shown, ascending."""
    splits: list[str] | None
    """Splits they are from; None is all."""
    times: int = 1
    """How often an epoch shows each."""
    left_out: tuple[int, ...] = ()
    """The rows of these splits that are not shown: held back, of other classes, or without the label that a method takes."""
    shards: tuple[Shard, ...] = ()
    """The dataset's shards, for streaming."""
    resident: Mapping[str, Any] | None = None
    """Arguments of `rows.open_resident`; None streams."""


def offsets(sources: Sequence[Source]) -> list[int]:
    """What is added to each source's rows."""
    return [sum(source.images for source in sources[:place]) for place in range(len(sources))]


def shown(sources: Sequence[Source]) -> NDArray[np.int64]:
    """(N,) the numbers of an epoch's images, ascending."""
    parts = zip(sources, offsets(sources), strict=True)
    return np.concatenate([np.repeat(np.asarray(s.rows, dtype=np.int64) + offset, s.times) for s, offset in parts])


def joined_index(indexes: Sequence[pd.DataFrame], datasets: Sequence[str | None] | None = None) -> pd.DataFrame:
    """Patients and bags of all sources' indexes under their common numbers.

    Ids of two datasets never mean one patient or bag: those of the second are told apart by its number, and so on.

    Args:
        datasets: whose index each is, since several parts may be of one; None takes each for another one's.
    """
    import pandas as pd

    columns = ["patient_id", "bag_id"]
    places = range(len(indexes)) if datasets is None else [list(datasets).index(dataset) for dataset in datasets]
    told_apart = [
        index[columns] if not place else index[columns].map(lambda key, at=place: key if pd.isna(key) else f"{at}/{key}")
        for place, index in zip(places, indexes, strict=True)
    ]
    return pd.concat(told_apart, ignore_index=True)


def seen_elsewhere(index: pd.DataFrame, rows: NDArray[np.int64], held_back: set[str]) -> NDArray[np.int64]:
    """Those of a dataset's rows whose image is, byte for byte, among the `held_back` (sha256)."""
    return rows[index["sha256"].iloc[rows].isin(held_back).to_numpy()]


def check_splits(uri: str, index: pd.DataFrame, splits: Sequence[str]) -> None:
    """Raises DataError naming the first split that the dataset has no image in."""
    there = sorted(index["split"].unique())
    for split in splits:
        if split not in there:
            raise DataError(f"dataset {uri} has no images in split '{split}'; its splits: {', '.join(there)}")
