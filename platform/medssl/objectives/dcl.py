"""DCL, decoupled contrastive learning: NT-Xent without the positive pair in the denominator.

Paper: Yeh et al., Decoupled Contrastive Learning, ECCV 2022. Paper 001 uses it at small batches, where the coupling of
NT-Xent weakens the gradient.
Code followed: the paper's equation 6 without weights; agrees with lightly's `DCLLoss`.

Decided here: negatives are the 2N - 2 views of other images, of both views together in one log-sum-exp; mean over both
directions and the global batch.

Shapes: B rows of this rank, N rows of the global batch, D projection width, E feature width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from medssl.collectives import all_reduce, world_size
from medssl.networks.heads import Widths, build_head
from medssl.objectives.common import MethodParams, TwoViewObjective, full_precision, pairwise_similarities


class DCLParams(MethodParams):
    """Parameters of decoupled contrastive learning (Yeh et al. 2022)."""

    name: Literal["dcl"] = "dcl"
    """Which objective this is."""
    temperature: float = Field(0.1, gt=0)
    """Divides the cosine similarities."""
    projector: Widths = (2048, 128)
    """Widths of the head's layers."""
    batch_norm: bool = True
    """Batch norm after each layer of the head."""


@full_precision
def dcl_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """DCL of this rank's (B, D) embeddings of two views, mean over the 2N anchors of the global batch; a scalar.

    Any float dtype, computed in float32 or wider; embeddings are normalised here. Every rank gets the same loss. It can be
    negative. Needs two images in the global batch.
    """
    logits, partner = pairwise_similarities(z1, z2, temperature)
    positive = logits.gather(1, partner[:, None])[:, 0]
    others = logits.scatter(1, partner[:, None], float("-inf"))
    return all_reduce((others.logsumexp(1) - positive).sum()) / (2 * z1.shape[0] * world_size())


class DCL(TwoViewObjective):
    """Decoupled contrastive learning with its projection head (SimCLR's)."""

    Params = DCLParams

    def __init__(self, params: DCLParams, feature_width: int) -> None:
        super().__init__(params, feature_width)
        self.temperature = params.temperature
        self.projector = build_head(
            feature_width, params.projector, batch_norm=params.batch_norm, last_norm="affine" if params.batch_norm else "none"
        )

    def terms(self, features1_BE: Tensor, features2_BE: Tensor) -> dict[str, Tensor]:
        """(B, E) features of each view -> the loss."""
        return {"loss": dcl_loss(self.projector(features1_BE), self.projector(features2_BE), self.temperature)}
