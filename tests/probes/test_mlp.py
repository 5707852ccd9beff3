"""The MLP probe against torch's own layers, optimiser and schedule, and a head in the pack against the head alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from medssl.probes.mlp import MlpHeads, MlpProbeParams, predict_mlp_heads, train_mlp_heads
from medssl.views import generator_for

SMALL = MlpProbeParams(hidden=12, epochs=6, batch_size=32, step_epochs=2, vary=("head", "order"))


def problem(images: int = 150, width: int = 10, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes on rings about one centre, which no line parts, with badly scaled features."""
    rng = np.random.default_rng(0)
    labels = rng.choice(classes, size=images, p=[0.6, 0.3, 0.1])
    direction = rng.normal(size=(images, width))
    features = direction / np.linalg.norm(direction, axis=1, keepdims=True) * (1 + 2 * labels[:, None])
    features = (features + 0.2 * rng.normal(size=features.shape)) * np.geomspace(0.1, 10, width) + 3
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


def by_torch(
    features: torch.Tensor, labels: torch.Tensor, seed: int, params: MlpProbeParams, rate: float, decay: float
) -> nn.Module:
    """One head trained with torch.nn, torch.optim and StepLR, in the order and from the start that the probe documents."""
    wide = features.double()
    scaled = (wide - wide.mean(0)) / wide.std(0, correction=0)
    network = nn.Sequential(nn.Linear(features.shape[1], params.hidden), nn.ReLU(), nn.Linear(params.hidden, 3)).double()
    generator = generator_for("probe", "mlp head", seed)
    with torch.no_grad():
        for layer in (network[0], network[2]):
            bound = layer.in_features**-0.5
            drawn = (2 * torch.rand(layer.out_features, layer.in_features + 1, generator=generator) - 1) * bound
            layer.weight.copy_(drawn[:, :-1])
            layer.bias.copy_(drawn[:, -1])
    groups = [
        {"params": [network[0].weight, network[2].weight], "weight_decay": decay},
        {"params": [network[0].bias, network[2].bias], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.Adam(groups, rate) if params.optimiser == "adam" else torch.optim.SGD(groups, rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, params.step_epochs, params.step_factor)
    weights = len(labels) / (3 * torch.bincount(labels).double())
    order = generator_for("probe", "order", seed)
    for _ in range(params.epochs):
        for batch in torch.randperm(len(labels), generator=order).split(params.batch_size):
            losses = nn.functional.cross_entropy(network(scaled[batch]), labels[batch], reduction="none")
            optimiser.zero_grad()
            (losses * weights[labels[batch]]).mean().backward()
            optimiser.step()
        schedule.step()
    return nn.Sequential(Standard(wide), network, nn.Softmax(1))


class Standard(nn.Module):
    """Features as the training saw them."""

    def __init__(self, wide: torch.Tensor) -> None:
        super().__init__()
        self.mean, self.std = wide.mean(0), wide.std(0, correction=0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features.double() - self.mean) / self.std


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_equals_torchs_layers_optimiser_and_schedule(optimiser: str) -> None:
    features, labels = problem()
    params = SMALL.model_copy(update={"optimiser": optimiser})
    heads = train_mlp_heads(features, labels, 3, [4, 9], params, learning_rate=0.01, weight_decay=0.02)
    found = predict_mlp_heads(features, heads)
    for position, seed in enumerate((4, 9)):
        expected = by_torch(features, labels, seed, params, 0.01, 0.02)(features)
        torch.testing.assert_close(found[position].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("vary", [("head",), ("head", "order"), ("head", "order", "augmentation")])
def test_a_head_in_the_pack_equals_the_head_alone(vary: tuple[str, ...]) -> None:
    features, labels = problem()
    params = MlpProbeParams(hidden=32, epochs=20, vary=vary)
    noise = torch.randn(3, *features.shape, generator=torch.Generator().manual_seed(5))
    bank = features + 0.3 * noise if "augmentation" in vary else None

    def probabilities(seeds: Sequence[int]) -> torch.Tensor:
        heads = train_mlp_heads(features, labels, 3, seeds, params, learning_rate=0.01, bank_PNE=bank)
        return predict_mlp_heads(features, heads)

    together = probabilities(range(35))
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    for seed in (0, 17, 34):
        alone = probabilities([seed])[0]
        assert torch.equal(alone.argmax(dim=1), together[seed].argmax(dim=1))
        torch.testing.assert_close(alone, together[seed], atol=1e-5, rtol=0)


def test_a_grid_in_one_pack_equals_its_points() -> None:
    features, labels = problem()
    packed = train_mlp_heads(features, labels, 3, [7, 7], SMALL, learning_rate=[0.003, 0.03], weight_decay=[0.1, 0.0])
    for place, (rate, decay) in enumerate(((0.003, 0.1), (0.03, 0.0))):
        single = train_mlp_heads(features, labels, 3, [7], SMALL, learning_rate=rate, weight_decay=decay)
        for mine, whole in zip(single, packed, strict=True):
            torch.testing.assert_close(mine[0], whole[place], atol=1e-5, rtol=1e-4)


def test_learns_what_no_linear_head_can() -> None:
    features, labels = problem()
    heads = train_mlp_heads(features, labels, 3, [0], MlpProbeParams(hidden=64, vary=("head", "order")), learning_rate=0.01)
    assert isinstance(heads, MlpHeads)
    assert (predict_mlp_heads(features, heads)[0].argmax(1) == labels).float().mean() > 0.95


def test_refusals() -> None:
    features, labels = problem()
    with pytest.raises(ValueError, match="bank of augmented features"):
        train_mlp_heads(features, labels, 3, [0], MlpProbeParams(), learning_rate=0.01)
    with pytest.raises(ValueError, match="there is no seed"):
        train_mlp_heads(features, labels, 3, [], SMALL, learning_rate=0.01)
    with pytest.raises(ValidationError, match="hidden"):
        MlpProbeParams(hidden=0)
