"""The learning-rate finder: a range test, as paper 000 uses it (fastai's `lr_find` with its `valley` suggestion)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
_SMOOTHING = 0.98
_GIVE_UP = 4.0
"""The test stops where the smoothed loss is so many times the best."""


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw."""

    learning_rates: list[float]
    losses: list[float]
    """Smoothed loss after the step with each learning rate."""
    chosen: float

    def to_json(self) -> bytes:
        """As stored beside the training."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> RangeTest:
        """What `to_json` wrote."""
        return cls(**json.loads(data))


def valley(learning_rates: Sequence[float], losses: Sequence[float]) -> float:
    """The learning rate in the middle of the longest fall of the loss: between its steepest part and its minimum.

    fastai's rule: of the longest falling subsequence of losses the point half-way through its middle third. The first tenth
    and the last five points do not count.
    """
    rates, values = list(learning_rates), list(losses)
    if len(rates) > 20:
        rates, values = rates[len(rates) // 10 : -5], values[len(values) // 10 : -5]
    kept = [(rate, value) for rate, value in zip(rates, values, strict=True) if math.isfinite(value)]
    if not kept:
        raise ValueError("no finite loss in the range test")
    lengths = [1] * len(kept)
    end = 0
    for i in range(1, len(kept)):
        lengths[i] = 1 + max((lengths[j] for j in range(i) if kept[i][1] < kept[j][1]), default=0)
        if lengths[i] > lengths[end]:
            end = i
    start = max(0, end - lengths[end])
    third = (end - start) / 3
    return kept[start + int(third) + int(third / 2)][0]


def range_test(step: Callable[[float], float]) -> RangeTest:
    """Trains with rising learning rates, 1e-7 to 10 over 100 steps, until the loss is 4 times its best.

    `step` trains one step with the learning rate given and returns its loss. Raises ValueError when no loss is finite.
    """
    rates: list[float] = []
    losses: list[float] = []
    average, best = 0.0, math.inf
    for number in range(STEPS):
        rate = LOWEST * (HIGHEST / LOWEST) ** (number / (STEPS - 1))
        loss = step(rate)
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smooth = average / (1 - _SMOOTHING ** (number + 1))
        if not math.isfinite(loss):
            break
        rates.append(rate)
        losses.append(smooth)
        best = min(best, smooth)
        if number > 0 and smooth > _GIVE_UP * best > 0:
            break
    return RangeTest(rates, losses, valley(rates, losses))
