"""Checkpoints: whole or absent, the last few kept, never with NaN, loadable without running code."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from medssl.checkpoint import CheckpointFolder
from medssl.errors import NonFiniteLoss, StoreError
from medssl.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "checkpoints"), create=True)


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    conv = torch.full((4, 3, 2, 2), value).contiguous(memory_format=torch.channels_last)
    return {"conv": conv, "count": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}


def state() -> dict[str, object]:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter], 0.1)
    parameter.grad = torch.ones(3)
    optimiser.step()
    return {"optimiser": optimiser.state_dict(), "note": "text", "step": 7}


def test_round_trip(store: Store) -> None:
    folder = CheckpointFolder(store)
    assert folder.latest() is None
    folder.save(7, weights(), state())
    assert folder.latest() == 7
    found, found_state = folder.load(7)
    assert set(found) == set(weights())
    assert all(torch.equal(found[name], value) for name, value in weights().items())
    assert found_state["note"] == "text"
    assert torch.equal(found_state["optimiser"]["state"][0]["exp_avg"], state()["optimiser"]["state"][0]["exp_avg"])  # type: ignore[index]


def test_files_open_with_other_tools(store: Store) -> None:
    CheckpointFolder(store).save(7, weights(), state())
    assert set(load(store.read("step-000000007/weights.safetensors"))) == set(weights())
    torch.load(io.BytesIO(store.read("step-000000007/state.pt")), weights_only=True)


def test_last_ones_are_kept(store: Store) -> None:
    folder = CheckpointFolder(store, keep=2)
    for step in (5, 10, 100, 1000):
        folder.save(step, weights(), state())
    assert folder.steps() == [100, 1000]
    assert not [entry.key for entry in store.list() if "000005" in entry.key or "0010/" in entry.key]


def test_without_its_mark_it_does_not_exist(store: Store) -> None:
    folder = CheckpointFolder(store)
    folder.save(1, weights(), state())
    folder.save(2, weights(), state())
    store.delete("step-000000002.json")
    assert folder.latest() == 1


def test_mark_is_written_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, key, data: (order.append(key), write(self, key, data))[1])
    CheckpointFolder(store).save(1, weights(), state())
    assert order[-1] == "step-000000001.json" and len(order) == 3


def test_damage_is_noticed(store: Store) -> None:
    folder = CheckpointFolder(store)
    folder.save(1, weights(), state())
    store.write("step-000000001/state.pt", store.read("step-000000001/state.pt")[:-1] + b"x")
    with pytest.raises(StoreError, match=r"step-000000001/state.pt is damaged"):
        folder.load(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_that_is_not_finite(store: Store, bad: float) -> None:
    folder = CheckpointFolder(store)
    folder.save(1, weights(), state())
    poisoned = state()
    poisoned["optimiser"]["state"][0]["exp_avg_sq"][1] = bad  # type: ignore[index]
    for broken in ((weights(bad), state()), (weights(), poisoned), (weights(), {**state(), "loss": bad})):
        with pytest.raises(NonFiniteLoss, match="checkpoint of step 2 refused"):
            folder.save(2, *broken)
    assert folder.steps() == [1]
    assert not [entry for entry in store.list() if "0002" in entry.key]
