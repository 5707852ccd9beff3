"""The methods as a training uses them: several processes equal one, and what each owns behaves as its paper says."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.collectives import Process, convert_batch_norm
from medssl.objectives import METHODS, Clock, Objective, supervised_loss
from medssl.objectives.byol import BYOLParams, target_momentum
from medssl.objectives.swav import SwAVParams, sinkhorn, swav_loss
from medssl.training.step import Pretraining, distribute

BATCH, PX = 12, 8
SMALL: dict[str, dict[str, Any]] = {
    "barlow_twins": {"projector": (16, 24), "alpha": 0.01},
    "simclr": {"projector": (16, 12)},
    "dcl": {"projector": (16, 12)},
    "simsiam": {"projector": (16, 12), "predictor_width": 6},
    "vicreg": {"projector": (16, 24)},
    "byol": {"projector": (16, 12), "predictor_width": 20},
    "swav": {"projector": (16, 12), "prototypes": 7, "queue": 2 * BATCH, "queue_start_epoch": 1, "freeze_prototypes_steps": 2},
    "supervised": {"classes": ("a", "b", "c"), "label_smoothing": 0.1},
}
LABELS = torch.arange(BATCH) * 7 % 3
assert set(SMALL) == set(METHODS)


def tiny_encoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


def build(name: str) -> Pretraining:
    """In float64, with weights from a fixed seed."""
    torch.manual_seed(0)
    encoder = tiny_encoder().double()
    method = METHODS[name]
    objective = method(method.Params.model_validate({"name": name, **SMALL[name]}), 24).double()
    objective.attach(encoder)
    return Pretraining(encoder, objective)


def views_of_step(step: int, crops: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(BATCH, 3, PX, PX, generator=generator, dtype=torch.float64)
    views = [images + 0.3 * torch.randn(images.shape, generator=generator, dtype=torch.float64) for _ in range(2 + crops)]
    return [view if number < 2 else view[..., :4, :4] for number, view in enumerate(views)]


def _train_body(process: Process, name: str, steps: int = 5) -> list[dict[str, Any]]:
    """Plain SGD; two steps an epoch, so that SwAV's queue fills in steps 2, 3 and is used in 4."""
    module = build(name)
    if process.world > 1:
        module = convert_batch_norm(module)  # type: ignore[assignment]
    module.train()
    wrapped, objective = distribute(module, process), module.objective
    share = BATCH // process.world
    mine = slice(process.rank * share, (process.rank + 1) * share)
    found = []
    for step in range(steps):
        clock = Clock(step, steps, 2)
        objective.before_step(clock)
        labels = {"labels_B": LABELS[mine]} if METHODS[name].Params.takes_labels else {}
        outcome = wrapped(*(view[mine] for view in views_of_step(step, 2 if name == "swav" else 0)), **labels)
        module.zero_grad()
        outcome["loss"].backward()
        objective.after_backward(clock)
        grads = {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.05)
        objective.after_step(module.encoder, clock)
        scalars = {key: value.detach() for key, value in outcome.items() if value.ndim == 0}
        found.append({"scalars": scalars, "grads": grads, "state": {k: v.clone() for k, v in module.state_dict().items()}})
    return found


@pytest.mark.parametrize("name", METHODS)
def test_processes_together_equal_one(tmp_path: Path, name: str) -> None:
    """Loss, gradients and all state (batch norms, target, prototypes, queue) over five steps."""
    expected = _train_body(Process(0, 1, torch.device("cpu")), name)
    assert all(math.isfinite(float(row["scalars"]["loss"])) for row in expected)
    for world in (2, 3):
        for found in run_on_ranks(_train_body, world, tmp_path / str(world), name):
            for step, (mine, whole) in enumerate(zip(found, expected, strict=True)):
                for kind in ("scalars", "grads", "state"):
                    assert set(mine[kind]) == set(whole[kind])
                    for key, value in whole[kind].items():
                        scale = float(value.abs().max()) if value.is_floating_point() and value.numel() else 0.0
                        atol = max(1e-9 * scale, 1e-13)  # means behind a batch norm are rounding errors alone
                        torch.testing.assert_close(mine[kind][key], value, rtol=1e-9, atol=atol, msg=f"step {step}, {kind} {key}")


@pytest.mark.parametrize("name", METHODS)
def test_learns_to_tell_images_apart(name: str) -> None:
    rows = _train_body(Process(0, 1, torch.device("cpu")), name, steps=5)
    grads = rows[-1]["grads"]
    owned = {key for key in grads if key.startswith("objective.")}
    assert any(key.startswith("encoder.") for key in grads) and owned
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())
    assert not any("target" in key for key in grads)


def test_every_objective_speaks_the_protocol() -> None:
    for name, method in METHODS.items():
        assert issubclass(method, Objective) and method.Params.model_fields["name"].default == name
        assert method.__module__.rpartition(".")[2] == name, "one file per method, named as the method"


def test_supervised_loss_is_the_mean_over_both_views_with_smoothed_targets() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    labels = [2, 0, 1, 1, 0]
    expected = 0.0
    for view in logits:
        for row, label in zip(view.tolist(), labels, strict=True):
            total = sum(math.exp(value) for value in row)
            targets = [0.9 * (k == label) + 0.1 / 3 for k in range(3)]
            expected -= sum(t * math.log(math.exp(v) / total) for t, v in zip(targets, row, strict=True)) / 10
    assert float(supervised_loss(*logits, torch.tensor(labels), 0.1)) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="needs labels"):
        build("supervised")(*views_of_step(0, 0))


def test_byol_target_follows_the_encoder() -> None:
    assert [target_momentum(0.9, step, 10) for step in (0, 5, 10)] == pytest.approx([0.9, 0.95, 1.0])
    module = build("byol")
    objective: Any = module.objective
    before = copy.deepcopy(objective.target_encoder.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in module.encoder.state_dict().items())
    with torch.no_grad():
        for parameter in module.encoder.parameters():
            parameter.add_(1)
    objective.after_step(module.encoder, Clock(3, 10, 5))
    tau = target_momentum(BYOLParams().target_momentum, 3, 10)
    online = dict(module.encoder.named_parameters())
    for key, value in objective.target_encoder.named_parameters():
        torch.testing.assert_close(value, tau * before[key] + (1 - tau) * online[key], rtol=1e-12, atol=1e-14)
    for key, value in objective.target_encoder.named_buffers():
        assert torch.equal(value, before[key]), "buffers are not averaged"
    module.train()(*views_of_step(0, 0))
    assert not torch.equal(objective.target_encoder[1].running_mean, before["1.running_mean"]), "it runs in train mode"


def test_swav_prototypes_rest_at_first_and_keep_unit_length() -> None:
    rows = _train_body(Process(0, 1, torch.device("cpu")), "swav")
    trained = ["objective.prototypes.weight" in row["grads"] for row in rows]
    assert trained == [False, False, True, True, True]
    module = build("swav")
    module.objective.before_step(Clock(0, 1, 1))
    weight = module.objective.get_parameter("prototypes.weight")
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(7, dtype=torch.float64), rtol=1e-12, atol=0)


def test_swav_queue_joins_the_balancing_once_it_is_full() -> None:
    """Steps 2 and 3 fill a queue of two batches; step 4 is the first whose assignments know it."""
    state = _train_body(Process(0, 1, torch.device("cpu")), "swav", steps=4)[-1]["state"]
    views = views_of_step(4, 2)
    for step in (3, 4):
        module = build("swav")
        module.load_state_dict(state)
        module.train()
        objective: Any = module.objective
        objective.before_step(Clock(step, 5, 2))
        queue = objective.queue_2LD.clone()
        assert bool(queue.norm(dim=2).sub(1).abs().max() < 1e-9), "whole, of unit length"
        reference = copy.deepcopy(module)
        found = module(*views)["loss"]

        features = torch.cat([reference.encoder(torch.cat(views[:2])), reference.encoder(torch.cat(views[2:]))])
        own: Any = reference.objective
        z = F.normalize(own.projector(features), dim=1)
        scores = (z @ own.prototypes.weight.T).split(BATCH)
        expected = torch.zeros((), dtype=torch.float64)
        for large in range(2):
            queued = [queue[large] @ own.prototypes.weight.T] if step == 4 else []
            q = sinkhorn(torch.cat([*queued, scores[large]]).detach(), 0.05, 3)[-BATCH:]
            expected = expected + sum(swav_loss(scores[v], q, 0.1) for v in range(4) if v != large) / 6
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0, msg=f"step {step}")
        torch.testing.assert_close(objective.queue_2LD[0, :BATCH], z[:BATCH].detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(objective.queue_2LD[:, BATCH:], queue[:, :BATCH], rtol=0, atol=0)


def test_swav_refuses_a_queue_that_batches_do_not_fill() -> None:
    with pytest.raises(ValueError, match="queue 100 is not a multiple of batch_size 32: use 96"):
        SwAVParams(queue=100).check(batch_size=32)
    SwAVParams(queue=96).check(batch_size=32)


def test_simsiam_predictor_keeps_its_rate() -> None:
    module = build("simsiam")
    constant = {id(p) for p in module.objective.constant_rate()}
    named = {name for name, p in module.named_parameters() if id(p) in constant}
    assert named and all(name.startswith("objective.predictor") for name in named)
