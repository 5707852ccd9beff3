"""Barlow Twins: make the cross-correlation of two views' embeddings the identity.

Paper: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021.
Code followed: the authors' `main.py` (facebookresearch/barlowtwins). Sparse Barlow Twins: paper 000, which adds the L2,1 norm of
the projector's last layer.

Decided here: no bias in the projector (the authors' code; paper 000's has them), so that batch norm takes nothing away; the
gather's backward is whole, where the authors' all-reduce leaves 1/W of the gradient. LARS hides that on weights, not on
biases: a learning rate of biases copied from a run of theirs on W processes does W times as much here.

Shapes: B rows of this rank, N rows of the global batch, D projection width, E feature width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.collectives import all_gather, all_reduce, batch_normalise, world_size
from medssl.networks.heads import Widths, build_head
from medssl.objectives.common import MethodParams, TwoViewObjective, full_precision


class BarlowTwinsParams(MethodParams):
    """Parameters of Barlow Twins (Zbontar et al. 2021)."""

    name: Literal["barlow_twins"] = "barlow_twins"
    """Which objective this is."""
    lambda_: float = Field(0.0051, gt=0)
    """Weight of the off-diagonal (redundancy reduction) term; 0.0051 in the authors' code, 1/8192 in paper 000."""
    alpha: float = Field(0.0, ge=0)
    """Weight of the sparsity term on the projector's last layer; 0.01 in paper 000 (sparse Barlow Twins), 0 is none."""
    projector: Widths = (8192, 8192, 8192)
    """Widths of the projector's linear layers; the last one is D."""


class BarlowTwinsTerms(NamedTuple):
    """The two terms, scalars: loss = invariance + lambda * redundancy."""

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


@full_precision
def barlow_twins_terms(z1_BD: Tensor, z2_BD: Tensor, eps: float = 1e-5) -> BarlowTwinsTerms:
    """Both terms of this rank's (B, D) embeddings of two views, over the global batch.

    Embeddings are normalised without affine, the statistics spanning all ranks. Computed in at least float32 whatever comes
    in. Every rank gets the same global values (see :mod:`medssl.collectives` for the gradient's convention).
    """
    z1_hat_BD, z2_hat_BD = batch_normalise(torch.cat([z1_BD, z2_BD], 1), eps).chunk(2, 1)
    diagonal_D, squares = correlation_sums(z1_hat_BD, z2_hat_BD)
    return BarlowTwinsTerms(invariance_term(diagonal_D), redundancy_term(diagonal_D, squares))


def barlow_twins_loss(z1: Tensor, z2: Tensor, lambda_: float, eps: float = 1e-5) -> Tensor:
    """Barlow Twins loss of (B, D) embeddings of two views, a scalar; see :func:`barlow_twins_terms`."""
    terms = barlow_twins_terms(z1, z2, eps)
    loss: Tensor = terms.invariance + lambda_ * terms.redundancy
    return loss


def sparsity_term(weight_DP: Tensor) -> Tensor:
    """L2,1 norm of a linear layer's weight (D outputs, P inputs): L2 over the outputs, summed over the inputs."""
    norms_P: Tensor = torch.linalg.vector_norm(weight_DP, dim=0)
    return norms_P.sum()


class BarlowTwins(TwoViewObjective):
    """Barlow Twins with its projector (linear layers without bias, batch norm and ReLU between them: the authors')."""

    Params = BarlowTwinsParams

    def __init__(self, params: BarlowTwinsParams, feature_width: int) -> None:
        super().__init__(params, feature_width)
        self.lambda_, self.alpha = params.lambda_, params.alpha
        self.projector = build_head(feature_width, params.projector)

    def terms(self, features1_BE: Tensor, features2_BE: Tensor) -> dict[str, Tensor]:
        """(B, E) features of each view -> the loss and its terms; with `alpha` the sparse Barlow Twins of paper 000."""
        terms = barlow_twins_terms(self.projector(features1_BE), self.projector(features2_BE))
        loss = terms.invariance + self.lambda_ * terms.redundancy
        if not self.alpha:
            return {"loss": loss, **terms._asdict()}
        last = self.projector[-1]
        assert isinstance(last, nn.Linear)
        sparsity = sparsity_term(last.weight)
        return {"loss": loss + self.alpha * sparsity, **terms._asdict(), "sparsity": sparsity}
