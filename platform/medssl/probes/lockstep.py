"""What probes share whose heads are trained side by side: the order of images, the draws, the weights of classes, the optimiser.

Every head has its own row in each tensor, so that a step of all heads is a few batched matrix products, and a head comes out
the same whatever others are in the pack.

Labels are of classes (N,), for softmax and cross-entropy, or of findings (N, F) as in `medssl.metrics`, for a sigmoid and
binary cross-entropy each: summed over the findings, so that each finding of a linear head is a logistic regression of its own,
on the images of which it is known.

Shapes: S heads (seeds), N images, P augmented passes, E feature width, K classes or findings, B batch, R rows of the table
(P * N).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.optim import one_cycle, warmup_cosine
from medssl.params import Params
from medssl.probes.links import activated, check_labels, finding_weights
from medssl.views import ViewParams, generator_for

Chance = Literal["head", "order", "augmentation"]


class HeadTraining(Params):
    """Training of the heads of a probe. Learning rate and weight decay come from the protocol's search."""

    epochs: int = Field(40, ge=1)
    """Passes over the labelled images."""
    batch_size: int = Field(64, ge=1)
    """Images in one step of every head; the last batch of an epoch may be smaller."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """adam: betas 0.9 and 0.999. sgd: momentum 0.9. Weight decay is an L2 penalty in both, biases are excluded."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: an image weighs (labels / classes present / labels of its class); of a finding, images with and without it weigh
    the same together."""
    standardise: bool = True
    """Train on features with mean 0 and standard deviation 1 over the labelled images; the returned heads undo it."""
    vary: tuple[Chance, ...] = ("head", "order", "augmentation")
    """What differs between head seeds. What is left out is the same for all: order by one common seed, no augmentation."""
    augmented_passes: int = Field(8, ge=1, le=1000)
    """Passes in the bank of augmented features from which heads draw; only with augmentation in `vary`."""
    bank_views: ViewParams = ViewParams(
        crop_scale=(0.7, 1.0), horizontal_flip=0.5, vertical_flip=0.5, jitter=0.0, grey=0.0, blur=(0.0, 0.0),
        solarise=(0.0, 0.0),
    )  # fmt: skip
    """Augmentation of the bank's passes."""

    @field_validator("vary")
    @classmethod
    def _canonical(cls, vary: tuple[Chance, ...]) -> tuple[Chance, ...]:
        if "head" not in vary:
            raise ValueError("vary must name head: seeds that share their initial weights are no repeats")
        order: tuple[Chance, ...] = ("head", "order", "augmentation")
        return tuple(chance for chance in order if chance in vary)

    @property
    def bank_passes(self) -> int:
        """Augmented passes to embed; 0 where the heads see the plain features."""
        return self.augmented_passes if "augmentation" in self.vary else 0


class Step(NamedTuple):
    """One step of all heads."""

    number: int
    """From 0."""
    epoch: int
    inputs_SBE: Tensor
    """Standardised features."""
    targets_SBK: Tensor
    """One-hot labels, or 1 for each finding that is there."""
    weights_SBK: Tensor
    """What an image's loss counts in the sum: its class's weight over the size of the batch, (S, B, 1); of findings each its own,
    0 where it is not known."""


class Lesson:
    """The labelled images as heads see them, step by step."""

    def __init__(
        self, features_NE: Tensor, labels_N: Tensor, classes: int, seeds: Sequence[int], params: HeadTraining,
        bank_PNE: Tensor | None, order_seed: int,
    ) -> None:  # fmt: skip
        """See :func:`medssl.probes.linear.train_linear_heads` for the arguments; ValueError for what does not fit."""
        _check(features_NE, labels_N, classes, bank_PNE)
        if not seeds:
            raise ValueError("there is no seed to train a head for")
        if params.bank_passes and bank_PNE is None:
            raise ValueError("vary names augmentation: a bank of augmented features (P, N, E) is needed")
        self.device, self._params, self._images = features_NE.device, params, len(labels_N)
        self.mean_E, self.scale_E = _standardisation(features_NE) if params.standardise else _identity(features_NE)
        table = features_NE[None] if bank_PNE is None or not params.bank_passes else bank_PNE
        self._table_RE = ((table - self.mean_E) / self.scale_E).flatten(0, 1).to(torch.float32)
        self._targets_NK, self._weights_NK = _targets_and_weights(labels_N, classes, params.class_weights)
        self._findings = labels_N.ndim == 2
        orders = seeds if "order" in params.vary else [order_seed] * len(seeds)
        self._chance = _Chance(seeds, orders, len(labels_N), len(table))
        self.steps_per_epoch = math.ceil(len(labels_N) / params.batch_size)
        self.total_steps = params.epochs * self.steps_per_epoch

    def steps(self) -> Iterator[Step]:
        """All steps in order; to be taken once."""
        size = self._params.batch_size
        for epoch in range(self._params.epochs):
            images_SN, rows_SN = self._chance.epoch(self.device)
            for step in range(self.steps_per_epoch):
                part = slice(step * size, (step + 1) * size)
                images_SB = images_SN[:, part]
                yield Step(
                    epoch * self.steps_per_epoch + step, epoch, self._table_RE[rows_SN[:, part]], self._targets_NK[images_SB],
                    self._weights_NK[images_SB] / images_SB.shape[1],
                )  # fmt: skip

    def slope(self, logits_SBK: Tensor, step: Step) -> Tensor:
        """Gradient (S, B, K) of the loss of a step by the logits; both losses have the same form."""
        slope_SBK = activated(logits_SBK, findings=self._findings)
        slope_SBK -= step.targets_SBK
        slope_SBK *= step.weights_SBK
        return slope_SBK


def schedule_factor(name: str, step: int, steps: int) -> float:
    """Learning rate of a step as a share of the peak: constant, cosine to 0, or one_cycle."""
    if name == "constant":
        return 1.0
    if name == "cosine":
        return warmup_cosine(step, steps, 0, 0.0)
    return one_cycle(step, steps, 0.25, 0.9, 0.9)[0]


class LockstepOptimiser:
    """Adam or SGD with momentum, the learning rate and the L2 penalty one per head."""

    def __init__(self, name: str, values: Sequence[Tensor], decays_S: Tensor) -> None:
        """`values` (S, ...) are moved in place; those of two dimensions are biases, which no penalty holds down."""
        self.adam = name == "adam"
        self.values, self.decays_S11 = list(values), decays_S[:, None, None]
        self.first = [torch.zeros_like(value) for value in values]
        self.second = [torch.zeros_like(value) for value in values]
        self.steps = 0

    def step(self, gradients: Sequence[Tensor], rates_S: Tensor) -> None:
        """Moves the values by their gradients, which are used up."""
        self.steps += 1
        for i, (value, gradient) in enumerate(zip(self.values, gradients, strict=True)):
            if value.ndim > 2:
                gradient.addcmul_(value, self.decays_S11)
            rates = rates_S.view(-1, *[1] * (value.ndim - 1))
            if not self.adam:
                self.first[i].mul_(0.9).add_(gradient)
                value.sub_(self.first[i] * rates)
                continue
            self.first[i].lerp_(gradient, 0.1)
            self.second[i].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            size = self.second[i].sqrt().div_(math.sqrt(1 - 0.999**self.steps)).add_(1e-8)
            value.sub_(self.first[i].div(size).mul_(rates / (1 - 0.9**self.steps)))


class _Chance:
    """Order and augmentation draws of all heads, epoch by epoch."""

    def __init__(self, seeds: Sequence[int], orders: Sequence[int], images: int, passes: int) -> None:
        self.images, self.passes = images, passes
        # One generator per distinct seed: a grid repeats its seeds, and all its points see the same draws.
        self.orders = {seed: generator_for("probe", "order", seed) for seed in orders}
        self.order_of = torch.tensor([list(self.orders).index(seed) for seed in orders])
        self.draws = {seed: generator_for("probe", "augmentation", seed) for seed in seeds}
        self.draw_of = torch.tensor([list(self.draws).index(seed) for seed in seeds])

    def epoch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The next epoch: images (S, N) in each head's order, and the row of the (R, E) table that each comes from."""
        orders = torch.stack([torch.randperm(self.images, generator=g) for g in self.orders.values()])
        images_SN = orders[self.order_of]
        if self.passes == 1:
            return images_SN.to(device), images_SN.to(device)
        passes = torch.stack([torch.randint(self.passes, (self.images,), generator=g) for g in self.draws.values()])
        rows_SN = passes[self.draw_of] * self.images + images_SN
        return images_SN.to(device), rows_SN.to(device)


def per_head(value: float | Sequence[float], heads: int, device: torch.device) -> Tensor:
    """One value for all heads or one for each, as (S,); ValueError for another number of them."""
    values = [float(value)] * heads if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != heads:
        raise ValueError(f"{len(values)} learning rates or weight decays for {heads} heads: give one, or one per head")
    return torch.tensor(values, dtype=torch.float32, device=device)


def fold(weights_SHE: Tensor, biases_SH: Tensor, mean_E: Tensor, scale_E: Tensor) -> tuple[Tensor, Tensor]:
    """The same linear layers for features that are not standardised."""
    folded_SHE = weights_SHE.to(torch.float64) / scale_E
    folded_SH = biases_SH.to(torch.float64) - folded_SHE @ mean_E
    return folded_SHE.to(torch.float32), folded_SH.to(torch.float32)


def _standardisation(features_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale (E,) in float64; a constant feature keeps scale 1, so that it stays 0 instead of being blown up."""
    wide = features_NE.to(torch.float64)
    mean_E, std_E = wide.mean(dim=0), wide.std(dim=0, correction=0)
    return mean_E, torch.where(std_E > 1e-6 * mean_E.abs() + 1e-12, std_E, torch.ones_like(std_E))


def _identity(features_NE: Tensor) -> tuple[Tensor, Tensor]:
    zeros_E = torch.zeros(features_NE.shape[1], dtype=torch.float64, device=features_NE.device)
    return zeros_E, torch.ones_like(zeros_E)


def _targets_and_weights(labels_N: Tensor, classes: int, kind: Literal["balanced", "none"]) -> tuple[Tensor, Tensor]:
    """Targets (N, K), and weights (N, 1) of classes or (N, F) of findings."""
    if labels_N.ndim == 1:
        labels_N = labels_N.long()
        targets_NK = torch.nn.functional.one_hot(labels_N, classes).to(torch.float32)
        return targets_NK, _class_weights(labels_N, classes, kind)[labels_N][:, None]
    return (labels_N == 1).to(torch.float32), finding_weights(labels_N, kind)


def _class_weights(labels_N: Tensor, classes: int, kind: str) -> Tensor:
    """Weight of an image of each class (K,); the mean over the images is 1."""
    counts_K = torch.bincount(labels_N.long(), minlength=classes).to(torch.float32)
    if kind == "none":
        return torch.ones_like(counts_K)
    return len(labels_N) / ((counts_K > 0).sum() * counts_K.clamp(min=1))


def _check(features_NE: Tensor, labels_N: Tensor, classes: int, bank_PNE: Tensor | None) -> None:
    if features_NE.ndim != 2 or labels_N.shape[:1] != features_NE.shape[:1] or len(labels_N) == 0:
        shapes = f"features {tuple(features_NE.shape)} and labels {tuple(labels_N.shape)}"
        raise ValueError(f"{shapes}: expected (N, E) and (N,), or (N, F) of findings, with at least one image")
    check_labels(labels_N, classes)
    if bank_PNE is not None and bank_PNE.shape[1:] != features_NE.shape:
        raise ValueError(f"bank {tuple(bank_PNE.shape)} does not fit features {tuple(features_NE.shape)}")
    for name, values in (("features", features_NE), ("bank", bank_PNE)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} hold NaN or infinite values")
