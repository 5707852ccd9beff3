"""Pairs of two images of one bag (MICLe), in batches that hold at most one bag of a patient.

A bag is all images of one lesion or case, a group all bags of one patient. A step draws bags, not images: of a bag with two
images or more two different ones at random, of any other its one image twice, seen in two views (Azizi et al. 2021,
section 3.2). Two bags of a patient are no positives of each other and must be no negatives either, so they never meet in a
global batch. This decides which images make a pair and nothing else: it goes with every objective of two views.

Shapes: N images, B bags of this rank in a step, G bags of the global batch, T steps of an epoch, H, W, C stored images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.collectives import Process
from medssl.errors import DataError, RecipeError
from medssl.training.feed import Batch, Images, ahead, rank_slice

if TYPE_CHECKING:
    import pandas as pd

Rows = NDArray[np.int64]


class Bags:
    """Which rows are images of one bag, and which bags are of one patient. Bags are numbered by their first row."""

    def __init__(self, rows: Sequence[int] | Rows, bag_keys: Sequence[Any], group_keys: Sequence[Any]) -> None:
        """Row numbers, all different, with the key of each row's bag and group; None or NaN is shared with nobody.

        A bag whose images have no group key is a group of its own; images without the key join the group of their bag.

        Raises:
            DataError: a bag has images of two groups.
            ValueError: the three are not of one length, are empty, or a row comes twice.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        if not len(numbers) == len(bag_keys) == len(group_keys) or not len(numbers) or len(np.unique(numbers)) < len(numbers):
            raise ValueError(f"{len(numbers)} rows, {len(bag_keys)} bags, {len(group_keys)} groups: as many, each row once")
        order = np.argsort(numbers)
        bag_of_row = _numbered(bag_keys)[order]
        bag_of_row = np.unique(bag_of_row, return_inverse=True)[1]
        first = np.full(bag_of_row.max() + 1, len(order))
        np.minimum.at(first, bag_of_row, np.arange(len(order)))
        bag_of_row = np.argsort(np.argsort(first))[bag_of_row]
        self.rows: Rows = numbers[order][np.argsort(bag_of_row, kind="stable")]
        """(N,) row numbers, bag after bag."""
        self.sizes: Rows = np.bincount(bag_of_row)
        """Images of each bag."""
        self.starts: Rows = np.cumsum(self.sizes) - self.sizes
        """Where each bag begins in `rows`."""
        self.groups: Rows = _groups(bag_of_row, np.asarray(group_keys, object)[order], np.asarray(bag_keys, object)[order])
        """Group number of each bag."""

    @classmethod
    def of_index(cls, index: pd.DataFrame, rows: Sequence[int] | Rows) -> Bags:
        """The bags of a dataset's rows, from the columns bag_id and patient_id of its index.

        Raises:
            DataError: no bag has two of these images, or one has images of two patients.
        """
        chosen = index.iloc[np.asarray(rows, dtype=np.int64)]
        bags = cls(rows, chosen["bag_id"].tolist(), chosen["patient_id"].tolist())
        if bags.sizes.max() < 2:
            raise DataError(
                f"none of the {len(bags)} bags has two images: name the column of lesions or cases when ingesting "
                "(--bag-column), or make pairs of one image (pairs: image)"
            )
        return bags

    def __len__(self) -> int:
        """Number of bags."""
        return len(self.sizes)

    def of(self, bag: int) -> list[int]:
        """Row numbers of a bag."""
        rows: list[int] = self.rows[self.starts[bag] : self.starts[bag] + self.sizes[bag]].tolist()
        return rows

    def counts(self) -> dict[int, int]:
        """How many bags have how many images: number of bags by number of images, ascending."""
        sizes, bags = np.unique(self.sizes, return_counts=True)
        return dict(zip(sizes.tolist(), bags.tolist(), strict=True))

    def steps_per_epoch(self, batch_size: int) -> int:
        """The largest number of batches that hold each bag once at most and no group twice; the same in every epoch.

        T batches of G bags can be made exactly when the groups have enough for them, a group giving T bags at most: when
        the sum over groups of min(bags, T) is T * G or more. A patient with half of all bags therefore costs steps.

        Raises:
            RecipeError: not even one batch can be made.
        """
        sizes = np.bincount(self.groups)
        low, high = 0, len(self) // batch_size
        while low < high:  # each further batch needs as many bags and adds fewer: once there are too few, there always are
            middle = (low + high + 1) // 2
            if np.minimum(sizes, middle).sum() >= middle * batch_size:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            raise RecipeError(
                f"batch_size {batch_size} needs as many bags of different patients and there are {len(sizes)} patients with "
                f"{len(self)} bags: use {len(sizes)} or less"
            )
        return low


def _numbered(keys: Sequence[Any] | NDArray[Any]) -> Rows:
    """A number per key, equal for equal keys; each missing one has its own."""
    import pandas as pd

    codes = pd.factorize(np.asarray(keys, dtype=object))[0].astype(np.int64)
    missing = codes < 0
    codes[missing] = codes.max(initial=-1) + 1 + np.arange(missing.sum())
    return codes


def _groups(bag_of_row: Rows, group_keys: NDArray[Any], bag_keys: NDArray[Any]) -> Rows:
    """Group number of each bag: that of the images whose group is known, else the bag's own."""
    import pandas as pd

    known = ~pd.isna(group_keys)
    numbers = _numbered(group_keys)
    bags = int(bag_of_row.max()) + 1
    lowest, highest = np.full(bags, np.iinfo(np.int64).max), np.full(bags, -1)
    np.minimum.at(lowest, bag_of_row[known], numbers[known])
    np.maximum.at(highest, bag_of_row[known], numbers[known])
    torn = np.flatnonzero((highest >= 0) & (lowest != highest))
    if len(torn):
        example = bag_keys[int(np.flatnonzero(bag_of_row == torn[0])[0])]
        raise DataError(
            f"{len(torn)} bags hold images of more than one patient ({example}): bag ids must differ between patients"
        )
    unknown = highest < 0
    highest[unknown] = numbers.max() + 1 + np.arange(unknown.sum())
    return np.unique(highest, return_inverse=True)[1]


def epoch_pairs(bags: Bags, seed: int, epoch: int, batch_size: int) -> tuple[Rows, Rows]:
    """The pairs of an epoch: row numbers of the first and of the second images, both (T, G).

    They follow from (bags, seed, epoch, batch_size) alone. Every bag comes once at most, every group once at most in a
    batch, and T is `bags.steps_per_epoch(batch_size)`: what is left over, and of a group its bags above T, sits out this
    epoch, drawn anew in each. Both images of a pair are drawn without replacement; a bag of one image gives it twice.
    """
    random = np.random.default_rng([seed, epoch])
    batches_TG = _epoch_batches(bags, bags.steps_per_epoch(batch_size), batch_size, random)
    sizes_TG = bags.sizes[batches_TG]
    first_TG = random.integers(0, sizes_TG)
    second_TG = random.integers(0, np.maximum(sizes_TG - 1, 1))
    second_TG += (second_TG >= first_TG) & (sizes_TG > 1)
    starts_TG = bags.starts[batches_TG]
    return bags.rows[starts_TG + first_TG], bags.rows[starts_TG + second_TG]


def _epoch_batches(bags: Bags, steps: int, batch_size: int, random: np.random.Generator) -> Rows:
    """Bag numbers (T, G) of an epoch.

    Bags are put in a row, group after group in random order, and cut into G columns of T. A column is dealt out over the
    T batches, one each, in random order; so the bags of a group, T at most and neighbours, fall into different batches as
    long as they lie in one column. A group that reaches into the next column goes there to batches it was not yet dealt to.
    """
    row = _row_of_bags(bags, steps, batch_size, random)
    columns_GT = row.reshape(batch_size, steps)
    groups_GT = bags.groups[columns_GT]
    batches_TG = np.empty((steps, batch_size), np.int64)
    order_T = np.arange(steps)
    for place in range(batch_size):
        reached = np.zeros(steps, bool)
        begun = 0
        if place and groups_GT[place - 1, -1] == groups_GT[place, 0]:
            reached[order_T[groups_GT[place - 1] == groups_GT[place, 0]]] = True
            begun = int((groups_GT[place] == groups_GT[place, 0]).sum())
        order_T = random.permutation(steps)
        chosen = np.flatnonzero(~reached[order_T])[:begun]
        order_T = np.concatenate([order_T[chosen], np.delete(order_T, chosen)])
        batches_TG[order_T, place] = columns_GT[place]
    return random.permuted(batches_TG, axis=1)


def _row_of_bags(bags: Bags, steps: int, batch_size: int, random: np.random.Generator) -> Rows:
    """T * G bag numbers, the bags of a group side by side and T of it at most; groups, and bags in them, at random."""
    order = random.permutation(len(bags))
    rank = random.permutation(int(bags.groups.max()) + 1)[bags.groups[order]]
    by_group = np.argsort(rank, kind="stable")
    order, rank = order[by_group], rank[by_group]
    begins = np.flatnonzero(np.diff(rank, prepend=-1))
    nth = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    order = order[nth < steps]
    kept = np.sort(random.permutation(len(order))[: steps * batch_size])
    return order[kept]


class ResidentBagFeed:
    """Batches of pairs from resident images; the :class:`medssl.training.feed.Feed` for bags."""

    starts_within_epoch = True

    def __init__(self, images: Images, bags: Bags, batch_size: int, seed: int, process: Process) -> None:
        """`batch_size` counts bags over all ranks.

        Raises:
            RecipeError: the batch cannot be made of bags of different patients, or not be shared by the ranks.
        """
        if bags.rows.min() < 0 or bags.rows.max() >= len(images):
            raise ValueError(f"rows {bags.rows.min()} to {bags.rows.max()} of {len(images)} resident images")
        self.bags = bags
        self.batch_size = batch_size
        self.steps_per_epoch = bags.steps_per_epoch(batch_size)
        self.seed = seed
        self._slice = rank_slice(batch_size, process)
        self._images = images
        self._pin = process.device.type == "cuda"

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See :class:`medssl.training.feed.Feed`. The next batch is copied while the current one trains."""
        pairs = epoch_pairs(self.bags, self.seed, epoch, self.batch_size)
        firsts_TB, seconds_TB = (torch.from_numpy(rows_TG[start_step:, self._slice].copy()) for rows_TG in pairs)
        return ahead(self._batch(*rows) for rows in zip(firsts_TB, seconds_TB, strict=True))

    def _batch(self, first_B: Tensor, second_B: Tensor) -> Batch:
        return Batch(self._read(first_B), first_B, self._read(second_B), second_B)

    def _read(self, rows_B: Tensor) -> Tensor:
        images_BHWC = self._images.take(rows_B)
        return images_BHWC.pin_memory() if self._pin else images_BHWC
