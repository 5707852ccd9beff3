"""The k-nearest-neighbours probe: an image is named by the votes of the labelled images most like it. Nothing is trained.

Features are compared by cosine similarity. In the usual protocol (Wu et al., "Unsupervised Feature Learning via
Non-Parametric Instance Discrimination", CVPR 2018) a neighbour votes for its class with weight exp(similarity / 0.07).

Shapes: N images of the bank, Q queries, E feature width, K classes, F findings, B queries of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from medssl.metrics import UNKNOWN
from medssl.params import Params

_CHUNK_ENTRIES = 1 << 23
"""Similarities held at a time: 32 MiB."""


class KnnParams(Params):
    """Votes of the nearest labelled images."""

    k: int = Field(20, ge=1)
    """Neighbours that vote; 200 in paper 001. More than the rarest class has images drown it, which the report says."""
    weights: Literal["similarity", "uniform"] = "similarity"
    """similarity: a neighbour votes with weight exp(cosine / temperature). uniform: with weight 1."""
    temperature: float = Field(0.07, gt=0)
    """The smaller, the more the very nearest count; for weights similarity."""
    balanced: bool = True
    """Divides a class's votes by its number of labelled images, so that a class is not chosen for being common."""

    @property
    def bank_passes(self) -> int:
        """Augmented passes to embed: none, the labelled images are compared as they are."""
        return 0


def knn_scores(
    bank_NE: Tensor,
    labels_N: Tensor,
    queries_QE: Tensor,
    k: int,
    classes: int,
    *,
    weights: Literal["similarity", "uniform"] = "similarity",
    temperature: float = 0.07,
    balanced: bool = True,
    chunk: int | None = None,
) -> Tensor:
    """Vote shares (Q, K) in float32, each row summing to 1, from every query's k nearest images of the bank.

    Args:
        bank_NE: features of the labelled images, on the device to compute on. Lengths do not matter: all are normalised.
        labels_N: class indices.
        queries_QE: features of the images to name, on the same device.
        k: neighbours that vote. Of images equally like a query at the k-th place, any may be taken.
        classes: K; a class without images in the bank gets no votes.
        weights: similarity: a neighbour votes with weight exp(similarity / temperature). uniform: with weight 1.
        temperature: the smaller, the more the very nearest count.
        balanced: divides a class's votes by its number of images in the bank, so that a class is not chosen for being common.
        chunk: queries compared at a time; None takes as many as fit into 32 MiB. Changes memory, not the result.

    Raises:
        ValueError: shapes or values that do not fit, or features that are not finite.
    """
    _check(bank_NE, labels_N, queries_QE, k, classes)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature:g}: it must be above 0")
    labels_N = labels_N.long()
    bank_EN = normalize(bank_NE.float(), dim=1).T
    frequencies_K = torch.bincount(labels_N, minlength=classes).clamp(min=1) if balanced else None
    scores_QK = torch.empty(len(queries_QE), classes, device=bank_NE.device)
    size = max(1, _CHUNK_ENTRIES // len(bank_NE)) if chunk is None else chunk
    for start in range(0, len(queries_QE), size):
        queries_BE = normalize(queries_QE[start : start + size].float(), dim=1)
        similarities_Bk, neighbours_Bk = (queries_BE @ bank_EN).topk(k, dim=1)
        if weights == "uniform":
            votes_Bk = torch.ones_like(similarities_Bk)
        else:  # relative to the nearest, which changes no share and keeps a small temperature from overflowing
            votes_Bk = ((similarities_Bk - similarities_Bk[:, :1]) / temperature).exp()
        votes_BK = torch.zeros(len(queries_BE), classes, device=bank_NE.device)
        votes_BK.scatter_add_(1, labels_N[neighbours_Bk], votes_Bk)
        if frequencies_K is not None:
            votes_BK /= frequencies_K
        scores_QK[start : start + size] = votes_BK / votes_BK.sum(dim=1, keepdim=True)
    return scores_QK


def knn_finding_scores(
    bank_NE: Tensor,
    labels_NF: Tensor,
    queries_QE: Tensor,
    k: int,
    *,
    weights: Literal["similarity", "uniform"] = "similarity",
    temperature: float = 0.07,
    balanced: bool = True,
) -> Tensor:
    """Share (Q, F) of the votes that say a finding is there, from every query's k nearest of the images of which it is known.

    Args:
        labels_NF: 1 there, 0 not, UNKNOWN; see :func:`knn_scores` for the others.

    Raises:
        ValueError: as there; a finding is known of fewer than k images.
    """
    shares = []
    for f in range(labels_NF.shape[1]):
        known_N = labels_NF[:, f] != UNKNOWN
        found_Q2 = knn_scores(
            bank_NE[known_N], labels_NF[known_N, f], queries_QE, k, 2,
            weights=weights, temperature=temperature, balanced=balanced,
        )  # fmt: skip
        shares.append(found_Q2[:, 1])
    return torch.stack(shares, dim=1)


def largest_useful_k(labels_N: Tensor, classes: int) -> int:
    """Images of the rarest class that the bank has: with a larger k that class cannot fill a query's neighbourhood.

    Of findings the least of the images with one, and of those known to be without one.
    """
    if labels_N.ndim == 2:
        return min(largest_useful_k(label_N[label_N != UNKNOWN], 2) for label_N in labels_N.T)
    counts_K = torch.bincount(labels_N.long(), minlength=classes)
    return int(counts_K[counts_K > 0].min())


def k_warning(k: int, labels_N: Tensor, classes: Sequence[str]) -> str | None:
    """In words that k exceeds the number of images of the rarest class in the bank; None where it does not.

    Args:
        k: neighbours that vote.
        labels_N: class indices of the bank, or labels (N, F) of findings.
        classes: names of the K classes or F findings.
    """
    if labels_N.ndim == 2:
        named = ([f"no {name}", name] for name in classes)
        found = (k_warning(k, each_N[each_N != UNKNOWN], pair) for each_N, pair in zip(labels_N.T, named, strict=True))
        return next((warning for warning in found if warning is not None), None)
    most = largest_useful_k(labels_N, len(classes))
    if k <= most:
        return None
    counts = torch.bincount(labels_N.long(), minlength=len(classes)).tolist()
    images = f"{most} image" if most == 1 else f"{most} images"
    return (
        f"k is {k}, but class '{classes[counts.index(most)]}' has {images} in the bank: at least {k - most} of the {k} "
        f"neighbours are of other classes, however good the features are; use k {most} or less, or label more of it"
    )


def _check(bank_NE: Tensor, labels_N: Tensor, queries_QE: Tensor, k: int, classes: int) -> None:
    if bank_NE.ndim != 2 or labels_N.shape != bank_NE.shape[:1] or len(labels_N) == 0:
        shapes = f"bank {tuple(bank_NE.shape)} and labels {tuple(labels_N.shape)}"
        raise ValueError(f"{shapes}: expected (N, E) and (N,) with at least one image")
    if queries_QE.ndim != 2 or queries_QE.shape[1] != bank_NE.shape[1]:
        raise ValueError(f"queries {tuple(queries_QE.shape)} do not fit the bank {tuple(bank_NE.shape)}")
    if not 1 <= k <= len(labels_N):
        raise ValueError(f"k is {k}: the bank of {len(labels_N)} images allows 1 to {len(labels_N)}")
    if int(labels_N.min()) < 0 or int(labels_N.max()) >= classes:
        raise ValueError(f"labels lie in {int(labels_N.min())}..{int(labels_N.max())}: expected 0..{classes - 1}")
    for name, values in (("bank", bank_NE), ("queries", queries_QE)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"features of the {name} hold NaN or infinite values")
