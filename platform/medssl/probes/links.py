"""Between logits and labels, for probes and fine-tuning alike: the probabilities, and what each image counts for each finding.

Labels are of classes (N,) or of findings (N, F), as in `medssl.metrics`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medssl.metrics import UNKNOWN


def activated(logits_K: Tensor, *, findings: bool) -> Tensor:
    """Probabilities (..., K): of classes by softmax, of findings by a sigmoid each."""
    return torch.sigmoid(logits_K) if findings else torch.softmax(logits_K, dim=-1)


def finding_weights(labels_NF: Tensor, kind: Literal["balanced", "none"]) -> Tensor:
    """Weight (N, F) of each image in the loss of each finding: 0 where it is not known, with mean 1 over the images.

    balanced: the images with a finding weigh as much together as those without it.
    """
    known_NF = labels_NF != UNKNOWN
    if kind == "none":
        return known_NF * (len(labels_NF) / known_NF.sum(dim=0).clamp(min=1))
    sides = torch.stack([labels_NF == 0, labels_NF == 1]).to(torch.float32)  # (2, N, F)
    counts = sides.sum(dim=1, keepdim=True)
    share = 1 / ((counts > 0).sum(dim=0).clamp(min=1) * counts.clamp(min=1))  # of every side that there is the same
    return len(labels_NF) * (sides * share).sum(dim=0)


def check_labels(labels_N: Tensor, classes: int) -> None:
    """ValueError unless these are indices (N,) of `classes` classes, or labels (N, F) of so many findings."""
    if labels_N.ndim > 2 or (labels_N.ndim == 2 and labels_N.shape[1] != classes):
        raise ValueError(f"labels {tuple(labels_N.shape)}: expected (N,), or (N, {classes}) of findings")
    least, most = (UNKNOWN, 1) if labels_N.ndim == 2 else (0, classes - 1)
    if int(labels_N.min()) < least or int(labels_N.max()) > most:
        raise ValueError(f"labels lie in {int(labels_N.min())}..{int(labels_N.max())}: expected {least}..{most}")
