"""Labelled images of a fine-tuning: their batches, epoch by epoch, and what each counts in the loss.

Labels are of classes (N,) or of findings (N, F), as in `medssl.metrics`.

Shapes: N labelled images, B batch, H, W, C stored images, K classes or F findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medssl.metrics import UNKNOWN
from medssl.probes.links import check_labels, finding_weights

if TYPE_CHECKING:
    from medssl.training.feed import ResidentImages


class Labels(NamedTuple):
    """Which images, and the class or the findings of each."""

    rows: Sequence[int] | NDArray[np.int64]
    classes: Sequence[int] | NDArray[np.int64]


class LabelledImages:
    """The labelled images with their targets and weights, on the device to train on."""

    def __init__(
        self, images: ResidentImages, labels: Labels, classes: int, device: torch.device, *,
        class_weights: Literal["balanced", "none"] = "none", over_sample: bool = False,
    ) -> None:  # fmt: skip
        """ValueError unless there are two images or more, each of one of `classes` classes or with so many findings."""
        self.rows, given = np.asarray(labels.rows, np.int64), np.asarray(labels.classes, np.int64)
        if len(self.rows) != len(given) or len(given) < 2:
            raise ValueError(f"{len(self.rows)} rows and {len(given)} labels: expected as many, two or more")
        check_labels(torch.from_numpy(given), classes)
        self.findings = given.ndim == 2
        if self.findings and over_sample:
            raise ValueError("over_sample draws classes equally often, and findings are several an image")
        self.images, self.device = images, device
        self.labels_N = torch.from_numpy(given).to(device)
        self._shares_N: Tensor | None = None
        if self.findings:
            self.weights_N = finding_weights(self.labels_N, class_weights).to(torch.float32)
            return
        counts_K = np.bincount(given, minlength=classes)
        weights_K = np.ones(classes)
        if class_weights == "balanced":
            weights_K = len(given) / ((counts_K > 0).sum() * np.maximum(counts_K, 1))
        self.weights_N = torch.from_numpy(weights_K[given].astype(np.float32)).to(device)
        if over_sample:
            self._shares_N = torch.from_numpy(1 / counts_K[given])

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


    def losses(self, logits_BK: Tensor, positions_B: Tensor, label_smoothing: float) -> Tensor:
        """Weighted loss (B,) of each image: cross-entropy, or the binary ones of known findings, mean over the findings."""
        labels_B, weights_B = self.labels_N[positions_B], self.weights_N[positions_B]
        if not self.findings:
            losses_B = nn.functional.cross_entropy(logits_BK, labels_B, reduction="none", label_smoothing=label_smoothing)
            return losses_B * weights_B
        targets_BF = (labels_B == 1).to(logits_BK.dtype) * (1 - label_smoothing) + label_smoothing / 2
        losses_BF = nn.functional.binary_cross_entropy_with_logits(logits_BK, targets_BF, reduction="none")
        return (losses_BF * weights_B).mean(dim=1)

    def judged_loss(self, probabilities_NK: Tensor) -> float:
        """Mean unweighted cross-entropy of predictions (N, K) of all these images; of findings, of those that are known."""
        labels_N, sure_NK = self.labels_N.cpu(), probabilities_NK.clamp(1e-12, 1 - 1e-12 if self.findings else None)
        if not self.findings:
            return float(nn.functional.nll_loss(sure_NK.log(), labels_N))
        known = labels_N != UNKNOWN
        return float(nn.functional.binary_cross_entropy(sure_NK[known], labels_N[known].to(sure_NK.dtype)))


def read_images(images: ResidentImages, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """Stored images (B, H, W, C) uint8 on the device."""
    return torch.from_numpy(np.ascontiguousarray(images.images[rows])).to(device)
