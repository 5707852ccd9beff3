"""The learning-rate finder on known curves, and on a training that it must leave as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medssl.collectives import Process
from medssl.networks import save_weights
from medssl.training.feed import Batch
from medssl.training.finder import HIGHEST, LOWEST, STEPS, RangeTest, range_test, valley
from medssl.training.plan import PretrainPlan
from medssl.training.step import Stepper

CPU = Process(0, 1, torch.device("cpu"))


def test_a_curve_with_a_valley() -> None:
    """Flat, then a fall over two decades, then an explosion: the choice lies on the fall, in front of the minimum."""
    seen: list[float] = []

    def step(rate: float) -> float:
        seen.append(rate)
        fall = 1 / (1 + math.exp(-4 * (math.log10(rate) + 3)))  # around 1e-3
        return 2 - fall + (rate / 0.1) ** 2

    found = range_test(step)
    assert seen[0] == pytest.approx(LOWEST) and len(seen) <= STEPS and seen == found.learning_rates
    assert seen[1] / seen[0] == pytest.approx((HIGHEST / LOWEST) ** (1 / 99))
    assert found.losses[-1] > 4 * min(found.losses) > found.losses[-2] or len(seen) == STEPS
    lowest = found.learning_rates[found.losses.index(min(found.losses))]
    assert 1e-5 < found.chosen < lowest
    assert RangeTest.from_json(found.to_json()) == found


def test_valley_by_hand() -> None:
    rates = [10.0**-k for k in range(9, 0, -1)]
    losses = [5, 5, 4, 3, 2, 1, 6, 7, 8]  # five falling ones end at place 5, so from place 0: a third is 1.67, its half 0.83
    assert valley(rates, losses) == pytest.approx(rates[0 + 1 + 0])
    assert valley([1.0, 2.0], [float("nan"), 3.0]) == 2.0
    with pytest.raises(ValueError, match="no finite loss"):
        valley([1.0], [float("inf")])


def test_the_training_is_left_as_it_was() -> None:
    fields: dict[str, Any] = {
        "encoder": {"name": "test_resnet", "image_px": 32}, "objective": {"name": "byol", "projector": (32, 24)},
        "optimiser": {}, "schedule": {}, "views": {}, "epochs": 2, "batch_size": 12, "seed": 3, "learning_rate_finder": True,
    }  # fmt: skip
    stepper = Stepper(PretrainPlan.model_validate(fields), CPU, 2)
    images = torch.randint(0, 256, (12, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = save_weights(stepper.module)
    endless = iter(lambda: Batch(images, torch.arange(12)), None)
    found = stepper.find_rate(endless, 0)
    assert {group["peak"] for group in stepper.optimiser.param_groups} == {found.chosen}
    assert save_weights(stepper.module) == before and not stepper.optimiser.state
    assert stepper.peak_rate == found.chosen == stepper.optimiser.param_groups[0]["peak"]
    assert LOWEST < found.chosen < HIGHEST and len(found.losses) > 20


