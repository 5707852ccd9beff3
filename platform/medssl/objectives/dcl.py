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

from torch import Tensor

from medssl.collectives import all_reduce, world_size
from medssl.objectives.common import ContrastiveObjective, ContrastiveParams, full_precision, pairwise_similarities


class DCLParams(ContrastiveParams):
    """Parameters of decoupled contrastive learning (Yeh et al. 2022)."""

    name: Literal["dcl"] = "dcl"
    """Which objective this is."""


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


class DCL(ContrastiveObjective):
    """Decoupled contrastive learning with its projection head (SimCLR's)."""

    Params = DCLParams
    loss = staticmethod(dcl_loss)
