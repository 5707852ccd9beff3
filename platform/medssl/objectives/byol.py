"""BYOL: predict a slowly moving copy of oneself.

Paper: Grill et al., Bootstrap Your Own Latent, NeurIPS 2020.
Code followed: the authors' `byol_experiment.py` and `utils/schedules.py` (deepmind-research/byol).

Decided here, as in the code: the target is an exponential moving average of parameters, not of buffers; it runs in train
mode and so keeps batch-norm statistics of its own; it moves after the optimiser's step, with
tau = 1 - (1 - tau0) (cos(pi k / K) + 1) / 2 at step k of K. Both directions are added, not averaged.

Shapes: B rows of this rank, D projection width, E feature width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.networks.heads import Widths, build_head
from medssl.objectives.common import Clock, Encoder, MethodParams, Objective, cosine, full_precision, mean_over_ranks


class BYOLParams(MethodParams):
    """Parameters of BYOL (Grill et al. 2020)."""

    name: Literal["byol"] = "byol"
    """Which objective this is."""
    projector: Widths = (4096, 256)
    """Widths of the projector's layers."""
    predictor_width: int = Field(4096, ge=1)
    """Hidden width of the predictor."""
    target_momentum: float = Field(0.99, ge=0, le=1)
    """tau0 of the target's moving average; 0.97, 0.99, 0.99, 0.996 for 40, 100, 300, 1000 epochs in the paper."""


def target_momentum(base: float, step: int, total_steps: int) -> float:
    """tau at `step` (from 0): from `base` up to 1 on half a cosine."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


@full_precision
def byol_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos, of each view's prediction (B, D) from the other's target projection
    (B, D), both directions added, mean over the global batch; a scalar between 0 and 8. No gradient reaches `z1` and `z2`.
    Any float dtype, computed in float32 or wider.
    """
    agreement = cosine(p1, z2.detach()) + cosine(p2, z1.detach())
    return mean_over_ranks(4 - 2 * agreement.mean())


class BYOL(Objective):
    """BYOL with projector, predictor, and the target's encoder and projector."""

    Params = BYOLParams

    target_encoder: nn.Module

    def __init__(self, params: BYOLParams, feature_width: int) -> None:
        super().__init__(params, feature_width)
        width = params.projector[-1]
        self.base_momentum = params.target_momentum
        self.projector = build_head(feature_width, params.projector)
        self.predictor = build_head(width, (params.predictor_width, width))

    def attach(self, encoder: nn.Module) -> None:
        """The target begins as a copy."""
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, encoder: nn.Module, clock: Clock) -> None:
        """Moves the target."""
        step = 1 - target_momentum(self.base_momentum, clock.done, clock.total)
        for online, target in ((encoder, self.target_encoder), (self.projector, self.target_projector)):
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), step)

    def forward(self, encoder: Encoder, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """See :class:`Objective`."""
        features_BE = [encoder(view) for view in views[:2]]
        p1_BD, p2_BD = (self.predictor(self.projector(features)) for features in features_BE)
        with torch.no_grad():
            z1_BD, z2_BD = (self.target_projector(self.target_encoder(view)) for view in views[:2])
        loss = byol_loss(p1_BD, p2_BD, z1_BD, z2_BD)
        return {"loss": loss, "features": features_BE[0].detach(), "features2": features_BE[1].detach()}
