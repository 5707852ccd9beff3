"""The MLP probe: many classifiers of two layers on frozen features, trained in lockstep as batched matrix products.

Paper 001 judges its encoders so: two layers, Adam, 100 epochs, the learning rate halved every 25 (StepLR), batch and learning
rate per method (its Table 1). It states no width of the hidden layer, no activation and no normalisation; there is no code.

Decided here: 512 hidden units, ReLU, no batch norm (its statistics would tie an image's prediction to its batch's), features
standardised as for the linear probe.

Shapes: S heads (seeds), N images, P augmented passes, E feature width, H hidden units, K classes, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from medssl.probes.links import activated
from medssl.probes.lockstep import HeadTraining, Lesson, LockstepOptimiser, fold, per_head, schedule_factor
from medssl.views import generator_for


class MlpProbeParams(HeadTraining):
    """Training of the heads of an MLP probe. Learning rate and weight decay come from the protocol's search."""

    hidden: int = Field(512, ge=1, le=65536)
    """Hidden units; paper 001 does not state them."""
    epochs: int = Field(100, ge=1)
    """Passes over the labelled images; paper 001's."""
    schedule: Literal["step", "one_cycle", "cosine", "constant"] = "step"
    """step: times `step_factor` after every `step_epochs` (paper 001). one_cycle: from peak/25 up over a quarter of the steps,
    then down to peak/1e5, both on a cosine."""
    step_epochs: int = Field(25, ge=1)
    """Epochs between the drops of step."""
    step_factor: float = Field(0.5, gt=0, le=1)
    """What step multiplies the learning rate with at each drop."""


_CACHED = 2**20
"""Bytes of first-layer weights in one pack on a CPU. One thread, 24 heads of 512 x 512: 0.99 s one by one, 1.77 s all at once; of
128 x 512: 0.34 s one by one, 0.26 s by fours, 0.39 s all at once."""


class MlpHeads(NamedTuple):
    """Trained heads for the features as given: logits = relu(features @ hidden^T + bias) @ out^T + bias."""

    hidden_SHE: Tensor
    hidden_bias_SH: Tensor
    out_SKH: Tensor
    out_bias_SK: Tensor


def train_mlp_heads(
    features_NE: Tensor,
    labels_N: Tensor,
    classes: int,
    seeds: Sequence[int],
    params: MlpProbeParams,
    *,
    learning_rate: float | Sequence[float],
    weight_decay: float | Sequence[float] = 0.0,
    bank_PNE: Tensor | None = None,
    order_seed: int = 0,
) -> MlpHeads:
    """Trains one head per seed; see :func:`medssl.probes.linear.train_linear_heads` for the arguments and errors.

    The loss is the class-weighted cross-entropy averaged over the batch plus `weight_decay / 2` times the squared weights of
    both layers. The gradient is written out, as for the linear probe. On a GPU all heads train together; on a CPU in packs whose
    weights stay in its cache, since a step moves every weight. A head comes out the same in any pack.
    """
    values = [per_head(value, len(seeds), torch.device("cpu")).tolist() for value in (learning_rate, weight_decay)]
    size = len(seeds)
    if features_NE.device.type == "cpu" and seeds:
        size = max(1, _CACHED // (4 * params.hidden * features_NE.shape[-1]))
    packs = [
        _train_pack(
            features_NE, labels_N, classes, seeds[i : i + size], params, values[0][i : i + size], values[1][i : i + size],
            bank_PNE, order_seed,
        )
        for i in range(0, max(len(seeds), 1), max(size, 1))
    ]  # fmt: skip
    return MlpHeads(*(torch.cat(parts) for parts in zip(*packs, strict=True)))


def _train_pack(
    features_NE: Tensor, labels_N: Tensor, classes: int, seeds: Sequence[int], params: MlpProbeParams,
    learning_rate: Sequence[float], weight_decay: Sequence[float], bank_PNE: Tensor | None, order_seed: int,
) -> MlpHeads:  # fmt: skip
    lesson = Lesson(features_NE, labels_N, classes, seeds, params, bank_PNE, order_seed)
    rates_S, decays_S = (per_head(value, len(seeds), lesson.device) for value in (learning_rate, weight_decay))
    heads = _initial(seeds, features_NE.shape[1], params.hidden, classes, lesson.device)
    optimiser = LockstepOptimiser(params.optimiser, heads, decays_S)
    for step in lesson.steps():
        if params.schedule == "step":
            factor = params.step_factor ** (step.epoch // params.step_epochs)
        else:
            factor = schedule_factor(params.schedule, step.number, lesson.total_steps)
        hidden_SBH = torch.baddbmm(heads.hidden_bias_SH[:, None], step.inputs_SBE, heads.hidden_SHE.mT).relu_()
        slope_SBK = lesson.slope(torch.baddbmm(heads.out_bias_SK[:, None], hidden_SBH, heads.out_SKH.mT), step)
        slope_SBH = torch.bmm(slope_SBK, heads.out_SKH)
        slope_SBH *= hidden_SBH > 0
        gradients = [
            torch.bmm(slope_SBH.mT, step.inputs_SBE), slope_SBH.sum(dim=1),
            torch.bmm(slope_SBK.mT, hidden_SBH), slope_SBK.sum(dim=1),
        ]  # fmt: skip
        optimiser.step(gradients, rates_S * factor)
    return MlpHeads(*fold(heads.hidden_SHE, heads.hidden_bias_SH, lesson.mean_E, lesson.scale_E), *heads[2:])


def predict_mlp_heads(features_NE: Tensor, heads: MlpHeads, *, findings: bool = False) -> Tensor:
    """Probabilities (S, N, K) of classes, or of findings, of every head."""
    inputs_SNE = features_NE.expand(len(heads.hidden_SHE), -1, -1)
    hidden_SNH = torch.baddbmm(heads.hidden_bias_SH[:, None], inputs_SNE, heads.hidden_SHE.mT).relu_()
    return activated(torch.baddbmm(heads.out_bias_SK[:, None], hidden_SNH, heads.out_SKH.mT), findings=findings)


def _initial(seeds: Sequence[int], width: int, hidden: int, classes: int, device: torch.device) -> MlpHeads:
    """Weights and biases of each layer uniform in +-1/sqrt(its inputs), as torch's linear layers start."""
    layers: list[list[Tensor]] = [[], []]
    for seed in seeds:
        generator = generator_for("probe", "mlp head", seed)
        for drawn, (outputs, inputs) in zip(layers, ((hidden, width), (classes, hidden)), strict=True):
            drawn.append((2 * torch.rand(outputs, inputs + 1, generator=generator) - 1) / math.sqrt(inputs))
    stacked = [torch.stack(drawn).to(device) for drawn in layers]
    first, second = ((layer[..., :-1].contiguous(), layer[..., -1].contiguous()) for layer in stacked)
    return MlpHeads(*first, *second)
