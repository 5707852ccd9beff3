"""Further pretraining: what is trained in which phase, and what frozen batch norms do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import nn

from medssl.collectives import Process
from medssl.errors import RecipeError
from medssl.networks import EncoderParams, build_encoder
from medssl.training.feed import Batch
from medssl.training.freezing import last_block, train_part
from medssl.training.plan import PretrainPlan
from medssl.training.step import Stepper

CPU = Process(0, 1, torch.device("cpu"))
STEPS_PER_EPOCH = 2


def plan(**further: Any) -> PretrainPlan:
    fields: dict[str, Any] = {
        "encoder": {"name": "test_resnet", "image_px": 32},
        "objective": {"name": "barlow_twins", "projector": (32, 24)},
        "optimiser": {"name": "sgd", "learning_rate": 0.01},
        "schedule": {"name": "constant"},
        "views": {},
        "epochs": 2,
        "batch_size": 12,
        "seed": 3,
        "further": further,
    }
    return PretrainPlan.model_validate(fields)


def batch(process: Process = CPU) -> Batch:
    images = torch.randint(0, 256, (12, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    share = 12 // process.world
    return Batch(images[process.rank * share : (process.rank + 1) * share], torch.arange(share))


def changed(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_the_projector_alone_then_the_last_block() -> None:
    stepper = Stepper(plan(head_only_epochs=1, trained="last_block"), CPU, STEPS_PER_EPOCH)
    assert stepper.total_steps == 3 * STEPS_PER_EPOCH
    start = copy.deepcopy(stepper.module.encoder.state_dict())
    rates = [stepper.step(batch(), done).learning_rate for done in range(STEPS_PER_EPOCH)]
    assert rates == [1e-3, 1e-3] == [stepper.learning_rate(done) for done in range(2)]
    assert type(stepper.optimiser) is torch.optim.Adam
    assert not changed(start, stepper.module.encoder), "weights and statistics rest"
    head = copy.deepcopy(stepper.module.objective.state_dict())
    assert stepper.step(batch(), 2).learning_rate == 0.01 and type(stepper.optimiser) is torch.optim.SGD
    stepper.step(batch(), 3)  # the block's last norm starts with weight zero, so that its convolutions move from now on
    block = stepper.module.encoder.layer4[-1]  # type: ignore[index, union-attr]
    inside = {f"layer4.{len(stepper.module.encoder.layer4) - 1}.{name}" for name in block.state_dict()}  # type: ignore[arg-type]
    assert changed(start, stepper.module.encoder) == inside
    assert changed(head, stepper.module.objective)


@pytest.mark.parametrize(
    ("mode", "kinds"), [("fixed", set()), ("statistics", {"running"}), ("affine", {"running", "weight", "bias"})]
)
def test_batch_norm_of_the_frozen_part(mode: str, kinds: set[str]) -> None:
    stepper = Stepper(plan(trained="last_block", frozen_batch_norm=mode), CPU, STEPS_PER_EPOCH)
    before = copy.deepcopy(stepper.module.encoder.state_dict())
    for done in range(2):  # a new norm's bias of zero has a gradient from the first step on
        stepper.step(batch(), done)
    moved = {name for name in changed(before, stepper.module.encoder) if not name.startswith("layer4")}
    norms = {name for name, m in stepper.module.encoder.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert {name.rpartition(".")[0] for name in moved} <= norms, "no convolution in front of the last block moves"
    assert {name.rpartition(".")[2].split("_")[0] for name in moved} - {"num"} == kinds


def test_a_fixed_frozen_part_keeps_no_activations() -> None:
    kept: dict[str, int] = {}
    for trained in ("all", "last_block"):
        stepper = Stepper(plan(trained=trained), CPU, STEPS_PER_EPOCH)
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        views = stepper.make_views(batch(), 0)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            stepper.module.encoder(views[0])
        kept[trained] = sum(sizes)
    assert kept["last_block"] < kept["all"] / 2


@pytest.mark.parametrize(
    ("name", "found"), [("resnet18", "layer4.1"), ("vit_tiny_patch16_224", "blocks.11"), ("convnext_atto", "stages.3.blocks.1")]
)
def test_last_block(name: str, found: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderParams(name=name, image_px=64), 0)
    assert last_block(encoder) is encoder.get_submodule(found)
    train_part(encoder, "last_block", "fixed")
    assert {n.startswith(f"{found}.") for n, p in encoder.named_parameters() if p.requires_grad} == {True}


def test_an_encoder_without_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match="has no blocks"):
        last_block(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)))


def _phases_body(process: Process) -> list[float]:
    stepper = Stepper(plan(head_only_epochs=1, trained="last_block", frozen_batch_norm="affine"), process, STEPS_PER_EPOCH)
    return [float(stepper.step(batch(process), done).scalars["loss"]) for done in range(5)]


def test_phases_on_several_processes(tmp_path: Path) -> None:
    expected = _phases_body(CPU)
    for found in run_on_ranks(_phases_body, 2, tmp_path):
        assert found == pytest.approx(expected, rel=1e-4)
