"""What lockstep saves: many heads of a probe trained as one against as many whole single runs, image passes included.

    python tests/benchmarks/lockstep_probes.py [--seeds 35] [--labelled 500] [--judged 500] [--rounds 2] [--cpu-clock]

A single run is what a plain script does for a seed: the features of the labelled and of the judged images by a ResNet-18 at
64 px, a head trained on the first, probabilities of the second. Lockstep makes the features once and trains all heads as
batched matrix products. Every single run is made and timed; its image passes are made once a seed and counted for each of the
two probes. In each round lockstep and single runs follow each other; each round begins with the other one.

Checked is that each seed's probabilities are within 1e-5 of its single run's, and its most probable classes the same.
Heads vary in start and order. Images are noise about a brightness that tells the class somewhat.

Shapes: S seeds, N images, E feature width, K classes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from medssl.networks import build_encoder
from medssl.networks.encoder import EncoderParams, estimate_batch_norm, save_weights
from medssl.probes.heads import ProbeParams, apply_heads, fit_heads
from medssl.probes.linear import LinearProbeParams
from medssl.probes.mlp import MlpProbeParams
from medssl.stages.embed import embed
from medssl.training.feed import ResidentImages
from medssl.views import eval_view

ENCODER = EncoderParams(name="resnet18", image_px=64)
CLASSES = 7
POINT = {"learning_rate": 0.003, "weight_decay": 0.01}
TOLERANCE = 1e-5
T = TypeVar("T")


class Job(NamedTuple):
    """What every run is given."""

    images: ResidentImages
    labels_N: Tensor
    weights: bytes
    labelled: int
    device: str
    clock: Callable[[], float]


def timed(function: Callable[[], T], job: Job) -> tuple[T, float]:
    """The result, and the seconds until the device has it."""
    began = job.clock()
    found = function()
    if job.device.startswith("cuda"):
        torch.cuda.synchronize()
    return found, job.clock() - began


def prepare(folder: Path, labelled: int, judged: int, device: str, clock: Callable[[], float]) -> Job:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(CLASSES, size=labelled + judged)
    noise = rng.normal(0, 50, (len(labels_N), 64, 64, 3)) + 90 + 10 * labels_N[:, None, None, None]
    ids = [f"{n:06d}" for n in range(len(labels_N))]
    images = ResidentImages.write(folder / "images", np.clip(noise, 0, 255).astype(np.uint8), ids)
    encoder = build_encoder(ENCODER, 0)
    estimate_batch_norm(encoder, [eval_view(torch.from_numpy(np.array(images.images[:256])), ENCODER)])
    return Job(images, torch.from_numpy(labels_N), save_weights(encoder), labelled, device, clock)


def features(job: Job) -> tuple[Tensor, Tensor]:
    """Of the labelled and of the judged images."""
    rows = np.arange(len(job.labels_N))
    found = [embed(job.weights, ENCODER, job.images, part, device=job.device) for part in np.split(rows, [job.labelled])]
    first, second = (torch.from_numpy(part_NE).to(job.device) for part_NE in found)
    return first, second


def heads(job: Job, params: ProbeParams, features_NE: tuple[Tensor, Tensor], seeds: list[int]) -> Tensor:
    """Trains the heads of these seeds together; probabilities (S, N, K) of the judged images."""
    labels_N = job.labels_N[: job.labelled].to(job.device)
    fitted = fit_heads(params, features_NE[0], labels_N, CLASSES, seeds, POINT)
    return apply_heads(params, fitted, features_NE[1], CLASSES).cpu()


class Taken(NamedTuple):
    """Seconds of a round, by probe where they are the heads'."""

    passes: float
    heads: dict[str, float]
    found: dict[str, Tensor]
    """Probabilities (S, N, K)."""


def in_lockstep(job: Job, probes: dict[str, ProbeParams], seeds: list[int]) -> Taken:
    table, passes = timed(lambda: features(job), job)
    results = {name: timed(partial(heads, job, params, table, seeds), job) for name, params in probes.items()}
    taken, found = ({name: result[i] for name, result in results.items()} for i in (1, 0))
    return Taken(passes, taken, found)  # type: ignore[arg-type]


def one_by_one(job: Job, probes: dict[str, ProbeParams], seeds: list[int]) -> Taken:
    runs = [in_lockstep(job, probes, [seed]) for seed in seeds]
    return Taken(
        sum(run.passes for run in runs),
        {name: sum(run.heads[name] for run in runs) for name in probes},
        {name: torch.cat([run.found[name] for run in runs]) for name in probes},
    )


def spread(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=35)
    parser.add_argument("--labelled", type=int, default=500)
    parser.add_argument("--judged", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--linear-epochs", type=int, default=LinearProbeParams().epochs)
    parser.add_argument("--mlp-epochs", type=int, default=MlpProbeParams().epochs)
    parser.add_argument("--probes", nargs="+", choices=("linear", "mlp"), default=["linear", "mlp"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cpu-clock", action="store_true", help="seconds of this process on the CPU: for a machine that is busy with others"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_clock else time.perf_counter
    given: dict[str, ProbeParams] = {
        "linear": LinearProbeParams(vary=("head", "order"), epochs=options.linear_epochs),
        "mlp": MlpProbeParams(vary=("head", "order"), epochs=options.mlp_epochs),
    }
    probes = {name: given[name] for name in dict.fromkeys(options.probes)}
    seeds = list(range(options.seeds))
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), options.labelled, options.judged, options.device, clock)
        brief = {name: params.model_copy(update={"epochs": 1}) for name, params in probes.items()}
        in_lockstep(job, brief, seeds)  # warming up
        rounds = []
        for number in range(options.rounds):
            order = (in_lockstep, one_by_one) if number % 2 == 0 else (one_by_one, in_lockstep)
            taken = {make: make(job, probes, seeds) for make in order}
            rounds.append((taken[in_lockstep], taken[one_by_one]))
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    where += ", CPU seconds" if options.cpu_clock else ""
    print(
        f"{ENCODER.name} at {ENCODER.image_px} px, {options.labelled} labelled and {options.judged} judged images, "
        f"{options.seeds} seeds, {options.rounds} rounds, {where}"
    )
    for name, params in probes.items():
        report(name, params.epochs, rounds)  # type: ignore[union-attr]


def report(name: str, epochs: int, rounds: list[tuple[Taken, Taken]]) -> None:
    """Seconds and ratios of a probe; AssertionError where lockstep and single runs do not agree."""
    whole = [(one.passes + one.heads[name]) / (all_.passes + all_.heads[name]) for all_, one in rounds]
    alone = [one.heads[name] / all_.heads[name] for all_, one in rounds]
    apart = max(float((all_.found[name] - one.found[name]).abs().max()) for all_, one in rounds)
    other = sum(int((all_.found[name].argmax(dim=2) != one.found[name].argmax(dim=2)).sum()) for all_, one in rounds)
    print(f"{name} probe, {epochs} epochs")
    for title, taken in (("lockstep", [all_ for all_, _ in rounds]), ("single runs", [one for _, one in rounds])):
        passes, trained = spread([each.passes for each in taken]), spread([each.heads[name] for each in taken])
        print(f"  {title:12} image passes {passes} s, heads {trained} s")
    print(f"  lockstep is faster by {spread(whole)}, without image passes by {spread(alone)}")
    print(f"  probabilities differ by {apart:.1e} at most, the most probable class in {other} cases")
    assert other == 0 and apart <= TOLERANCE, "a seed in lockstep is not what its single run is"


if __name__ == "__main__":
    main()
