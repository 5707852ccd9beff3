"""Every probe as one thing: fitted on features, kept as a few tensors per seed, and applied to features again.

Labels are of classes (N,) or of findings (N, F), as in `medssl.metrics`.

Shapes: S heads (seeds), N images, P augmented passes, E feature width, K classes or findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from medssl.probes.knn import KnnParams, knn_finding_scores, knn_scores
from medssl.probes.linear import LinearProbeParams, predict_heads, train_linear_heads
from medssl.probes.mlp import MlpHeads, MlpProbeParams, predict_mlp_heads, train_mlp_heads

ProbeParams = LinearProbeParams | MlpProbeParams | KnnParams
Head = Mapping[str, Tensor]
"""What is kept of one head, by name: enough to apply it."""

PROBES: dict[str, type[ProbeParams]] = {"linear_probe": LinearProbeParams, "mlp_probe": MlpProbeParams, "knn": KnnParams}
"""Parameters of each probe by the kind of protocol that it is."""


def fit_heads(
    params: ProbeParams,
    features_NE: Tensor,
    labels_N: Tensor,
    classes: int,
    seeds: Sequence[int],
    point: Mapping[str, float],
    bank_PNE: Tensor | None = None,
) -> list[Head]:
    """One head per seed on the labelled images' features; all that are trained are trained together.

    Args:
        classes: K, or F; a class may have no image.
        point: `learning_rate` and `weight_decay`; of no use to kNN, which trains nothing.
        bank_PNE: augmented passes of the same images, for probes that vary them.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    if isinstance(params, KnnParams):
        return [{"bank": features_NE, "labels": labels_N.long()} for _ in seeds]
    rate, decay = point["learning_rate"], point["weight_decay"]
    if isinstance(params, MlpProbeParams):
        pack = train_mlp_heads(
            features_NE, labels_N, classes, seeds, params, learning_rate=rate, weight_decay=decay, bank_PNE=bank_PNE
        )
        return [dict(zip(MlpHeads._fields, head, strict=True)) for head in zip(*pack, strict=True)]
    weights_SKE, biases_SK = train_linear_heads(
        features_NE, labels_N, classes, seeds, params, learning_rate=rate, weight_decay=decay, bank_PNE=bank_PNE
    )
    return [{"weight": w, "bias": b} for w, b in zip(weights_SKE, biases_SK, strict=True)]


def apply_heads(
    params: ProbeParams, heads: Sequence[Head], features_NE: Tensor, classes: int, *, findings: bool = False
) -> Tensor:
    """Probabilities (S, N, K) of classes, or of findings, of every head in float32; for kNN the shares of the votes."""
    if isinstance(params, KnnParams):
        votes = partial(knn_finding_scores) if findings else partial(knn_scores, classes=classes)
        return torch.stack([
            votes(
                head["bank"], head["labels"], queries_QE=features_NE, k=params.k,
                weights=params.weights, temperature=params.temperature, balanced=params.balanced,
            )
            for head in heads
        ])  # fmt: skip
    if isinstance(params, MlpProbeParams):
        pack = MlpHeads(*(torch.stack([head[name] for head in heads]) for name in MlpHeads._fields))
        return predict_mlp_heads(features_NE, pack, findings=findings)
    weights_SKE, biases_SK = (torch.stack([head[name] for head in heads]) for name in ("weight", "bias"))
    return predict_heads(features_NE, weights_SKE, biases_SK, findings=findings)
