"""What the stages of a plan that are still to do will take on given hardware: an estimate from counted operations.

The forward pass of each arm's encoder is counted (multiplications and additions, no memory is used for it), a backward pass taken
for two of them, and both divided by what the hardware does in a second. Decoding, data loading and the heads of probes are not
in it. A GPU is taken to do a fifth of its printed peak in half precision, which is an assumption, not a measurement. `here`
measures a training step on this machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medssl.arms import Arm
from medssl.errors import RecipeError, nearest
from medssl.networks.encoder import EncoderParams
from medssl.recipe import Recipe
from medssl.study import PlanLine

PEAK_TFLOPS: Mapping[str, float] = {
    "t4": 65, "v100": 125, "rtx3090": 71, "rtx4090": 165, "l40s": 362, "a100": 312, "h100": 989, "h200": 989,
}  # fmt: skip
"""Half-precision tensor operations in a second at most, dense, by the makers' data sheets; trillions."""
ACHIEVED = 0.2
"""Share of the peak that training is assumed to reach."""
HERE = "here"


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind."""

    name: str
    devices: int
    flops: float
    """Operations that one does in a second, in training."""
    basis: str
    """Where that is from, for people."""


@dataclass(frozen=True)
class Cost:
    """What a plan's stages still take."""

    hours: dict[str, float]
    """By stage."""
    hardware: Hardware
    price: float | None
    """Of one device for an hour; None where it is not given."""

    @property
    def total(self) -> float:
        """Hours of all stages together."""
        return sum(self.hours.values())

    def to_text(self) -> str:
        """One line for people."""
        device_hours = self.total * self.hardware.devices
        parts = ", ".join(f"{stage} {_hours(hours)}" for stage, hours in self.hours.items() if hours)
        money = "" if self.price is None else f", {device_hours * self.price:,.2f} at {self.price:g} for a device and hour"
        return (
            f"about {_hours(self.total)} on {self.hardware.name} ({parts or 'nothing to do'}), {device_hours:,.1f} device hours"
            f"{money}; {self.hardware.basis}; decoding and loading are not counted"
        )


def hardware(text: str) -> Hardware:
    """Hardware by its name: `a100`, `8xh100`, or `here`, which is measured for some seconds.

    Raises:
        RecipeError: no such name or number.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)", text.lower())
    count, name = (int(found[1] or 1), found[2]) if found else (0, text)
    if name == HERE and count == 1:
        flops = measured_flops()
        return Hardware("this machine", 1, flops, f"measured: {flops / 1e9:,.0f} billion operations a second in training")
    if name not in PEAK_TFLOPS or not count:
        choices = (*PEAK_TFLOPS, HERE)
        raise RecipeError(f"--hardware is {text!r}: {nearest(name, choices)}; several are 8xh100, this machine is {HERE}")
    basis = f"assumed: {ACHIEVED:.0%} of {PEAK_TFLOPS[name]:g} trillion operations a second each"
    return Hardware(f"{count} x {name}", count, ACHIEVED * PEAK_TFLOPS[name] * 1e12, basis)


def cost(recipe: Recipe, lines: Sequence[PlanLine], on: Hardware, price: float | None = None) -> Cost:
    """Hours of a plan's stages that are not finished, all devices at work all the time."""
    if price is not None and not (price >= 0 and math.isfinite(price)):
        raise RecipeError(f"--price is {price:g}: give what a device costs in an hour, 0 or more")
    arms = {arm.name: arm for arm in recipe.arms}
    counted: dict[EncoderParams, float] = {}
    hours: dict[str, float] = {}
    for line in lines:
        arm = arms.get(line.arm)
        if arm is None or not line.images:
            continue
        encoder = recipe.encoder_of(arm)
        if encoder not in counted:
            counted[encoder] = forward_flops(encoder)
        seconds = line.images * passes(line.stage, arm, encoder) * counted[encoder] / (on.flops * on.devices)
        hours[line.stage] = hours.get(line.stage, 0.0) + seconds / 3600
    return Cost(hours, on, price)


def passes(stage: str, arm: Arm, encoder: EncoderParams) -> float:
    """Forward passes that an image costs in a stage, a backward pass counted as two.

    In a pretraining both views and, by their area, small crops; BYOL's target sees both views as well. Images that a fine-tuning
    only judges are counted like those it trains on, since a plan's line does not tell them apart: a little too much.
    """
    if arm.features == "colour":
        return 0.0
    if stage == "pretrain" and arm.objective is not None:
        views = 2 + arm.views.small_crops * (arm.views.small_px / encoder.image_px) ** 2
        return 3 * views + (2 if arm.objective.name == "byol" else 0)
    if stage == "initialise":
        return 1.0 if arm.initial_weights == "random" else 0.0
    return 3.0 if stage in ("search", "evaluate") else 1.0


def forward_flops(encoder: EncoderParams) -> float:
    """Multiplications and additions of one image's forward pass, counted on a network without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from medssl.networks.encoder import build_encoder
    from medssl.networks.own import is_own

    device = "cpu" if is_own(encoder.name) else "meta"
    with torch.device(device):
        network = build_encoder(encoder, 0).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, encoder.channels, encoder.image_px, encoder.image_px, device=device))
    return float(counter.get_total_flops())


def measured_flops(steps: int = 3) -> float:
    """Operations that this machine does in a second while it trains a ResNet-18 at 64 px, on its GPU where it has one."""
    import torch

    from medssl.collectives import Process
    from medssl.training.bench import measure_encoder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = EncoderParams(name="resnet18", image_px=64)
    batch = 256 if device.type == "cuda" else 32
    return 3 * forward_flops(encoder) * measure_encoder(encoder, batch, Process(0, 1, device), steps=steps)


def _hours(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:,.1f} h"
