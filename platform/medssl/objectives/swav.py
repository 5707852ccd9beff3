"""SwAV: each view predicts how the other one is assigned to prototypes, the assignments balanced over the batch.

Paper: Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS 2020.
Code followed: the authors' `main_swav.py` and `resnet50.py` (facebookresearch/swav).

As in the code: assignments of the two large views only, every other view predicts them; prototypes without bias, scaled to
unit length before each step, and left out of the optimiser for the first steps; a queue of past projections, used once full;
views of one size go through the encoder together (batch norm sees both). Sinkhorn runs in float32 or wider.
Decided here: the queue holds the projections of the global batch on every rank, so that a checkpoint of one rank has it all
and the number of ranks changes nothing; each rank brings its share of the rows to the balancing.

Shapes: B rows of this rank, N rows of the global batch, V views, D projection width, E feature width, K prototypes, L queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.collectives import all_gather, all_reduce, largest_over_ranks, rank_index, world_size
from medssl.networks.heads import Widths, build_head
from medssl.objectives.common import Clock, Encoder, MethodParams, Objective, full_precision, mean_over_ranks


class SwAVParams(MethodParams):
    """Parameters of SwAV (Caron et al. 2020). Small crops are a matter of the views."""

    multi_crop = True
    name: Literal["swav"] = "swav"
    """Which objective this is."""
    temperature: float = Field(0.1, gt=0)
    """Divides the scores before the softmax."""
    epsilon: float = Field(0.05, gt=0)
    """Entropy regularisation of the Sinkhorn assignment."""
    sinkhorn_iterations: int = Field(3, ge=1)
    """Rounds of balancing."""
    prototypes: int = Field(3000, ge=2)
    """Number of prototypes."""
    projector: Widths = (2048, 128)
    """Widths of the projection head's layers."""
    freeze_prototypes_steps: int = Field(313, ge=0)
    """First steps in which the prototypes are not trained."""
    queue: int = Field(0, ge=0)
    """Past projections that join the balancing (3840 for small batches); 0 is none, else a multiple of the batch."""
    queue_start_epoch: int = Field(15, ge=0)
    """Epoch from which the queue fills."""

    def check(self, *, batch_size: int) -> None:
        """The queue takes whole batches."""
        if self.queue % batch_size:
            near = max(1, round(self.queue / batch_size)) * batch_size
            raise ValueError(
                f"objective.queue {self.queue} is not a multiple of batch_size {batch_size}: use {near}, or 0 for none"
            )


@full_precision
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments (B, K) of this rank's rows to prototypes: rows sum to one, and over the global batch every prototype gets
    about the same share. No gradient.

    The exponentials are taken after the largest score of all ranks is subtracted, which changes nothing but overflow.
    """
    with torch.no_grad():
        largest = largest_over_ranks(scores.max())
        q_BK = torch.exp((scores - largest) / epsilon)
        rows, prototypes = q_BK.shape[0] * world_size(), q_BK.shape[1]
        q_BK /= all_reduce(q_BK.sum())
        for _ in range(iterations):
            q_BK /= all_reduce(q_BK.sum(0)) * prototypes
            q_BK /= q_BK.sum(1, keepdim=True) * rows
        return q_BK * rows


@full_precision
def swav_loss(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of one view's scores (B, K) with another's assignments (B, K), mean over the global batch; a scalar.

    Any float dtype, computed in float32 or wider. No gradient reaches the assignments.
    """
    log_share_BK = F.log_softmax(scores / temperature, 1)
    return mean_over_ranks(-(assignments.detach() * log_share_BK).sum(1).mean())


class SwAV(Objective):
    """SwAV with projection head, prototypes and queue."""

    Params = SwAVParams

    queue_2LD: Tensor

    def __init__(self, params: SwAVParams, feature_width: int) -> None:
        super().__init__(params, feature_width)
        self.params = params
        width = params.projector[-1]
        self.projector = build_head(feature_width, params.projector, last_bias=True)
        self.prototypes = nn.Linear(width, params.prototypes, bias=False)
        self.register_buffer("queue_2LD", torch.zeros(2, params.queue, width))
        self._queue_steps = 0

    @torch.no_grad()
    def before_step(self, clock: Clock) -> None:
        """Prototypes back to unit length; how full the queue is follows from the step."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        self._queue_steps = clock.done - self.params.queue_start_epoch * clock.per_epoch

    def after_backward(self, clock: Clock) -> None:
        """Leaves the prototypes out of the first steps."""
        if clock.done < self.params.freeze_prototypes_steps:
            self.prototypes.weight.grad = None

    def forward(self, encoder: Encoder, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """See :class:`Objective`; the first two views are the large ones."""
        features = [encoder(torch.cat(list(group))) for _, group in groupby(views, key=lambda view: view.shape[-1])]
        rows = len(views[0])
        projected = self.projector(torch.cat(features))
        with torch.autocast(projected.device.type, enabled=False):
            z = F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=1)
            scores = list(self.prototypes(z).split(rows))
            loss = self._swapped(scores, z[: 2 * rows].detach())
        large = features[0].detach()
        return {"loss": loss, "features": large[:rows], "features2": large[rows : 2 * rows]}

    def _swapped(self, scores: Sequence[Tensor], large: Tensor) -> Tensor:
        """Every view against the assignments of each large view but its own; mean over views, then over large views."""
        params, total = self.params, scores[0].new_zeros(())
        filled = self._queue_steps * len(scores[0]) * world_size()
        for position, z_BD in enumerate(large.chunk(2)):
            own = scores[position].detach()
            if params.queue and filled >= params.queue:
                own = torch.cat([self._queued(position) @ self.prototypes.weight.detach().T, own])
            if params.queue and filled >= 0:
                self._enqueue(position, z_BD)
            assigned = sinkhorn(own, params.epsilon, params.sinkhorn_iterations)[-len(z_BD) :]
            others = [score for number, score in enumerate(scores) if number != position]
            total = total + torch.stack([swav_loss(score, assigned, params.temperature) for score in others]).mean()
        return total / 2

    def _queued(self, position: int) -> Tensor:
        """This rank's share of the queue."""
        share = self.params.queue // world_size()
        return self.queue_2LD[position, rank_index() * share : (rank_index() + 1) * share]

    @torch.no_grad()
    def _enqueue(self, position: int, z_BD: Tensor) -> None:
        """The newest projections of all ranks in front, the oldest fall out."""
        newest = torch.cat([all_gather(z_BD).to(self.queue_2LD.dtype), self.queue_2LD[position]])
        self.queue_2LD[position] = newest[: self.params.queue]
