"""SimCLR: a view should be more like its partner than like any other image's views (NT-Xent).

Paper: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020; the head of three
layers from Big Self-Supervised Models (SimCLRv2), NeurIPS 2020. Paper 004 uses it before MICLe, with two images of a bag as
the two views.
Code followed: the authors' `objective.py` and `model_util.py` (google-research/simclr).

Decided here: mean over the 2N anchors of the global batch (the authors' two cross-entropies, added, are twice that); the
gather over ranks has the full backward; batch norm after the head's last layer too, as in the authors' code.

Shapes: B rows of this rank, N rows of the global batch, D projection width, E feature width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from medssl.collectives import all_reduce, world_size
from medssl.objectives.common import ContrastiveObjective, ContrastiveParams, full_precision, pairwise_similarities


class SimCLRParams(ContrastiveParams):
    """Parameters of SimCLR (Chen et al. 2020)."""

    name: Literal["simclr"] = "simclr"
    """Which objective this is."""


@full_precision
def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of this rank's (B, D) embeddings of two views, mean over the 2N anchors of the global batch; a scalar.

    Negatives of an anchor are the 2N - 2 views of other images. Any float dtype, computed in float32 or wider; embeddings are
    normalised here. Every rank gets the same loss.
    """
    logits, partner = pairwise_similarities(z1, z2, temperature)
    return all_reduce(F.cross_entropy(logits, partner, reduction="sum")) / (2 * z1.shape[0] * world_size())


class SimCLR(ContrastiveObjective):
    """SimCLR with its projection head."""

    Params = SimCLRParams
    loss = staticmethod(nt_xent_loss)
