"""Barlow Twins: make the cross-correlation of two views' embeddings the identity.

Paper: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021.
Code followed: the authors' `main.py` (facebookresearch/barlowtwins).

Shapes: B rows of this rank, N rows of the global batch, D projection width, E feature width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.collectives import all_gather, all_reduce, batch_normalise, world_size
from medssl.params import Params


class BarlowTwinsParams(Params):
    """Parameters of Barlow Twins (Zbontar et al. 2021)."""

    name: Literal["barlow_twins"] = "barlow_twins"
    """Which objective this is."""
    lambda_: float = Field(0.0051, gt=0)
    """Weight of the off-diagonal (redundancy reduction) term; 0.0051 in the authors' code, 1/8192 in paper 000."""
    projector: tuple[int, ...] = Field((8192, 8192, 8192), min_length=1)
    """Widths of the projector's linear layers; the last one is D."""


class BarlowTwinsLoss(NamedTuple):
    """The loss and its two terms, scalars: loss = invariance + lambda * redundancy."""

    loss: Tensor
    invariance: Tensor
    redundancy: Tensor


def correlation_sums(z1_BD: Tensor, z2_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal (D,) and sum of all squared entries () of the D x D cross-correlation C = Z1^T Z2 / N.

    Takes this rank's rows of embeddings normalised over the global batch. Where N < D neither C nor its gradient is formed:
    the sum of squares of C equals sum((Z1 Z1^T) * (Z2 Z2^T)) / N^2, of which each rank does its rows.
    """
    rows = z1_BD.shape[0] * world_size()
    diagonal_D = (z1_BD * z2_BD).sum(0) / rows
    if rows >= z1_BD.shape[1]:
        squares = (all_reduce(z1_BD.T @ z2_BD) / rows).square().sum()
        return all_reduce(diagonal_D), squares
    z1_ND, z2_ND = all_gather(torch.cat([z1_BD, z2_BD], 1)).chunk(2, 1)
    squares = ((z1_BD @ z1_ND.T) * (z2_BD @ z2_ND.T)).sum() / rows**2
    total = all_reduce(torch.cat([diagonal_D, squares[None]]))
    return total[:-1], total[-1]


def invariance_term(diagonal_D: Tensor) -> Tensor:
    """Sum over the diagonal of (1 - C_ii)^2: the two views of an image should agree."""
    return (diagonal_D - 1).square().sum()


def redundancy_term(diagonal_D: Tensor, squares: Tensor) -> Tensor:
    """Sum of squares off the diagonal: different features should not say the same."""
    return squares - diagonal_D.square().sum()


def barlow_twins_loss(z1_BD: Tensor, z2_BD: Tensor, lambda_: float, eps: float = 1e-5) -> BarlowTwinsLoss:
    """Barlow Twins loss of this rank's (B, D) embeddings of two views, over the global batch.

    Embeddings are normalised without affine, the statistics spanning all ranks. Computed in at least float32 whatever comes
    in. Every rank gets the same global loss (see :mod:`medssl.collectives` for the gradient's convention).
    """
    accurate = torch.promote_types(z1_BD.dtype, torch.float32)
    with torch.autocast(z1_BD.device.type, enabled=False):
        both = torch.cat([z1_BD.to(accurate), z2_BD.to(accurate)], 1)
        z1_hat_BD, z2_hat_BD = batch_normalise(both, eps).chunk(2, 1)
        diagonal_D, squares = correlation_sums(z1_hat_BD, z2_hat_BD)
        invariance, redundancy = invariance_term(diagonal_D), redundancy_term(diagonal_D, squares)
        return BarlowTwinsLoss(invariance + lambda_ * redundancy, invariance, redundancy)


def build_projector(widths: tuple[int, ...], feature_width: int) -> nn.Sequential:
    """Linear layers without bias, batch norm and ReLU between them (the authors' projector)."""
    layers: list[nn.Module] = []
    width = feature_width
    for position, out in enumerate(widths):
        layers.append(nn.Linear(width, out, bias=False))
        if position < len(widths) - 1:
            layers += [nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        width = out
    return nn.Sequential(*layers)


class BarlowTwins(nn.Module):
    """Barlow Twins with its projector: features of two views -> loss and terms."""

    def __init__(self, params: BarlowTwinsParams, feature_width: int) -> None:
        super().__init__()
        self.lambda_ = params.lambda_
        self.projector = build_projector(params.projector, feature_width)

    def forward(self, features1_BE: Tensor, features2_BE: Tensor) -> BarlowTwinsLoss:
        """(B, E) features of each view -> the global loss and its terms."""
        return barlow_twins_loss(self.projector(features1_BE), self.projector(features2_BE), self.lambda_)
