"""One step: several processes equal one, seeds, precision, collapse measures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from torch import nn

from medssl.collectives import Process, convert_batch_norm
from medssl.errors import RecipeError
from medssl.networks import save_weights
from medssl.training.feed import Batch
from medssl.training.plan import PretrainPlan
from medssl.training.step import Stepper, build_pretraining, check_plan, collapse_measures, distribute


def plan(**changed: object) -> PretrainPlan:
    fields: dict[str, object] = {
        "encoder": {"name": "resnet18", "image_px": 32},
        "objective": {"name": "barlow_twins", "projector": (32, 24)},
        "optimiser": {},
        "schedule": {},
        "views": {},
        "epochs": 2,
        "batch_size": 12,
        "seed": 3,
    }
    return PretrainPlan.model_validate({**fields, **changed})


def _gradient_body(process: Process) -> dict[str, object]:
    module = build_pretraining(plan()).double()
    if process.world > 1:
        module = convert_batch_norm(module)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(12, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]
    share = 12 // process.world
    mine = slice(process.rank * share, (process.rank + 1) * share)
    wrapped = distribute(module, process)
    outcome = wrapped(views[0][mine], views[1][mine])
    outcome["loss"].backward()
    # Copies: pickling a view would take the whole bucket along, for each.
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": outcome["loss"].detach(), "grads": grads, "buffers": dict(module.named_buffers())}


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_equal_one(tmp_path: Path, world: int) -> None:
    expected = _gradient_body(Process(0, 1, torch.device("cpu")))
    for found in run_on_ranks(_gradient_body, world, tmp_path):
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-9, atol=0)
        for name, grad in expected["grads"].items():  # type: ignore[attr-defined]
            scale = float(grad.abs().max())
            torch.testing.assert_close(found["grads"][name], grad, rtol=1e-9, atol=1e-9 * scale, msg=name)
        for name, buffer in expected["buffers"].items():  # type: ignore[attr-defined]
            torch.testing.assert_close(found["buffers"][name], buffer, rtol=1e-9, atol=1e-12, msg=name)


def batch() -> Batch:
    images = torch.randint(0, 256, (12, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(12))


CPU = Process(0, 1, torch.device("cpu"))


def test_seed_decides_weights_views_and_result() -> None:
    first, again, other = (Stepper(plan(seed=seed), CPU, 5) for seed in (1, 1, 2))
    losses = []
    for stepper in (first, again, other):
        losses.append([stepper.step(batch(), done).scalars["loss"].item() for done in range(2)])
    assert losses[0] == losses[1] != losses[2]
    assert save_weights(first.module) == save_weights(again.module)


def test_initial_encoder_is_taken_and_the_projector_is_fresh() -> None:
    donor = build_pretraining(plan(seed=8))
    taken = build_pretraining(plan(seed=3), save_weights(donor.encoder))
    assert save_weights(taken.encoder) == save_weights(donor.encoder)
    assert save_weights(taken.objective) == save_weights(build_pretraining(plan(seed=3)).objective)


def test_step_learns_and_reports() -> None:
    mild = {"crop_scale": (0.7, 1), "jitter": 0, "grey": 0, "blur": (0, 0), "solarise": (0, 0), "vertical_flip": 0}
    stepper = Stepper(plan(epochs=40, schedule={"name": "constant"}, views=mild), CPU, 1)
    smooth = nn.functional.interpolate(batch().images_BHWC[:, :5, :5].permute(0, 3, 1, 2).float(), size=(40, 40), mode="bilinear")
    images = smooth.permute(0, 2, 3, 1).byte()
    outcomes = [stepper.step(Batch(images, torch.arange(12)), done) for done in range(12)]
    losses = [outcome.scalars["loss"].item() for outcome in outcomes]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert set(outcomes[0].scalars) == {"loss", "invariance", "redundancy", "gradient_norm"}
    assert outcomes[0].learning_rate == stepper.learning_rate(0) == 1.5e-3
    assert outcomes[0].features_BE.shape == (12, 512) and not outcomes[0].features_BE.requires_grad
    assert bool(stepper.is_finite())
    next(iter(stepper.optimiser.state.values()))["exp_avg"][0] = math.inf
    assert not bool(stepper.is_finite())


def test_bfloat16_stays_near_float32() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        outcome = Stepper(plan(precision=precision), CPU, 5).step(batch(), 0)
        assert outcome.scalars["loss"].dtype == torch.float32
        losses[precision] = outcome.scalars["loss"].item()
    assert losses["float32"] != losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_gpu_equals_cpu() -> None:
    gpu = Process(0, 1, torch.device("cuda"))
    losses = [[Stepper(plan(), p, 5).step(batch(), 0).scalars["loss"].item()] for p in (CPU, gpu)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def measures(features: torch.Tensor, partner: torch.Tensor | None = None) -> dict[str, float]:
    return {k: float(v) for k, v in collapse_measures(features, features if partner is None else partner).items()}


def test_collapse_measures() -> None:
    noise = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    collapsed = measures(torch.ones(50, 8) + 1e-6 * noise[:50])
    assert collapsed["embedding_std"] < 1e-5 and collapsed["uniformity"] == pytest.approx(0, abs=1e-5)
    spread = measures(noise[:2000], noise[2000:])
    assert spread["embedding_std"] == pytest.approx(1, abs=0.02) and spread["effective_rank"] == pytest.approx(8, abs=0.05)
    assert spread["alignment"] == pytest.approx(2, abs=0.05), "unrelated unit vectors are sqrt(2) apart"
    assert measures(noise, 3 * noise)["alignment"] == pytest.approx(0, abs=1e-6)
    assert measures(noise[:, :1] * torch.arange(1.0, 9))["effective_rank"] == pytest.approx(1, abs=1e-3)
    # Two equal singular values and nothing else: the entropy is log 2.
    two = torch.zeros(4, 8)
    two[0, 0], two[1, 0], two[2, 1], two[3, 1] = 1, -1, 1, -1
    found = measures(two)
    assert found["effective_rank"] == pytest.approx(2, rel=1e-5)
    # Of the six pairs two are opposite (distance 2), four at right angles (distance sqrt 2).
    assert found["uniformity"] == pytest.approx(math.log((2 * math.exp(-8) + 4 * math.exp(-4)) / 6), rel=1e-5)


def test_encoder_parts_change_nothing_but_memory() -> None:
    """A network without batch norm: the gradients of four parts are those of the whole."""
    encoder = {"name": "vit_tiny_patch16_224", "image_px": 32}
    found = []
    for parts in (1, 4):
        module = build_pretraining(plan(encoder=encoder, encoder_parts=parts, objective=SIMCLR)).double()
        views = torch.randn(2, 12, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        outcome = module(*views)
        outcome["loss"].backward()
        found.append((outcome["loss"].detach(), [p.grad for p in module.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


SIMCLR = {"name": "simclr", "projector": (32, 24)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"encoder_parts": 4}, "encoder_parts is 4, but the batch norm of resnet18 would see one part"),
        ({"encoder": {"name": "vit_tiny_patch16_224", "image_px": 32}, "surgery": {}}, "vit_tiny_patch16_224 has none"),
        ({"encoder": {"name": "vgg11", "image_px": 32}, "further": {"trained": "last_block"}}, "VGG has no blocks"),
    ],
)
def test_what_does_not_go_together_is_one_line(changed: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        check_plan(plan(**changed))
    assert "\n" not in str(caught.value)
