"""What a fine-tuning does with a validation score after each epoch: lower the learning rate on a plateau, stop early.

The plateau is torch's own `ReduceLROnPlateau`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from medssl.params import Params

Watched = Literal["accuracy", "balanced_accuracy", "loss"]
"""What is measured on the validation images; of the loss less is better. The loss is the unweighted cross-entropy."""


class PlateauParams(Params):
    """The learning rate falls where the validation score does not rise any more (ReduceLROnPlateau)."""

    factor: float = Field(0.5, gt=0, lt=1)
    """What the learning rate is multiplied with; 0.5 in paper 003."""
    patience: int = Field(2, ge=0)
    """Epochs without a better score that are waited out; 2 in paper 003. Better is better by a ten-thousandth (torch's)."""


class EarlyStoppingParams(Params):
    """Training ends where the validation score does not rise any more; the weights of the best epoch are kept."""

    patience: int = Field(3, ge=1)
    """Epochs without a better score after which training ends; 3 in paper 003."""


class Plateau:
    """The share of its schedule that the learning rate has come down to."""

    def __init__(self, params: PlateauParams, watched: Watched) -> None:
        self._optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        mode: Literal["min", "max"] = "min" if watched == "loss" else "max"
        self._torch = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._optimiser, mode, factor=params.factor, patience=params.patience
        )

    @property
    def factor(self) -> float:
        """Between 0 and 1."""
        return float(self._optimiser.param_groups[0]["lr"])

    def epoch(self, score: float) -> None:
        """Takes in the score of an epoch."""
        self._torch.step(score)


class EarlyStopping:
    """The best epoch so far, and whether to go on."""

    def __init__(self, params: EarlyStoppingParams, watched: Watched) -> None:
        self._patience, self._sign = params.patience, -1.0 if watched == "loss" else 1.0
        self.best_epoch, self._best, self._epochs = 0, -math.inf, 0

    def epoch(self, score: float) -> bool:
        """Takes in the score of an epoch; whether it is the best so far. Of equal ones the first is; NaN never is."""
        self._epochs += 1
        better = self._sign * score > self._best
        if better:
            self.best_epoch, self._best = self._epochs, self._sign * score
        return better

    @property
    def over(self) -> bool:
        """Whether the patience is used up."""
        return self._epochs - self.best_epoch >= self._patience
