"""Barlow Twins against the authors' form, and itself on several processes; golden values are in test_losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import nn

from medssl.collectives import Process
from medssl.objectives.barlow_twins import BarlowTwins, BarlowTwinsParams, barlow_twins_loss, barlow_twins_terms

SHAPES = {"fewer rows than features": (12, 30), "more rows than features": (30, 12)}


def literal_loss(z1: torch.Tensor, z2: torch.Tensor, lambda_: float) -> torch.Tensor:
    """The authors' main.py, word for word but for the gathering."""
    bn = nn.BatchNorm1d(z1.shape[1], affine=False).to(z1.dtype)
    c = bn(z1).T @ bn(z2)
    c.div_(len(z1))
    on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
    n, m = c.shape
    off_diag = c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow_(2).sum()
    assert n == m
    return on_diag + lambda_ * off_diag


def pair(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return z1, z1 + 0.7 * torch.randn(rows, width, generator=generator, dtype=torch.float64) + 3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lambda_", [0.0051, 1.0])
def test_equals_the_literal_loss(shape: tuple[int, int], lambda_: float) -> None:
    z1, z2 = pair(*shape)
    ours, theirs = [(z1.clone().requires_grad_(), z2.clone().requires_grad_()) for _ in range(2)]
    found, expected = barlow_twins_loss(*ours, lambda_), literal_loss(*theirs, lambda_)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.backward()
    expected.backward()
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-9, atol=1e-12)


def test_symmetric_and_blind_to_order_scale_and_shift() -> None:
    z1, z2 = pair(12, 30)
    loss = barlow_twins_loss(z1, z2, 0.0051)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(barlow_twins_loss(z2, z1, 0.0051), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(barlow_twins_loss(z1[order], z2[order], 0.0051), loss, rtol=1e-12, atol=0)
    # Only the eps of the batch norm knows scale.
    torch.testing.assert_close(barlow_twins_loss(5 * z1 - 2, z2, 0.0051, eps=1e-12),
                               barlow_twins_loss(z1, z2, 0.0051, eps=1e-12), rtol=1e-10, atol=0)  # fmt: skip


def test_identical_uncorrelated_views_lose_nothing() -> None:
    # Rows of a Hadamard matrix without its constant column: unit variance, mutually uncorrelated features.
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    found = barlow_twins_loss(hadamard[:, 1:], hadamard[:, 1:], 1.0, eps=1e-12)
    assert found.item() == pytest.approx(0, abs=1e-20)


def test_correlation_matrix_is_never_formed_for_few_rows() -> None:
    width, sizes = 3000, []
    z1, z2 = (z.float().requires_grad_() for z in pair(8, width))

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, note), torch.profiler.profile(profile_memory=True) as profile:
        barlow_twins_loss(z1, z2, 0.0051).backward()
    assert sizes and max(sizes) < width * width
    assert max(event.cpu_memory_usage for event in profile.events()) < 4 * width * width


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z1, z2 = (z.to(dtype) for z in pair(12, 30))
    with torch.autocast("cpu", torch.bfloat16):
        found = barlow_twins_loss(z1, z2, 0.0051)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, barlow_twins_loss(z1.float(), z2.float(), 0.0051), rtol=1e-6, atol=0)


def _rank_body(process: Process, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    found = []
    for shape in shapes:
        rows = shape[0] // process.world
        mine = slice(process.rank * rows, (process.rank + 1) * rows)
        z1, z2 = (z[mine].clone().requires_grad_() for z in pair(*shape))
        loss, terms = barlow_twins_loss(z1, z2, 0.0051), barlow_twins_terms(z1, z2)
        loss.backward()
        found.append({"terms": [loss.detach(), *(t.detach() for t in terms)], "grads": [z1.grad, z2.grad]})
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(tmp_path: Path, world: int) -> None:
    shapes = list(SHAPES.values())
    found = run_on_ranks(_rank_body, world, tmp_path, shapes)
    for position, shape in enumerate(shapes):
        z = [v.clone().requires_grad_() for v in pair(*shape)]
        loss = barlow_twins_loss(*z, 0.0051)
        loss.backward()
        expected = [loss, *barlow_twins_terms(*z)]
        for rank in range(world):
            torch.testing.assert_close(found[rank][position]["terms"], [t.detach() for t in expected], rtol=1e-9, atol=0)
        for view in range(2):
            # The collectives' backward sums over the ranks, DDP divides by their number.
            together = torch.cat([found[rank][position]["grads"][view] for rank in range(world)]) / world
            torch.testing.assert_close(together, z[view].grad, rtol=1e-9, atol=1e-13)


def test_projector_is_the_authors() -> None:
    objective = BarlowTwins(BarlowTwinsParams(projector=(16, 24, 8)), 10)
    kinds = [type(layer).__name__ for layer in objective.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(layer.bias is None for layer in objective.projector if isinstance(layer, nn.Linear))
    assert objective.projector(torch.randn(4, 10)).shape == (4, 8)


def test_sparse_barlow_twins_adds_the_norms_of_the_last_layers_columns() -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 10), torch.randn(4, 10)
    objective = BarlowTwins(BarlowTwinsParams(projector=(16, 8), alpha=0.01), 10)
    terms = objective.terms(*features)
    weight = objective.projector[-1].weight.detach()
    expected = sum(math.sqrt(sum(float(weight[out, column]) ** 2 for out in range(8))) for column in range(16))
    assert terms["sparsity"].item() == pytest.approx(expected, rel=1e-6)
    plain = terms["invariance"] + objective.lambda_ * terms["redundancy"]
    assert terms["loss"].item() == pytest.approx(plain.item() + 0.01 * expected, rel=1e-6)
