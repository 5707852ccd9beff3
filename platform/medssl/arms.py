"""The arms of a study: initial weights, and the pretraining that follows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medssl.networks.encoder import EncoderParams
from medssl.networks.surgery import SurgeryParams
from medssl.objectives import ObjectiveParams
from medssl.optim import OptimiserParams, ScheduleParams
from medssl.params import Params
from medssl.protocols import NAME
from medssl.training.plan import FurtherParams
from medssl.views import ViewParams


class MixPart(Params):
    """Images of one dataset in a mix."""

    dataset: str | None = None
    """Dataset made by `medssl ingest`, named as the study's is; null is the study's own."""
    splits: tuple[str, ...] = Field(("train",), min_length=1)
    """Splits whose images (never labels, but for `objective: supervised`) are shown."""
    classes: tuple[str, ...] | None = Field(None, min_length=1)
    """Show images of these classes alone, as where a clinic adds normal ones; null shows all."""
    times: int = Field(1, ge=1)
    """How often an epoch shows each of these images: over-sampling of a small part beside a large one."""

    @property
    def described(self) -> str:
        """Splits and classes in words."""
        return ", ".join(self.splits) + (f"; {', '.join(self.classes)} alone" if self.classes else "")


class Arm(Params):
    """One way to features: initial weights, and the pretraining that follows (none without an objective)."""

    name: str = Field(pattern=NAME)
    """Name of the arm in tables and on the command line."""
    features: Literal["encoder", "colour"] = "encoder"
    """encoder: a network's features. colour: colour and intensity statistics of the image, the floor to beat."""
    encoder: EncoderParams | None = None
    """The arm's own encoder; null uses the study's."""
    initial_weights: str = "random"
    """`random`, `timm` (the encoder's pretrained weights), `timm:NAME`, `arm:NAME` (what another arm of the study has
    pretrained, seed by seed), or a file (stages/initial.py says where it is sought);
    `function` where the encoder is a function of your own that loads weights."""
    objective: ObjectiveParams | None = None
    """Pretraining objective; null pretrains nothing."""
    pretraining_seeds: int | None = Field(None, ge=1)
    """Pretraining seeds (or random initialisations) of this arm; null takes `repeats.pretraining_seeds`."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the pretraining images; null where `steps` says."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps of the pretraining, in place of epochs: 100,000 in paper 004, whatever the number of images."""
    batch_size: int = Field(128, ge=2)
    """Images in one optimiser step, over all workers together."""
    optimiser: OptimiserParams = OptimiserParams()
    """Optimiser of the pretraining."""
    schedule: ScheduleParams = ScheduleParams()
    """Learning rate over the pretraining."""
    views: ViewParams = ViewParams()
    """Augmentation of the pretraining."""
    mix: tuple[MixPart, ...] = ()
    """What the pretraining is shown, where that is not the study's `pretraining_splits`: parts of one or more datasets."""
    pairs: Literal["image", "bag"] = "image"
    """image: two views of one image. bag: of two images of one bag where it has two, one bag of a patient in a batch (MICLe)."""
    further: FurtherParams = FurtherParams()
    """Which part of given weights is trained further, after how many epochs of the projector alone."""
    surgery: SurgeryParams | None = None
    """Weight scaling and replacement of dead filters before the pretraining; null none."""
    learning_rate_finder: bool = False
    """A range test picks the peak learning rate, in place of the optimiser's (resident feeding)."""
    encoder_parts: int = Field(1, ge=1)
    """Parts of a batch whose activations are in memory at once; for encoders without batch norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network in pretraining."""
    gradient_clip: float | None = Field(None, gt=0)
    """Largest L2 norm of the pretraining's gradient; null clips nothing."""

    @model_validator(mode="after")
    def _pretraining_is_whole(self) -> Arm:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"arm '{self.name}': epochs is {self.epochs} and steps {self.steps}: give one of them")
        if (self.objective is None) != (self.epochs is None and self.steps is None):
            missing = "epochs" if self.objective is not None else "objective"
            raise ValueError(f"arm '{self.name}': objective and epochs go together, {missing} is missing")
        if self.features == "colour" and (self.objective is not None or self.initial_weights != "random"):
            raise ValueError(f"arm '{self.name}': colour features take no objective, epochs or initial weights")
        self._check_mix()
        self._check_given_weights()
        if self.objective is not None:
            if self.objective.takes_labels and (self.pairs == "bag" or not self.mix or any(p.dataset is None for p in self.mix)):
                raise ValueError(
                    f"arm '{self.name}': {self.objective.name} pretraining is on labels of other datasets, image by image (of "
                    "the study's own it would see more than a draw): give mix with datasets, and pairs: image"
                )
            try:
                self.objective.check(batch_size=self.batch_size)
            except ValueError as error:
                raise ValueError(f"arm '{self.name}': {error}") from None
        return self

    def _check_given_weights(self) -> None:
        field = "surgery" if self.surgery is not None else "further" if self.further != FurtherParams() else None
        if field is None:
            return
        if self.initial_weights == "random":
            raise ValueError(f"arm '{self.name}': {field} is for weights that are given, but initial_weights is random")
        if self.objective is None:  # the weights would stay as they are, and the arm be compared with itself
            does = "precedes a pretraining" if field == "surgery" else "says how given weights are pretrained"
            raise ValueError(f"arm '{self.name}': {field} {does}, and the arm has no objective: add one or leave {field} out")

    def _check_mix(self) -> None:
        if self.mix and self.objective is None:
            raise ValueError(f"arm '{self.name}': mix says what a pretraining is shown, and the arm has no objective")
        parts = [
            (part.dataset, split, name) for part in self.mix for split in part.splits for name in part.classes or (None,)
        ]
        whole = [part[:2] for part in parts if part[2] is None]
        twice = next((part for part in parts if parts.count(part) > 1 or (part[2] is not None and part[:2] in whole)), None)
        if twice is not None:
            whose = f"of {twice[0]}" if twice[0] else "of the study's dataset"
            raise ValueError(f"arm '{self.name}': mix names split '{twice[1]}' {whose} twice: use times")
        often = max((part.times for part in self.mix), default=1)
        if self.pairs == "bag" and often > 1:
            raise ValueError(f"arm '{self.name}': pairs of a bag show each bag once an epoch, so mix.times {often} must be 1")

    @property
    def duration(self) -> str:
        """How long it pretrains, in words."""
        if self.steps is not None:
            return f"{self.steps:,} steps"
        return "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"

    @property
    def is_random(self) -> bool:
        """Whether it is a randomly initialised encoder, left as it is."""
        return self.features == "encoder" and self.objective is None and self.initial_weights == "random"
