"""What a training step of each method costs beside the bare encoder's.

    python tests/benchmarks/method_rates.py [RECIPE] [--steps 4] [--rounds 3] [--device cpu]

Takes the pretrained arms of a recipe (jobs/ham10000-methods.yaml), with their views, batch and precision, on random images;
pairs of a bag are two images here. In each round every arm makes its steps after the others, and so does the bare encoder:
forward and backward of two views that are there already, and nothing else. Printed are images/s (median over rounds) and the
share of the bare encoder's rate in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from medssl.collectives import Process
from medssl.networks import build_encoder
from medssl.recipe import Recipe
from medssl.recipe_file import load
from medssl.training.feed import Batch
from medssl.training.step import Stepper

RECIPE = Path(__file__).resolve().parents[2] / "jobs" / "ham10000-methods.yaml"
BARE = "bare encoder"


def steps_of(recipe: Recipe, process: Process) -> dict[str, Callable[[], None]]:
    """One step of each, by name; the bare encoder first."""
    arms = [arm for arm in recipe.arms if arm.objective is not None]
    first = recipe.plan(arms[0], 0)
    px, device = recipe.images.decode_px, process.device
    stored, second = (torch.randint(0, 256, (first.batch_size, px, px, 3), dtype=torch.uint8) for _ in range(2))
    rows = torch.arange(first.batch_size)

    views = torch.randn(2, first.batch_size, 3, first.encoder.image_px, first.encoder.image_px, device=device)
    encoder = build_encoder(first.encoder, 0).to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    reduced = torch.autocast(device.type, torch.bfloat16) if first.precision == "bfloat16" else nullcontext()

    def bare() -> None:
        with reduced:
            total = sum(encoder(view.contiguous(memory_format=torch.channels_last)).float().square().mean() for view in views)
        encoder.zero_grad()
        total.backward()

    found: dict[str, Callable[[], None]] = {BARE: bare}
    for arm in arms:
        plan = recipe.plan(arm, 0)
        stepper = Stepper(plan, process, 50)
        batch = Batch(stored, rows, second, rows) if plan.pairs == "bag" else Batch(stored, rows)

        def one(stepper: Stepper = stepper, batch: Batch = batch) -> None:
            stepper.step(batch, 60)

        found[arm.name] = one
    return found


def seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    recipe, process = load(options.recipe), Process(0, 1, torch.device(options.device))
    steps = steps_of(recipe, process)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds(step, 2, process.device)  # warming up
    for _ in range(options.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, options.steps, process.device))
    batch = next(arm.batch_size for arm in recipe.arms if arm.objective is not None)
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    what = f"{recipe.encoder.name} at {recipe.encoder.image_px} px, batch {batch}"
    print(f"{what}, {options.rounds} x {options.steps} steps, {where}")
    for name, times in taken.items():
        shares = [bare / own for bare, own in zip(taken[BARE], times, strict=True)]
        rate = batch * options.steps / statistics.median(times)
        spread = f"{statistics.median(shares):.2f} of the bare encoder's ({min(shares):.2f} to {max(shares):.2f})"
        print(f"{name:16} {rate:8.1f} images/s   {spread}")


if __name__ == "__main__":
    main()
