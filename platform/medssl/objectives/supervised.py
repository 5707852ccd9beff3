"""Supervised pretraining: cross-entropy of a linear classifier on another dataset's labels, the baseline of papers 000, 002, 004.

There it is ImageNet's labels and the weights are downloaded; here it is trained like every other method, so that a study can
compare label-driven with self-supervised starts on one and the same set of images.

Decided here: both views of an image are classified, as the other methods see two views of each; mean over the 2N views of the
global batch. The classifier is left behind, as a projector is.

Shapes: B images of this rank, N images of the global batch, E feature width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.collectives import all_reduce, world_size
from medssl.objectives.common import Encoder, MethodParams, Objective, full_precision


class SupervisedParams(MethodParams):
    """Parameters of supervised pretraining."""

    takes_labels: ClassVar[bool] = True
    name: Literal["supervised"] = "supervised"
    """Which objective this is."""
    classes: tuple[str, ...] | None = None
    """Labels that are told apart, images of others are not shown; null takes all that the images shown have."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""


@full_precision
def supervised_loss(logits1: Tensor, logits2: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of this rank's (B, K) logits of two views with (B,) int64 labels, mean over the 2N views of the global
    batch; a scalar, the same on every rank.
    """
    both = torch.cat([logits1, logits2])
    total = F.cross_entropy(both, labels.repeat(2), label_smoothing=label_smoothing, reduction="sum")
    return all_reduce(total) / (len(both) * world_size())


class Supervised(Objective):
    """A linear classifier on the encoder."""

    Params = SupervisedParams

    def __init__(self, params: SupervisedParams, feature_width: int) -> None:
        """Raises ValueError where `params.classes` is not known yet."""
        super().__init__(params, feature_width)
        if params.classes is None:
            raise ValueError("supervised pretraining: the plan must name the classes")
        self.label_smoothing = params.label_smoothing
        self.classifier = nn.Linear(feature_width, len(params.classes))

    def forward(self, encoder: Encoder, views: Sequence[Tensor], labels_B: Tensor | None = None) -> dict[str, Tensor]:
        """See :class:`Objective`; `labels_B` are int64 places in `classes`. `accuracy` is of the first view, this rank's."""
        if labels_B is None:
            raise ValueError("supervised pretraining needs labels")
        features1_BE, features2_BE = encoder(views[0]), encoder(views[1])
        logits1_BK, logits2_BK = self.classifier(features1_BE), self.classifier(features2_BE)
        loss = supervised_loss(logits1_BK, logits2_BK, labels_B, self.label_smoothing)
        right = (logits1_BK.detach().argmax(1) == labels_B).double().mean()
        accuracy = all_reduce(right) / world_size()
        return {"loss": loss, "accuracy": accuracy, "features": features1_BE.detach(), "features2": features2_BE.detach()}
