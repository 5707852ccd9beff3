"""The losses against golden values, a second implementation in plain loops, closed forms and their symmetries."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medssl.objectives import (
    barlow_twins_loss,
    byol_loss,
    dcl_loss,
    nt_xent_loss,
    simsiam_loss,
    sinkhorn,
    swav_loss,
    vicreg_loss,
)

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
assert _spec is not None and _spec.loader is not None
reference: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

GOLDEN = Path(os.environ.get("MEDSSL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "golden"
Loss = Callable[..., Tensor]
LOSSES: dict[str, tuple[Loss, Loss, int, tuple[float, ...]]] = {
    "barlow_twins": (barlow_twins_loss, reference.barlow_twins, 2, (0.0051,)),
    "nt_xent 0.1": (nt_xent_loss, reference.nt_xent, 2, (0.1,)),
    "nt_xent 0.5": (nt_xent_loss, reference.nt_xent, 2, (0.5,)),
    "dcl 0.1": (dcl_loss, reference.dcl, 2, (0.1,)),
    "dcl 0.7": (dcl_loss, reference.dcl, 2, (0.7,)),
    "vicreg": (vicreg_loss, reference.vicreg, 2, (25.0, 25.0, 1.0)),
    "vicreg, other weights": (vicreg_loss, reference.vicreg, 2, (3.0, 5.0, 7.0)),
    "simsiam": (simsiam_loss, reference.simsiam, 4, ()),
    "byol": (byol_loss, reference.byol, 4, ()),
}
"""Ours, the second implementation, number of tensors, further arguments."""


def tensors(count: int, rows: int, width: int, seed: int = 0, scale: float = 0.6) -> list[Tensor]:
    """Embeddings that resemble each other as views of one image do."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    base = noise()
    return [scale * (base + 0.7 * noise()) + 0.3 for _ in range(count)]


def with_gradients(loss: Loss, given: list[Tensor], further: tuple[float, ...]) -> tuple[Tensor, list[Tensor]]:
    leaves = [z.clone().requires_grad_() for z in given]
    value = loss(*leaves, *further)
    value.backward()
    return value.detach(), [z.grad if z.grad is not None else torch.zeros_like(z) for z in leaves]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3)], ids=["wide", "tall", "least"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_second_implementation(name: str, shape: tuple[int, int]) -> None:
    ours, theirs, count, further = LOSSES[name]
    given = tensors(count, *shape)
    found, expected = with_gradients(ours, given, further), with_gradients(theirs, given, further)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-12)
    for mine, their in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-8, atol=1e-11)


GOLDEN_CASES = {
    "barlow_twins lambda=0.0051": (barlow_twins_loss, ("z1", "z2"), (0.0051,), 1.0),
    "barlow_twins lambda=0.00012207": (barlow_twins_loss, ("z1", "z2"), (1 / 8192,), 1.0),
    "vicreg 25/25/1": (vicreg_loss, ("z1", "z2"), (25.0, 25.0, 1.0), 0.3),
    "nt_xent temperature=0.1": (nt_xent_loss, ("z1", "z2"), (0.1,), 1.0),
    "nt_xent temperature=0.5": (nt_xent_loss, ("z1", "z2"), (0.5,), 1.0),
    "dcl temperature=0.1": (dcl_loss, ("z1", "z2"), (0.1,), 1.0),
    "simsiam (p1,p2,z1,z2)": (simsiam_loss, ("p1", "p2", "z1", "z2"), (), 1.0),
    "byol (p1,p2,z1,z2)": (byol_loss, ("p1", "p2", "z1", "z2"), (), 1.0),
}


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden values at {GOLDEN}: set MEDSSL_SHARED to the folder that has them")
    inputs = {name: torch.tensor(value) for name, value in np.load(GOLDEN / "golden.npz").items()}
    return inputs, json.loads((GOLDEN / "golden.json").read_text())[case]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden(case: str) -> None:
    loss, names, further, scale = GOLDEN_CASES[case]
    inputs, expected = golden(case)
    value, grads = with_gradients(loss, [scale * inputs[name] for name in names], further)
    assert value.item() == pytest.approx(expected["loss"], abs=1e-9)
    for grad, norm, first in zip(grads, expected["grad_norms"], expected["grad_first_row_first4"], strict=True):
        if norm is None:
            assert not grad.any(), "no gradient may reach a target"
        else:
            assert grad.norm().item() == pytest.approx(norm, rel=1e-7)
            assert grad[0, :4].tolist() == pytest.approx(first, rel=1e-7)


def test_golden_swav() -> None:
    case = "swav crops=(z1,z2 global; p1,p2 local) eps=0.05 iters=3 temperature=0.1 no_queue"
    inputs, expected = golden(case)
    prototypes = F.normalize(inputs["prototypes"], dim=1)
    scores = [F.normalize(inputs[name], dim=1) @ prototypes.T for name in ("z1", "z2", "p1", "p2")]
    assigned = [sinkhorn(score, 0.05, 3) for score in scores[:2]]
    assert assigned[0][0].tolist() == pytest.approx(expected["assignment_row0"], rel=1e-7)
    parts = [torch.stack([swav_loss(scores[v], assigned[q], 0.1) for v in range(4) if v != q]).mean() for q in range(2)]
    assert torch.stack(parts).mean().item() == pytest.approx(expected["loss"], abs=1e-9)
    assert reference.swapped(scores, 0.05, 3, 0.1).item() == pytest.approx(expected["loss"], abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_symmetric_in_views_and_blind_to_order(name: str) -> None:
    loss, _, count, further = LOSSES[name]
    given = tensors(count, 12, 20)
    value = loss(*given, *further)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    swapped = [given[i] for i in ((1, 0) if count == 2 else (1, 0, 3, 2))]
    torch.testing.assert_close(loss(*swapped, *further), value, rtol=1e-11, atol=0)
    torch.testing.assert_close(loss(*(z[order] for z in given), *further), value, rtol=1e-11, atol=0)
    mispaired = [given[0], *(z.roll(1, 0) for z in given[1:])]
    assert loss(*mispaired, *further) > value + 1e-3, "views of different images must not agree as well"


@pytest.mark.parametrize("name", ["nt_xent 0.1", "dcl 0.1", "simsiam", "byol"])
def test_cosine_losses_are_blind_to_each_rows_length(name: str) -> None:
    loss, _, count, further = LOSSES[name]
    given = tensors(count, 8, 10)
    lengths = torch.linspace(0.2, 7, 8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(*(lengths * z for z in given), *further), loss(*given, *further), rtol=1e-11, atol=0)


def test_closed_forms() -> None:
    same = torch.ones(6, 4, dtype=torch.float64)
    assert nt_xent_loss(same, same, 0.3).item() == pytest.approx(math.log(11))  # 11 equal candidates
    assert dcl_loss(same, same, 0.3).item() == pytest.approx(math.log(10))
    assert simsiam_loss(same, same, same, same).item() == pytest.approx(-1)
    assert byol_loss(same, same, same, same).item() == pytest.approx(0)
    assert byol_loss(same, same, -same, -same).item() == pytest.approx(8)
    # One point: no variance at all, sqrt(1e-4) is what the root leaves.
    assert vicreg_loss(same, same, 25, 25, 1).item() == pytest.approx(25 * (1 - 0.01))
    assert vicreg_loss(same, same + 2, 1, 0, 0).item() == pytest.approx(4)
    hot, flat = torch.eye(4, dtype=torch.float64), torch.full((4, 4), 0.25, dtype=torch.float64)
    assert swav_loss(torch.zeros(4, 4, dtype=torch.float64), flat, 0.1).item() == pytest.approx(math.log(4))
    assert swav_loss(100 * hot, hot, 0.1).item() == pytest.approx(0, abs=1e-9)


def test_no_gradient_reaches_the_assignments() -> None:
    scores, assigned = (torch.rand(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    swav_loss(scores, assigned, 0.1).backward()
    assert scores.grad is not None and assigned.grad is None


@pytest.mark.parametrize("seed", range(3))
def test_sinkhorn(seed: int) -> None:
    scores = F.normalize(tensors(1, 24, 10, seed)[0], dim=1) @ F.normalize(tensors(1, 6, 10, seed + 9)[0], dim=1).T
    for iterations in (1, 3):
        assigned = sinkhorn(scores, 0.05, iterations)
        torch.testing.assert_close(assigned, reference.sinkhorn(scores, 0.05, iterations), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(assigned.sum(1), torch.ones(24, dtype=torch.float64), rtol=1e-12, atol=0)
    balanced = sinkhorn(scores, 0.05, 500)
    torch.testing.assert_close(balanced.sum(0), torch.full((6,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(sinkhorn(scores + 3000, 0.05, 3), sinkhorn(scores, 0.05, 3), rtol=1e-6, atol=1e-12)
    assert not sinkhorn(scores.requires_grad_(), 0.05, 3).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_reduced_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    loss, _, count, further = LOSSES[name]
    given = [z.to(dtype) for z in tensors(count, 12, 20)]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*given, *further)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(*(z.float() for z in given), *further), rtol=1e-6, atol=1e-6)
    assert sinkhorn(given[0], 0.05, 3).dtype == torch.float32
