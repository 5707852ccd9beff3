"""SimSiam: predict one view's projection from the other's, without gradient through the target.

Paper: Chen & He, Exploring Simple Siamese Representation Learning, CVPR 2021.
Code followed: the authors' `simsiam/builder.py` and `main_simsiam.py` (facebookresearch/simsiam).

Decided here: the projector's last batch norm has no weight and bias, as in the code; the option of a predictor whose
learning rate stays constant is on by default, as in the code.

Shapes: B rows of this rank, D projection width, E feature width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from medssl.networks.heads import Widths, build_head
from medssl.objectives.common import MethodParams, TwoViewObjective, cosine, full_precision, mean_over_ranks


class SimSiamParams(MethodParams):
    """Parameters of SimSiam (Chen & He 2021)."""

    name: Literal["simsiam"] = "simsiam"
    """Which objective this is."""
    projector: Widths = (2048, 2048, 2048)
    """Widths of the projector's layers; paper 001 has two, the last one 512."""
    predictor_width: int = Field(512, ge=1)
    """Hidden width of the predictor; a quarter of the projector's output in the paper."""
    constant_predictor_rate: bool = True
    """The schedule leaves the predictor's learning rate at its peak."""


@full_precision
def simsiam_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Negative cosine of each view's prediction (B, D) with the other's projection (B, D), mean over both directions and the
    global batch; a scalar between -1 and 1. No gradient reaches `z1` and `z2`. Any float dtype, computed in float32 or wider.
    """
    agreement = cosine(p1, z2.detach()) + cosine(p2, z1.detach())
    return mean_over_ranks(-agreement.mean() / 2)


class SimSiam(TwoViewObjective):
    """SimSiam with projector and predictor."""

    Params = SimSiamParams

    def __init__(self, params: SimSiamParams, feature_width: int) -> None:
        super().__init__(params, feature_width)
        width = params.projector[-1]
        self.constant_predictor_rate = params.constant_predictor_rate
        self.projector = build_head(feature_width, params.projector, last_norm="plain")
        self.predictor = build_head(width, (params.predictor_width, width), last_bias=True)

    def constant_rate(self) -> Iterator[nn.Parameter]:
        """The predictor's parameters, where so asked."""
        return self.predictor.parameters() if self.constant_predictor_rate else iter(())

    def terms(self, features1_BE: Tensor, features2_BE: Tensor) -> dict[str, Tensor]:
        """(B, E) features of each view -> the loss."""
        z1_BD, z2_BD = self.projector(features1_BE), self.projector(features2_BE)
        return {"loss": simsiam_loss(self.predictor(z1_BD), self.predictor(z2_BD), z1_BD, z2_BD)}
