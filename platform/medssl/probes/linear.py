"""The linear probe: many softmax-regression heads on frozen features, trained in lockstep as one batched tensor.

The loss of a head is the class-weighted cross-entropy averaged over the batch plus `weight_decay / 2 * ||W||^2`: with
balanced weights its minimum over all labels is that of scikit-learn's LogisticRegression(class_weight="balanced",
C=1 / (N * weight_decay)) on standardised features. The gradient of softmax regression is two matrix products, written
out here; autograd would cost more than the products.

Shapes: S heads (seeds), N images, P augmented passes, E feature width, K classes, B batch, T steps of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.optim import one_cycle, warmup_cosine
from medssl.params import Params
from medssl.views import ViewParams, generator_for

Chance = Literal["head", "order", "augmentation"]


class LinearProbeParams(Params):
    """Training of the heads of a linear probe. Learning rate and weight decay come from the protocol's search."""

    epochs: int = Field(40, ge=1)
    """Passes over the labelled images."""
    batch_size: int = Field(64, ge=1)
    """Images in one step of every head; the last batch of an epoch may be smaller."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """adam: betas 0.9 and 0.999. sgd: momentum 0.9. Weight decay is an L2 penalty in both, biases are excluded."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """one_cycle: from peak/25 up over a quarter of the steps, then down to peak/1e5, both on a cosine."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: an image weighs (labels / classes present / labels of its class)."""
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


def train_linear_heads(
    features_NE: Tensor,
    labels_N: Tensor,
    classes: int,
    seeds: Sequence[int],
    params: LinearProbeParams,
    *,
    learning_rate: float | Sequence[float],
    weight_decay: float | Sequence[float] = 0.0,
    bank_PNE: Tensor | None = None,
    order_seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Trains one head per seed, all together; deterministic, each head the same whatever others are in the pack.

    Args:
        features_NE: features of the labelled images, on the device to train on.
        labels_N: class indices.
        classes: K; a class may have no image.
        seeds: one per head. A seed may stand there again with another learning rate: a grid is one pack.
        learning_rate, weight_decay: for all heads, or one per head.
        bank_PNE: augmented passes of the same images; needed where `params.vary` names augmentation. Each step, each
            head takes each image from a pass of its own drawing. Standardisation is that of `features_NE`, which is how
            images to be classified are embedded.
        order_seed: order of the images where `params.vary` leaves it common.

    Returns:
        weights (S, K, E) and biases (S, K) for the features as given: logits = features @ weights^T + biases.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    heads = len(seeds)
    _check(features_NE, labels_N, classes, bank_PNE)
    if heads == 0:
        raise ValueError("there is no seed to train a head for")
    if "augmentation" in params.vary and bank_PNE is None:
        raise ValueError("vary names augmentation: a bank of augmented features (P, N, E) is needed")
    device = features_NE.device
    rates_S, decays_S = _per_head(learning_rate, heads, device), _per_head(weight_decay, heads, device)
    mean_E, scale_E = _standardisation(features_NE) if params.standardise else _identity(features_NE)
    table = features_NE[None] if bank_PNE is None or "augmentation" not in params.vary else bank_PNE
    table_RE = ((table - mean_E) / scale_E).flatten(0, 1).to(torch.float32)
    targets_NK = torch.nn.functional.one_hot(labels_N.long(), classes).to(torch.float32)
    image_weights_N = _class_weights(labels_N, classes, params.class_weights)[labels_N.long()]

    weights_SKE, biases_SK = _initial(seeds, classes, features_NE.shape[1], device)
    optimiser = _Optimiser(params.optimiser, weights_SKE, biases_SK, decays_S)
    orders = seeds if "order" in params.vary else [order_seed] * heads
    chance = _Chance(seeds, orders, len(labels_N), len(table))
    steps_per_epoch = math.ceil(len(labels_N) / params.batch_size)
    for epoch in range(params.epochs):
        images_SN, rows_SN = chance.epoch(device)
        for step in range(steps_per_epoch):
            part = slice(step * params.batch_size, (step + 1) * params.batch_size)
            factor = schedule_factor(params.schedule, epoch * steps_per_epoch + step, params.epochs * steps_per_epoch)
            images_SB = images_SN[:, part]
            inputs_SBE = table_RE[rows_SN[:, part]]
            slope_SBK = torch.softmax(torch.baddbmm(biases_SK[:, None], inputs_SBE, weights_SKE.mT), dim=2)
            slope_SBK -= targets_NK[images_SB]
            slope_SBK *= image_weights_N[images_SB][:, :, None] / images_SB.shape[1]
            optimiser.step(torch.bmm(slope_SBK.mT, inputs_SBE), slope_SBK.sum(dim=1), rates_S * factor)
    return _fold(weights_SKE, biases_SK, mean_E, scale_E)


def predict_heads(features_NE: Tensor, weights_SKE: Tensor, biases_SK: Tensor) -> Tensor:
    """Class probabilities (S, N, K) of every head."""
    logits_SNK = torch.baddbmm(biases_SK[:, None], features_NE.expand(len(weights_SKE), -1, -1), weights_SKE.mT)
    return torch.softmax(logits_SNK, dim=2)


def schedule_factor(name: str, step: int, steps: int) -> float:
    """Learning rate of a step as a share of the peak."""
    if name == "constant":
        return 1.0
    if name == "cosine":
        return warmup_cosine(step, steps, 0, 0.0)
    return one_cycle(step, steps, 0.25, 0.9, 0.9)[0]


class _Optimiser:
    """Adam or SGD with momentum, the learning rate and the L2 penalty one per head."""

    def __init__(self, name: str, weights_SKE: Tensor, biases_SK: Tensor, decays_S: Tensor) -> None:
        self.adam = name == "adam"
        self.weights_SKE, self.biases_SK, self.decays_S11 = weights_SKE, biases_SK, decays_S[:, None, None]
        self.first = [torch.zeros_like(weights_SKE), torch.zeros_like(biases_SK)]
        self.second = [torch.zeros_like(weights_SKE), torch.zeros_like(biases_SK)]
        self.steps = 0

    def step(self, gradient_SKE: Tensor, gradient_SK: Tensor, rates_S: Tensor) -> None:
        """Moves weights and biases in place."""
        self.steps += 1
        gradient_SKE.addcmul_(self.weights_SKE, self.decays_S11)
        for i, (value, gradient) in enumerate(((self.weights_SKE, gradient_SKE), (self.biases_SK, gradient_SK))):
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
        """The next epoch: images (S, N) in each head's order, and the row of the (P*N, E) table that each comes from."""
        orders = torch.stack([torch.randperm(self.images, generator=g) for g in self.orders.values()])
        images_SN = orders[self.order_of]
        if self.passes == 1:
            return images_SN.to(device), images_SN.to(device)
        passes = torch.stack([torch.randint(self.passes, (self.images,), generator=g) for g in self.draws.values()])
        rows_SN = passes[self.draw_of] * self.images + images_SN
        return images_SN.to(device), rows_SN.to(device)


def _initial(seeds: Sequence[int], classes: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and biases uniform in +-1/sqrt(E), as torch's linear layer starts."""
    drawn = [2 * torch.rand(classes, width + 1, generator=generator_for("probe", "head", seed)) - 1 for seed in seeds]
    drawn_SKE = torch.stack(drawn).to(device) / math.sqrt(width)
    return drawn_SKE[..., :-1].contiguous(), drawn_SKE[..., -1].contiguous()


def _standardisation(features_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale (E,) in float64; a constant feature keeps scale 1, so that it stays 0 instead of being blown up."""
    wide = features_NE.to(torch.float64)
    mean_E, std_E = wide.mean(dim=0), wide.std(dim=0, correction=0)
    return mean_E, torch.where(std_E > 1e-6 * mean_E.abs() + 1e-12, std_E, torch.ones_like(std_E))


def _identity(features_NE: Tensor) -> tuple[Tensor, Tensor]:
    zeros_E = torch.zeros(features_NE.shape[1], dtype=torch.float64, device=features_NE.device)
    return zeros_E, torch.ones_like(zeros_E)


def _fold(weights_SKE: Tensor, biases_SK: Tensor, mean_E: Tensor, scale_E: Tensor) -> tuple[Tensor, Tensor]:
    """The same heads for features that are not standardised."""
    folded_SKE = weights_SKE.to(torch.float64) / scale_E
    folded_SK = biases_SK.to(torch.float64) - folded_SKE @ mean_E
    return folded_SKE.to(torch.float32), folded_SK.to(torch.float32)


def _class_weights(labels_N: Tensor, classes: int, kind: str) -> Tensor:
    """Weight of an image of each class (K,); the mean over the images is 1."""
    counts_K = torch.bincount(labels_N.long(), minlength=classes).to(torch.float32)
    if kind == "none":
        return torch.ones_like(counts_K)
    return len(labels_N) / ((counts_K > 0).sum() * counts_K.clamp(min=1))


def _per_head(value: float | Sequence[float], heads: int, device: torch.device) -> Tensor:
    values = [float(value)] * heads if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != heads:
        raise ValueError(f"{len(values)} learning rates or weight decays for {heads} heads: give one, or one per head")
    return torch.tensor(values, dtype=torch.float32, device=device)


def _check(features_NE: Tensor, labels_N: Tensor, classes: int, bank_PNE: Tensor | None) -> None:
    if features_NE.ndim != 2 or labels_N.shape != features_NE.shape[:1] or len(labels_N) == 0:
        shapes = f"features {tuple(features_NE.shape)} and labels {tuple(labels_N.shape)}"
        raise ValueError(f"{shapes}: expected (N, E) and (N,) with at least one image")
    if int(labels_N.min()) < 0 or int(labels_N.max()) >= classes:
        raise ValueError(f"labels lie in {int(labels_N.min())}..{int(labels_N.max())}: expected 0..{classes - 1}")
    if bank_PNE is not None and bank_PNE.shape[1:] != features_NE.shape:
        raise ValueError(f"bank {tuple(bank_PNE.shape)} does not fit features {tuple(features_NE.shape)}")
    for name, values in (("features", features_NE), ("bank", bank_PNE)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} hold NaN or infinite values")
