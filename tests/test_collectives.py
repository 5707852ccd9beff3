"""Collectives and synchronised batch norm: with real processes (gloo), against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from torch import nn

from medssl import collectives
from medssl.collectives import Process, SyncBatchNorm, all_gather, all_reduce, convert_batch_norm
from medssl.errors import RecipeError


def _values(rank: int, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, 4, generator=generator, dtype=torch.float64)


def _collective_body(process: Process) -> dict[str, torch.Tensor]:
    rank, world = process.rank, process.world
    x, y = _values(rank).requires_grad_(), _values(rank).requires_grad_()
    weights = torch.arange(world * 3.0, dtype=torch.float64)[:, None]
    # Each rank weights the result by its own number, so that a backward that forgets the other ranks shows.
    ((rank + 1) * all_reduce(x).square().sum()).backward()
    ((rank + 1) * (weights * all_gather(y)).square().sum()).backward()
    return {
        "reduced": all_reduce(x).detach(),
        "gathered": all_gather(y).detach(),
        "reduce_grad": x.grad,
        "gather_grad": y.grad,
        "largest": torch.tensor(collectives.agree_largest(10 - rank, torch.device("cpu"))),
    }


def test_collectives_and_their_gradients(tmp_path: Path) -> None:
    world = 3
    found = run_on_ranks(_collective_body, world, tmp_path)
    parts = [_values(rank) for rank in range(world)]
    whole, total = torch.cat(parts), sum(parts)
    factor = sum(rank + 1 for rank in range(world))
    weights = torch.arange(world * 3.0, dtype=torch.float64)[:, None]
    gather_grad = factor * 2 * weights.square() * whole
    for rank, result in enumerate(found):
        torch.testing.assert_close(result["reduced"], total, rtol=1e-14, atol=0)
        assert torch.equal(result["gathered"], whole)
        torch.testing.assert_close(result["reduce_grad"], factor * 2 * total, rtol=1e-14, atol=0)
        torch.testing.assert_close(result["gather_grad"], gather_grad[3 * rank : 3 * rank + 3], rtol=1e-14, atol=0)
        assert int(result["largest"]) == 10


def test_one_process_is_the_identity() -> None:
    x = _values(0)
    assert all_reduce(x) is x
    assert all_gather(x) is x
    assert collectives.world_size() == 1
    assert collectives.agree_largest(3, torch.device("cpu")) == 3


def _norm_input(kind: str, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (rows, 5) if kind == "1d" else (rows, 5, 4, 3)
    # A mean far above the standard deviation: sums of squares would lose digits here.
    x = 100 + torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x


def _norm(kind: str, *, affine: bool, momentum: float | None, synchronised: bool) -> nn.Module:
    plain: nn.Module = (nn.BatchNorm1d if kind == "1d" else nn.BatchNorm2d)(5, affine=affine, momentum=momentum)
    plain = plain.double()
    if affine:
        with torch.no_grad():
            plain.weight.copy_(torch.linspace(0.5, 2, 5))
            plain.bias.copy_(torch.linspace(-1, 1, 5))
    return convert_batch_norm(plain) if synchronised else plain


def _norm_result(norm: nn.Module, x: torch.Tensor, rank: int, world: int) -> dict[str, torch.Tensor]:
    rows = len(x) // world
    mine = slice(rank * rows, (rank + 1) * rows)
    local = x[mine].clone().requires_grad_()
    weights = torch.sin(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape)
    for _ in range(2):  # twice, so that the running statistics' averaging shows
        local.grad = None
        norm.zero_grad()
        out = norm(local)
        (out**3 * weights[mine]).sum().backward()
    grads = {name: p.grad for name, p in norm.named_parameters()}
    return {"out": out.detach(), "grad": local.grad, **grads, **{k: v.clone() for k, v in norm.named_buffers()}}


def _norms_body(process: Process, cases: list[tuple[str, bool, float | None]]) -> list[dict[str, torch.Tensor]]:
    found = []
    for kind, affine, momentum in cases:
        norm = _norm(kind, affine=affine, momentum=momentum, synchronised=True)
        found.append(_norm_result(norm, _norm_input(kind, 12), process.rank, process.world))
    return found


NORM_CASES = [("1d", True, 0.1), ("1d", False, 0.1), ("2d", True, 0.1), ("channels_last", True, None)]


@pytest.mark.parametrize("world", [2, 3])
def test_sync_batch_norm_equals_one_process(tmp_path: Path, world: int) -> None:
    found = run_on_ranks(_norms_body, world, tmp_path, NORM_CASES)
    for position, (kind, affine, momentum) in enumerate(NORM_CASES):
        plain = _norm(kind, affine=affine, momentum=momentum, synchronised=False)
        expected = _norm_result(plain, _norm_input(kind, 12), 0, 1)
        results = [per_rank[position] for per_rank in found]
        for name in ("out", "grad"):
            together = torch.cat([result[name] for result in results])
            torch.testing.assert_close(together, expected[name], rtol=1e-9, atol=1e-9)
        for name in ("weight", "bias"):
            if affine:  # local sums: DDP adds them up
                total = sum(result[name] for result in results)
                torch.testing.assert_close(total, expected[name], rtol=1e-9, atol=1e-9)
        for result in results:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                torch.testing.assert_close(result[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "affine", "momentum"), NORM_CASES)
def test_sync_batch_norm_of_one_process_is_torchs(kind: str, affine: bool, momentum: float | None) -> None:
    plain, ours = (_norm(kind, affine=affine, momentum=momentum, synchronised=s) for s in (False, True))
    assert isinstance(ours, SyncBatchNorm)
    x = _norm_input(kind, 12)
    expected, found = _norm_result(plain, x, 0, 1), _norm_result(ours, x, 0, 1)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_convert_keeps_parameters_and_names() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)))
    before = dict(network.named_parameters())
    names = list(network.state_dict())
    converted = convert_batch_norm(network)
    assert list(converted.state_dict()) == names
    assert all(dict(converted.named_parameters())[name] is value for name, value in before.items())
    assert sum(isinstance(m, SyncBatchNorm) for m in converted.modules()) == 2


def test_convert_knows_timms_norms_with_activation() -> None:
    from timm.layers import BatchNormAct2d

    plain, fused = BatchNormAct2d(5).double(), BatchNormAct2d(5).double()
    names = list(fused.state_dict())
    converted = convert_batch_norm(nn.Sequential(fused))[0]
    assert isinstance(converted, SyncBatchNorm) and list(converted.state_dict()) == names
    x = _norm_input("2d", 4)
    assert torch.equal(converted(x), plain(x)) and bool((converted(x) >= 0).all())


def test_convert_refuses_unknown_norms() -> None:
    class Strange(nn.BatchNorm2d):
        pass

    with pytest.raises(RecipeError, match="batch norm of kind Strange cannot be synchronised"):
        convert_batch_norm(nn.Sequential(Strange(3)))


def test_evaluation_uses_the_running_statistics() -> None:
    norm = _norm("2d", affine=True, momentum=0.1, synchronised=True).eval()
    x = _norm_input("2d", 4)
    expected = _norm("2d", affine=True, momentum=0.1, synchronised=False).eval()(x)
    assert torch.equal(norm(x), expected)
