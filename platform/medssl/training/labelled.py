"""Labelled images of a fine-tuning: their batches, epoch by epoch, and what each counts in the loss.

Shapes: N labelled images, B batch, H, W, C stored images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from medssl.training.feed import ResidentImages


class Labels(NamedTuple):
    """Which images, and the class of each."""

    rows: Sequence[int] | NDArray[np.int64]
    classes: Sequence[int] | NDArray[np.int64]


class LabelledImages:
    """The labelled images with their targets and weights, on the device to train on."""

    def __init__(
        self, images: ResidentImages, labels: Labels, classes: int, device: torch.device, *,
        class_weights: Literal["balanced", "none"] = "none", over_sample: bool = False,
    ) -> None:  # fmt: skip
        """ValueError unless there are two images or more, each of one of `classes` classes."""
        self.rows, given = np.asarray(labels.rows, np.int64), np.asarray(labels.classes, np.int64)
        if len(self.rows) != len(given) or len(given) < 2:
            raise ValueError(f"{len(self.rows)} rows and {len(given)} labels: expected as many, two or more")
        if given.min() < 0 or given.max() >= classes:
            raise ValueError(f"labels lie in {given.min()}..{given.max()}: expected 0..{classes - 1}")
        self.images, self.device = images, device
        self.labels_N = torch.from_numpy(given).to(device)
        counts_K = np.bincount(given, minlength=classes)
        weights_K = np.ones(classes)
        if class_weights == "balanced":
            weights_K = len(given) / ((counts_K > 0).sum() * np.maximum(counts_K, 1))
        self.weights_N = torch.from_numpy(weights_K[given].astype(np.float32)).to(device)
        self._shares_N = torch.from_numpy(1 / counts_K[given]) if over_sample else None

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """Positions of an epoch's batches, in equal parts of at most `size`: a permutation, or with over-sampling as many
        draws with replacement, every class as likely as another.
        """
        if self._shares_N is None:
            order = torch.randperm(len(self.rows), generator=generator)
        else:
            order = torch.multinomial(self._shares_N, len(self.rows), replacement=True, generator=generator)
        return list(torch.tensor_split(order, -(-len(order) // size)))

    def read(self, positions_B: Tensor) -> Tensor:
        """Stored images (B, H, W, C) uint8 on the device."""
        return read_images(self.images, self.rows[positions_B.numpy()], self.device)


def read_images(images: ResidentImages, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """Stored images (B, H, W, C) uint8 on the device."""
    return torch.from_numpy(np.ascontiguousarray(images.images[rows])).to(device)
