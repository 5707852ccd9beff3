"""What one pretraining is: all that decides its numbers, resolved from a recipe or written by hand."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medssl.networks.encoder import EncoderParams
from medssl.objectives import ObjectiveParams
from medssl.optim import OptimiserParams, ScheduleParams
from medssl.params import Params
from medssl.views import ViewParams


class PretrainPlan(Params):
    """One pretraining run. Everything here changes the result; where it runs (device, workers' hosts) does not."""

    encoder: EncoderParams
    objective: ObjectiveParams
    optimiser: OptimiserParams
    schedule: ScheduleParams
    views: ViewParams
    epochs: int = Field(ge=1)
    """Passes over the images."""
    batch_size: int = Field(ge=2)
    """Images in one optimiser step over all workers together (each gives two views)."""
    seed: int = Field(ge=0)
    """Pretraining seed: initial weights, order, augmentation."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast (the loss stays in float32)."""
    gradient_clip: float | None = Field(None, gt=0)
    """Largest L2 norm of the gradient; null clips nothing."""
