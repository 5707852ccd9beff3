"""What one pretraining is: all that decides its numbers, resolved from a recipe or written by hand."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medssl.networks.encoder import EncoderParams
from medssl.networks.surgery import SurgeryParams
from medssl.objectives import ObjectiveParams
from medssl.optim import OptimiserParams, ScheduleParams
from medssl.params import Params
from medssl.views import ViewParams


class FurtherParams(Params):
    """How weights that are given are trained further (paper 000's further pretraining)."""

    head_only_epochs: int = Field(0, ge=0)
    """Epochs before the others in which the encoder is frozen and the new projector alone trained; 1 in paper 000."""
    head_only_learning_rate: float = Field(1e-3, gt=0)
    """Adam's constant learning rate in those epochs."""
    trained: Literal["all", "last_block"] = "all"
    """all: the whole encoder (paper 000's SSL). last_block: the encoder's last block only (SSL_p)."""
    frozen_batch_norm: Literal["fixed", "statistics", "affine"] = "fixed"
    """Batch norm in what is frozen. fixed: as loaded, and nothing is kept for a backward pass. statistics: uses and updates
    batch statistics. affine: that, and its weights and biases are trained (paper 000's code)."""


class PretrainPlan(Params):
    """One pretraining run. Everything here changes the result; where it runs (device, workers' hosts) does not."""

    encoder: EncoderParams
    objective: ObjectiveParams
    optimiser: OptimiserParams
    schedule: ScheduleParams
    views: ViewParams
    epochs: int | None = Field(None, ge=1)
    """Passes over the images, not counting `further.head_only_epochs`; null where `steps` says."""
    steps: int | None = Field(None, ge=1)
    """Steps after those epochs, in place of epochs: the last pass ends with the last step."""
    batch_size: int = Field(ge=2)
    """Images in one optimiser step over all workers together (each gives two views); bags with `pairs: bag`."""
    seed: int = Field(ge=0)
    """Pretraining seed: initial weights, order, augmentation."""
    pairs: Literal["image", "bag"] = "image"
    """image: both views of one image. bag: of two images of one bag where it has two (MICLe)."""
    further: FurtherParams = FurtherParams()
    """What is trained of weights that are given."""
    surgery: SurgeryParams | None = None
    """What is done to the given weights before the training (paper 002); null nothing."""
    learning_rate_finder: bool = False
    """Find the peak learning rate by a range test before the training; replaces `optimiser.learning_rate`."""
    encoder_parts: int = Field(1, ge=1)
    """The encoder sees each batch in so many parts, whose activations are computed again in the backward pass: the memory of
    one part, the same result. Refused where a batch norm would see the parts."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast (the loss stays in float32)."""
    gradient_clip: float | None = Field(None, gt=0)
    """Largest L2 norm of the gradient; null clips nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> PretrainPlan:
        self.objective.check(batch_size=self.batch_size)
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs is {self.epochs} and steps {self.steps}: give one of them, and null for the other")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plan in epochs is named as it was before there were steps."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "steps" or value is not None}

    def total_steps(self, per_epoch: int) -> int:
        """All steps, of the projector alone and of what follows, where an epoch has so many."""
        after = self.steps if self.epochs is None else self.epochs * per_epoch
        return self.further.head_only_epochs * per_epoch + (after or 0)

    def total_epochs(self, per_epoch: int) -> int:
        """Passes over the images that the steps take, a part of one counted as one."""
        return -(-self.total_steps(per_epoch) // per_epoch)

    def total_images(self, images: int) -> int:
        """Images that are read, each pass counted, where an epoch shows so many (its last, incomplete batch is dropped)."""
        if self.epochs is not None:
            return images * (self.further.head_only_epochs + self.epochs)
        return images * self.further.head_only_epochs + (self.steps or 0) * self.batch_size
