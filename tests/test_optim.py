"""Optimisers and schedules against golden values, torch's own, and closed forms."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from medssl.optim import (
    LARS,
    OptimiserParams,
    ScheduleParams,
    apply_rate,
    build_optimiser,
    clip_gradient,
    one_cycle,
    scheduled,
    warmup_cosine,
)

GOLDEN = Path(os.environ.get("MEDSSL_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "golden"


def golden(beginning: str) -> dict[str, object]:
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden values at {GOLDEN}: set MEDSSL_SHARED to the folder that has them")
    values = json.loads((GOLDEN / "golden.json").read_text())
    (found,) = [value for name, value in values.items() if name.startswith(beginning)]
    return dict(found)


class TwoParameters(nn.Module):
    def __init__(self, w: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)


def test_lars_golden() -> None:
    expected = golden("lars ")
    inputs = np.load(GOLDEN / "golden.npz")
    z1, z2 = torch.tensor(inputs["z1"]), torch.tensor(inputs["z2"])
    module = TwoParameters(z1[:4, :6].clone(), z1[4, :6].clone())
    params = OptimiserParams(name="lars", learning_rate=0.2, weight_decay=1e-3, momentum=0.9, trust_coefficient=0.001)
    optimiser = build_optimiser(module, params)
    assert isinstance(optimiser, LARS)
    for k in range(3):
        module.w.grad, module.b.grad = z2[4 * k : 4 * k + 4, :6].clone(), z2[20 + k, :6].clone()
        optimiser.step()
    torch.testing.assert_close(module.w.detach(), torch.tensor(expected["w"], dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(module.b.detach(), torch.tensor(expected["b"], dtype=torch.float64), rtol=1e-9, atol=0)


def test_lars_scales_by_one_where_a_norm_is_zero() -> None:
    module = TwoParameters(torch.zeros(2, 2), torch.zeros(2))
    optimiser = build_optimiser(module, OptimiserParams(name="lars", learning_rate=0.5))
    module.w.grad, module.b.grad = torch.ones(2, 2), torch.ones(2)
    optimiser.step()
    assert torch.equal(module.w.detach(), torch.full((2, 2), -0.5))
    module.w.grad = torch.zeros(2, 2)
    module.w.data.zero_()
    optimiser.step()
    assert bool(torch.isfinite(module.w).all())


def test_authors_schedule_golden() -> None:
    expected = golden("barlow_twins lr schedule")
    module = TwoParameters(torch.ones(2, 2), torch.ones(2))
    scale = 512 / 256
    optimiser = build_optimiser(
        module, OptimiserParams(name="lars", learning_rate=0.2 * scale, bias_learning_rate=0.0048 * scale)
    )
    schedule = ScheduleParams(name="warmup_cosine", warmup_epochs=10, final_factor=0.001)
    for step, (weights, biases) in expected.items():  # type: ignore[misc]
        rate = apply_rate(optimiser, scheduled(schedule, int(step), 1000, 10))
        assert rate == pytest.approx(weights, rel=1e-12, abs=1e-15)
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([weights, biases], rel=1e-12, abs=1e-15)


def test_warmup_cosine_without_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, 10, 0, 0.001) == 1
    assert warmup_cosine(5, 10, 0, 0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("per_epoch", [1, 4, 5000])
def test_a_warmup_in_steps_is_the_same_whatever_an_epoch_has(per_epoch: int) -> None:
    schedule = ScheduleParams(warmup_steps=977, final_factor=0.0)
    for step in (0, 1, 488, 976):
        assert scheduled(schedule, step, 97_656, per_epoch).factor == pytest.approx(step / 977)
    for step in (977, 49_316, 97_655):
        down = 0.5 * (1 + math.cos(math.pi * (step - 977) / (97_656 - 977)))
        assert scheduled(schedule, step, 97_656, per_epoch).factor == pytest.approx(down)


def test_a_warmup_is_in_epochs_or_in_steps_and_schedules_in_epochs_keep_their_names() -> None:
    with pytest.raises(ValidationError, match=r"warmup_epochs is 10\.0 and warmup_steps 977: give one of them"):
        ScheduleParams(warmup_epochs=10, warmup_steps=977)
    assert "warmup_steps" not in ScheduleParams(warmup_epochs=10).canonical()
    given = ScheduleParams(warmup_steps=977)
    assert given.canonical()["warmup_steps"] == 977 and ScheduleParams.model_validate(given.canonical()) == given


def test_one_cycle() -> None:
    values = [one_cycle(step, 100, 0.25, 0.95, 0.85) for step in range(100)]
    factors, momenta = zip(*values, strict=True)
    assert values[0] == pytest.approx((1 / 25, 0.95))
    assert values[25] == pytest.approx((1.0, 0.85))
    # Half-way up and half-way down the cosines are at their means.
    assert one_cycle(1, 8, 0.25, 0.95, 0.85) == pytest.approx(((1 / 25 + 1) / 2, 0.9))
    assert one_cycle(5, 8, 0.25, 0.95, 0.85) == pytest.approx(((1 + 1e-5) / 2, 0.9))
    assert list(factors[:26]) == sorted(factors[:26])
    assert list(factors[25:]) == sorted(factors[25:], reverse=True)
    assert 1e-5 < factors[-1] < 1e-3
    assert max(momenta) == 0.95 and min(momenta) == 0.85


@pytest.mark.parametrize(("name", "key"), [("adamw", "betas"), ("sgd", "momentum"), ("lars", "momentum")])
def test_one_cycle_moves_the_momentum(name: str, key: str) -> None:
    optimiser = build_optimiser(TwoParameters(torch.ones(2, 2), torch.ones(2)), OptimiserParams(name=name))
    apply_rate(optimiser, scheduled(ScheduleParams(name="one_cycle"), 25, 100, 10))
    for group in optimiser.param_groups:
        assert (group[key][0] if key == "betas" else group[key]) == pytest.approx(0.85)
        assert group["lr"] == pytest.approx(1.5e-3)


def test_constant() -> None:
    assert all(scheduled(ScheduleParams(name="constant"), step, 10, 5) == (1.0, None) for step in range(10))


def test_groups_exclude_one_dimensional_parameters_from_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    network[0].weight.requires_grad_(False)
    params = OptimiserParams(name="adamw", weight_decay=0.1, learning_rate=0.01, bias_learning_rate=0.002)
    weights, flat = build_optimiser(network, params).param_groups
    assert [tuple(p.shape) for p in weights["params"]] == [(2, 4)]
    assert all(p.ndim == 1 for p in flat["params"]) and len(flat["params"]) == 4
    assert (weights["weight_decay"], flat["weight_decay"]) == (0.1, 0.0)
    assert (weights["lr"], flat["lr"]) == (0.01, 0.002)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_torchs_optimisers_get_the_parameters(name: str) -> None:
    ours, theirs = (TwoParameters(torch.linspace(-1, 1, 6).view(2, 3), torch.ones(3)) for _ in range(2))
    params = OptimiserParams(name=name, learning_rate=0.1, weight_decay=0.2, momentum=0.8, second_momentum=0.9, epsilon=1e-4)
    optimiser = build_optimiser(ours, params)
    groups = [{"params": [theirs.w], "weight_decay": 0.2}, {"params": [theirs.b], "weight_decay": 0.0}]
    reference: torch.optim.Optimizer
    if name == "sgd":
        reference = torch.optim.SGD(groups, 0.1, momentum=0.8)
    else:
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        reference = kind(groups, 0.1, (0.8, 0.9), 1e-4)
    for k in range(3):
        for module, stepped in ((ours, optimiser), (theirs, reference)):
            module.w.grad, module.b.grad = torch.full((2, 3), 0.3 + k), torch.full((3,), -0.2)
            stepped.step()
    assert torch.equal(ours.w, theirs.w) and torch.equal(ours.b, theirs.b)


def test_clipping() -> None:
    module = TwoParameters(torch.ones(2, 2), torch.ones(2))
    module.w.grad, module.b.grad = torch.full((2, 2), 3.0), torch.full((2,), 4.0)
    norm = math.sqrt(4 * 9 + 2 * 16)
    assert clip_gradient(module.parameters(), None).item() == pytest.approx(norm)
    assert module.w.grad[0, 0] == 3.0
    assert clip_gradient(module.parameters(), 1.0).item() == pytest.approx(norm)
    assert math.hypot(*module.w.grad.flatten(), *module.b.grad) == pytest.approx(1.0, rel=1e-5)
    module.b.grad[0] = math.nan
    assert math.isnan(clip_gradient(module.parameters(), 1.0).item())


def test_momenta_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"momentum_low 0.9 is above momentum_high 0.8"):
        ScheduleParams(name="one_cycle", momentum_low=0.9, momentum_high=0.8)
