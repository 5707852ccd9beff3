"""The linear probe: many softmax-regression heads on frozen features, trained in lockstep as one batched tensor.

The loss of a head is the class-weighted cross-entropy averaged over the batch plus `weight_decay / 2 * ||W||^2`: with
balanced weights its minimum over all labels is that of scikit-learn's LogisticRegression(class_weight="balanced",
C=1 / (N * weight_decay)) on standardised features. The gradient of softmax regression is two matrix products, written
out here; autograd would cost more than the products.

Shapes: S heads (seeds), N images, P augmented passes, E feature width, K classes, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medssl.probes.links import activated
from medssl.probes.lockstep import HeadTraining, Lesson, LockstepOptimiser, fold, per_head, schedule_factor
from medssl.views import generator_for


class LinearProbeParams(HeadTraining):
    """Training of the heads of a linear probe. Learning rate and weight decay come from the protocol's search."""

    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """one_cycle: from peak/25 up over a quarter of the steps, then down to peak/1e5, both on a cosine."""


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
        labels_N: class indices, or labels (N, F) of findings, each a logistic regression of its own.
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
    lesson = Lesson(features_NE, labels_N, classes, seeds, params, bank_PNE, order_seed)
    rates_S, decays_S = (per_head(value, len(seeds), lesson.device) for value in (learning_rate, weight_decay))
    weights_SKE, biases_SK = _initial(seeds, classes, features_NE.shape[1], lesson.device)
    optimiser = LockstepOptimiser(params.optimiser, [weights_SKE, biases_SK], decays_S)
    for step in lesson.steps():
        factor = schedule_factor(params.schedule, step.number, lesson.total_steps)
        slope_SBK = lesson.slope(torch.baddbmm(biases_SK[:, None], step.inputs_SBE, weights_SKE.mT), step)
        optimiser.step([torch.bmm(slope_SBK.mT, step.inputs_SBE), slope_SBK.sum(dim=1)], rates_S * factor)
    return fold(weights_SKE, biases_SK, lesson.mean_E, lesson.scale_E)


def predict_heads(features_NE: Tensor, weights_SKE: Tensor, biases_SK: Tensor, *, findings: bool = False) -> Tensor:
    """Probabilities (S, N, K) of classes, or of findings, of every head."""
    logits_SNK = torch.baddbmm(biases_SK[:, None], features_NE.expand(len(weights_SKE), -1, -1), weights_SKE.mT)
    return activated(logits_SNK, findings=findings)


def _initial(seeds: Sequence[int], classes: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and biases uniform in +-1/sqrt(E), as torch's linear layer starts."""
    drawn = [2 * torch.rand(classes, width + 1, generator=generator_for("probe", "head", seed)) - 1 for seed in seeds]
    drawn_SKE = torch.stack(drawn).to(device) / math.sqrt(width)
    return drawn_SKE[..., :-1].contiguous(), drawn_SKE[..., -1].contiguous()
