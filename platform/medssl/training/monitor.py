"""Watching a pretraining learn: kNN accuracy of the encoder as it is, on labelled images that it never learns labels from.

Training images with labels are the bank, validation images the queries. What is measured steers nothing, and test images
are not looked at.

Shapes: N images of the bank, Q queries, E feature width, K classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medssl.datasets.draws import finding_draw, label_draw
from medssl.metrics import UNKNOWN, accuracy, balanced_accuracy
from medssl.networks.encoder import EncoderParams
from medssl.probes.knn import k_warning, knn_finding_scores, knn_scores, largest_useful_k
from medssl.training.feed import ResidentImages
from medssl.views import eval_view

if TYPE_CHECKING:
    import pandas as pd

MOST_BANK, MOST_QUERIES = 2000, 1000
"""Images that are watched: enough for a curve, embedded in seconds."""
_NEIGHBOURS = 20
_BATCH = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """The labelled images that a monitor looks at: row numbers and class indices, as plain values that pickle."""

    bank_rows: list[int]
    bank_labels: list[Any]
    """Class indices, or lists of F labels of findings."""
    query_rows: list[int]
    query_labels: list[Any]
    classes: list[str]
    """Names of the classes or findings."""

    @classmethod
    def of_index(
        cls, index: pd.DataFrame, classes: list[str], *, seed: int, bank_split: str = "train", query_split: str = "val"
    ) -> Watched:
        """At most 2,000 labelled training images and 1,000 labelled validation images, stratified, the same for a seed.

        Args:
            index: `Dataset.index()`, with columns image_id, label, split.
            classes: class names; a class index is a position here.
            seed: the pretraining seed.
            bank_split: split of the bank.
            query_split: split of the queries.

        Raises:
            DataError: a split has no labelled image.
        """
        bank_rows, bank_labels = _drawn(index, classes, bank_split, MOST_BANK, seed)
        query_rows, query_labels = _drawn(index, classes, query_split, MOST_QUERIES, seed)
        return cls(bank_rows, bank_labels, query_rows, query_labels, list(classes))


def _drawn(index: pd.DataFrame, classes: list[str], split: str, most: int, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers and class indices of the watched images of one split."""
    labelled = int((index["label"].notna() & (index["split"] == split)).sum())
    wanted = min(labelled, max(most, len(classes)))  # a draw holds an image of each class
    rows = label_draw(index, labels=wanted or None, draw=seed, split=split)
    return rows.tolist(), [classes.index(str(name)) for name in index["label"].to_numpy()[rows]]


def watch_findings(
    index: pd.DataFrame, labels_NF: NDArray[np.int64], names: list[str], *, seed: int, bank_split: str = "train",
    query_split: str = "val",
) -> Watched:  # fmt: skip
    """The same of findings, by plain draws among the images of which one is known; `labels_NF` are of the whole index."""
    parts: list[Any] = []
    for split, most in ((bank_split, MOST_BANK), (query_split, MOST_QUERIES)):
        known_N = (index["split"] == split).to_numpy() & (labels_NF != UNKNOWN).any(axis=1)
        rows = finding_draw(index, known_N, labels=min(int(known_N.sum()), most) or None, draw=seed)
        parts += [rows.tolist(), labels_NF[rows].tolist()]
    bank_rows, bank_labels, query_rows, query_labels = parts
    return Watched(bank_rows, bank_labels, query_rows, query_labels, list(names))


class KnnMonitor:
    """The `monitor` of :func:`medssl.training.loop.pretrain`: kNN accuracies of an encoder in evaluation mode."""

    def __init__(
        self, images: ResidentImages, encoder: EncoderParams, watched: Watched, device: torch.device, *, k: int = _NEIGHBOURS
    ) -> None:
        """`k` neighbours vote, but never more than the rarest class has images in the bank."""
        self._images, self._encoder, self._watched, self._device = images, encoder, watched, device
        self._labels_N = torch.tensor(watched.bank_labels, device=device)
        self.k = min(k, largest_useful_k(self._labels_N, len(watched.classes)))
        self.note = ""
        """The latest measurement in a few words; empty before the first."""
        warning = k_warning(k, self._labels_N, watched.classes)
        if warning is not None:
            logger.warning("kNN of the pretraining: %s. It takes k = %d", warning, self.k)

    @torch.no_grad()
    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """`knn_accuracy` and `knn_balanced_accuracy` on the queries, both from class-balanced votes.

        Empty where the features are not finite: the loop notices that itself, and a measurement must not end a training.
        """
        bank_NE, queries_QE = (self._embed(encoder, rows) for rows in (self._watched.bank_rows, self._watched.query_rows))
        if not bool(torch.isfinite(bank_NE).all() & torch.isfinite(queries_QE).all()):
            logger.warning("kNN of the pretraining: the encoder gives features that are not finite")
            return {}
        if self._labels_N.ndim == 2:
            votes_QK = knn_finding_scores(bank_NE, self._labels_N, queries_QE, self.k)
        else:
            votes_QK = knn_scores(bank_NE, self._labels_N, queries_QE, self.k, len(self._watched.classes))
        shares_QK, labels_Q = votes_QK.cpu().numpy(), np.array(self._watched.query_labels)
        found = {"knn_accuracy": accuracy(shares_QK, labels_Q), "knn_balanced_accuracy": balanced_accuracy(shares_QK, labels_Q)}
        self.note = f"kNN {found['knn_balanced_accuracy']:.3f} (balanced accuracy, validation)"
        return found

    def _embed(self, encoder: nn.Module, rows: list[int]) -> Tensor:
        """Features (len(rows), E) of whole images, on the device."""
        features = []
        for start in range(0, len(rows), _BATCH):
            stored_BHWC = torch.from_numpy(np.ascontiguousarray(self._images.images[rows[start : start + _BATCH]]))
            views_BCHW = eval_view(stored_BHWC.to(self._device), self._encoder)
            features.append(encoder(views_BCHW.contiguous(memory_format=torch.channels_last)).float())
        return torch.cat(features)
