"""Speed of feeding and of a training step on this machine, measured as training does them. No Ray.

Shapes: B images of this rank, H, W, C stored images.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from medssl.collectives import Process
from medssl.networks.encoder import EncoderParams, build_encoder
from medssl.training.feed import Batch, Feed
from medssl.training.plan import PretrainPlan
from medssl.training.step import Stepper


@dataclass(frozen=True)
class StepSpeed:
    """Speed of training on one process."""

    images_per_second: float
    """Through the whole step: views, network, loss, update."""
    views_per_second: float
    """Images per second through the making of both views alone."""
    steps: int
    seconds: float
    """Seconds that `steps` whole steps took."""


def _endless(feed: Feed) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from feed.batches(epoch)


def _seconds(process: Process, steps: int, body: Callable[[int], object]) -> float:
    """Seconds for `body(step)` over `steps` steps, the device's queue emptied before and after."""
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    started = time.perf_counter()
    for step in range(steps):
        body(step)
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    return time.perf_counter() - started


def measure_feed(feed: Feed, batches: int = 50) -> float:
    """Images per second of this rank's feed with nobody training."""
    source = _endless(feed)
    first = next(source)
    started = time.perf_counter()
    for _ in range(batches):
        next(source)
    return batches * len(first.images_BHWC) / (time.perf_counter() - started)


def measure_step(plan: PretrainPlan, feed: Feed, process: Process, *, steps: int = 5, warmup: int = 2) -> StepSpeed:
    """Trains `warmup` + `steps` steps of `plan` on one process and measures the latter."""
    stepper = Stepper(plan, process, max(feed.steps_per_epoch, warmup + steps))
    source = _endless(feed)
    for done in range(warmup):
        stepper.step(next(source), done)
    seconds = _seconds(process, steps, lambda step: stepper.step(next(source), warmup + step))
    batch = next(source)
    views_seconds = _seconds(process, steps, lambda step: stepper.make_views(batch, step))
    images = steps * len(batch.images_BHWC)
    return StepSpeed(images / seconds, images / views_seconds, steps, seconds)


def measure_encoder(encoder: EncoderParams, batch: int, process: Process, *, steps: int = 3, warmup: int = 1) -> float:
    """Images per second of the encoder's forward and backward pass alone, in bfloat16 on a GPU and in float32 on a CPU."""
    network = build_encoder(encoder, 0).to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images_BCHW = torch.randn(batch, encoder.channels, encoder.image_px, encoder.image_px, device=process.device)
    images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)

    def step(_: int) -> None:
        with torch.autocast(process.device.type, torch.bfloat16, enabled=process.device.type == "cuda"):
            features_BE = network(images_BCHW)
        features_BE.float().square().mean().backward()

    for number in range(warmup):
        step(number)
    return steps * batch / _seconds(process, steps, step)
