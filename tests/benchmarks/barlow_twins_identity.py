"""What the identity of `objectives/barlow_twins.py` saves: the loss without the D x D matrix against the loss with it.

    python tests/benchmarks/barlow_twins_identity.py [--rows 128] [--width 8192] [--repeats 7]

Both forms see the same float32 embeddings, forward and backward, one after the other in each round; printed are the median
seconds, their ratio, and the largest memory each holds at a time beside its inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from medssl.collectives import batch_normalise
from medssl.objectives import barlow_twins_loss

LAMBDA = 0.0051


def with_matrix(z1: Tensor, z2: Tensor) -> Tensor:
    """The authors' form."""
    c = batch_normalise(z1).T @ batch_normalise(z2) / len(z1)
    diagonal = torch.diagonal(c)
    return (diagonal - 1).square().sum() + LAMBDA * (c.square().sum() - diagonal.square().sum())


def without_matrix(z1: Tensor, z2: Tensor) -> Tensor:
    """medssl's form for fewer rows than features."""
    return barlow_twins_loss(z1, z2, LAMBDA)


def once(loss: Callable[[Tensor, Tensor], Tensor], z: list[Tensor]) -> tuple[float, float, Tensor]:
    """Seconds, loss and gradient of the first view."""
    leaves = [each.clone().requires_grad_() for each in z]
    started = time.perf_counter()
    value = loss(*leaves)
    value.backward()
    assert leaves[0].grad is not None
    return time.perf_counter() - started, float(value.detach()), leaves[0].grad


def largest_memory(loss: Callable[[Tensor, Tensor], Tensor], z: list[Tensor]) -> float:
    """MiB held at once by the allocator's own account, beside the inputs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        once(loss, z)
    held = largest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    return largest / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(options.rows, options.width, generator=generator)
    z = [first, first + torch.randn(options.rows, options.width, generator=generator)]
    forms = {"with the D x D matrix": with_matrix, "without": without_matrix}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(options.repeats + 1):
        for name, form in forms.items():
            taken = once(form, z)[0]
            if round_:  # the first is for warming up
                seconds[name].append(taken)
    print(f"B = {options.rows}, D = {options.width}, float32, {torch.get_num_threads()} threads")
    for name, form in forms.items():
        median = statistics.median(seconds[name])
        print(f"{name:24} {median * 1e3:9.1f} ms   {largest_memory(form, z):8.0f} MiB   loss {once(form, z)[1]:.6f}")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"ratio of times: median {statistics.median(ratios):.1f}, {min(ratios):.1f} to {max(ratios):.1f}")


if __name__ == "__main__":
    main()
