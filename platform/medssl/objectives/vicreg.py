"""VICReg: views agree, every feature keeps its variance, features do not covary.

Paper: Bardes, Ponce, LeCun, VICReg: Variance-Invariance-Covariance Regularization, ICLR 2022.
Code followed: the authors' `main_vicreg.py` (facebookresearch/vicreg).

Where they differ this file follows the code: each view's variance term is halved; both views' covariance terms are added
whole. Variance and covariance span the global batch (unbiased, divided by N - 1), eps 1e-4 under the root.

Shapes: B rows of this rank, N rows of the global batch, D projection width, E feature width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from medssl.collectives import all_gather
from medssl.networks.heads import Widths, build_head
from medssl.objectives.common import MethodParams, TwoViewObjective, full_precision, mean_over_ranks

_EPS = 1e-4


class VICRegParams(MethodParams):
    """Parameters of VICReg (Bardes et al. 2022)."""

    name: Literal["vicreg"] = "vicreg"
    """Which objective this is."""
    invariance: float = Field(25.0, ge=0)
    """Weight of the mean squared difference of the views."""
    variance: float = Field(25.0, ge=0)
    """Weight of the hinge that keeps each feature's standard deviation at 1 or more."""
    covariance: float = Field(1.0, ge=0)
    """Weight of the squared covariances between features."""
    projector: Widths = (8192, 8192, 8192)
    """Widths of the projector's layers; paper 001 has two, the last one 4096."""


class VICRegTerms(NamedTuple):
    """The three unweighted terms, scalars."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def variance_term(z_ND: Tensor) -> Tensor:
    """Mean hinge of 1 minus the standard deviation of each feature."""
    return F.relu(1 - torch.sqrt(z_ND.var(0) + _EPS)).mean()


def covariance_term(z_ND: Tensor) -> Tensor:
    """Sum of squared covariances off the diagonal, over D. Where N < D the D x D matrix is never formed: its sum of squares
    is that of the N x N Gram matrix of the centred rows.
    """
    rows, width = z_ND.shape
    centred_ND = z_ND - z_ND.mean(0)
    table = centred_ND @ centred_ND.T if rows < width else centred_ND.T @ centred_ND
    return (table.square().sum() / (rows - 1) ** 2 - z_ND.var(0).square().sum()) / width


@full_precision
def vicreg_terms(z1_BD: Tensor, z2_BD: Tensor) -> VICRegTerms:
    """The terms of this rank's (B, D) embeddings over the global batch, the same on every rank."""
    z1_ND, z2_ND = all_gather(torch.cat([z1_BD, z2_BD], 1)).chunk(2, 1)
    return VICRegTerms(
        mean_over_ranks(F.mse_loss(z1_BD, z2_BD)),
        (variance_term(z1_ND) + variance_term(z2_ND)) / 2,
        covariance_term(z1_ND) + covariance_term(z2_ND),
    )


def vicreg_loss(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """VICReg of (B, D) embeddings of two views with the weights of its terms (25, 25, 1 in the paper); a scalar.

    Any float dtype, computed in float32 or wider. Needs two images in the global batch.
    """
    terms = vicreg_terms(z1, z2)
    return invariance * terms.invariance + variance * terms.variance + covariance * terms.covariance


class VICReg(TwoViewObjective):
    """VICReg with its projector."""

    Params = VICRegParams

    def __init__(self, params: VICRegParams, feature_width: int) -> None:
        super().__init__(params, feature_width)
        self.weights = (params.invariance, params.variance, params.covariance)
        self.projector = build_head(feature_width, params.projector)

    def terms(self, features1_BE: Tensor, features2_BE: Tensor) -> dict[str, Tensor]:
        """(B, E) features of each view -> the loss and its unweighted terms."""
        terms = vicreg_terms(self.projector(features1_BE), self.projector(features2_BE))
        loss = sum((w * term for w, term in zip(self.weights, terms, strict=True)), torch.zeros_like(terms.invariance))
        return {"loss": loss, **terms._asdict()}
