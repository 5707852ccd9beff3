"""kill -9 of a training worker: training goes on by itself, and every step's loss on every rank is the undisturbed run's."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from watched import TRAINING_WORKER, family

from medssl.artifacts import finished
from medssl.errors import MedsslError, NonFiniteLoss
from medssl.recipe_file import load
from medssl.runner import Runner
from medssl.store import Store, open_store
from medssl.study import Study

pytestmark = pytest.mark.ray


def recipe(undisturbed: Any, workers: int, **changes: Any) -> dict[str, Any]:
    """The undisturbed study's pretraining with so many workers."""
    fields = undisturbed.fields | {"compute": undisturbed.fields["compute"] | {"workers": workers}}
    fields["arms"] = [undisturbed.fields["arms"][1] | changes]
    return fields


def pretrain(fields: dict[str, Any], store: Store) -> None:
    """The encoders of the study, in the session's Ray."""
    with ExitStack() as stack:
        Runner(Study(load(fields), store), stack, None).encoders()


def pretraining(store: Store) -> str:
    return next(n for n in finished(store) if n.startswith("pretrain-"))


def history(store: Store) -> pd.DataFrame:
    frame = pq.read_table(io.BytesIO(store.read(f"artifacts/{pretraining(store)}/history.parquet"))).to_pandas()
    return frame.sort_values(["step", "rank"]).reset_index(drop=True)


def checkpoint_steps(store: Store) -> list[int]:
    keys = [e.key for e in store.list("artifacts/") if "/checkpoints/step-" in e.key and e.key.endswith(".json")]
    return sorted(int(key.rpartition("step-")[2].removesuffix(".json")) for key in keys)


def once(condition: Callable[[], bool], action: Callable[[], None], seconds: float = 900) -> threading.Thread:
    """A thread that acts as soon as the condition holds."""

    def watch() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                action()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.acceptance) for n in (1, 3))])
def test_losses_equal_the_undisturbed_run(undisturbed: Any, tmp_path: Path, workers: int) -> None:
    fields, calm = recipe(undisturbed, workers), undisturbed.store
    if workers != undisturbed.fields["compute"]["workers"]:
        calm = open_store(str(tmp_path / "calm"), create=True)
        pretrain(fields, calm)
    disturbed = open_store(str(tmp_path / "disturbed"), create=True)

    killed: list[int] = []

    def kill() -> None:
        worker = family(os.getpid(), TRAINING_WORKER)[-1]
        worker.kill()
        killed.append(worker.pid)

    watcher = once(lambda: any(step >= 4 for step in checkpoint_steps(disturbed)), kill)
    pretrain(fields, disturbed)
    watcher.join()
    assert killed, "the training ended before a worker was killed: give it more epochs"

    expected, found = history(calm), history(disturbed)
    assert (found.groupby(["rank", "step"]).size() == 1).all()
    assert set(found["rank"]) == set(range(workers))
    for column in ("rank", "step", "loss"):
        assert found[column].tolist() == expected[column].tolist(), column
    encoders = [store.read(f"artifacts/{pretraining(store)}/encoder.safetensors") for store in (calm, disturbed)]
    assert encoders[0] == encoders[1]


def test_a_failure_of_one_rank_is_told_and_leaves_no_rank_waiting(undisturbed: Any, tmp_path: Path) -> None:
    """The other rank is in the middle of a collective, and would wait for half an hour."""
    store = open_store(str(tmp_path / "store"), create=True)
    fields = recipe(undisturbed, 2) | {"encoder": {"name": "one_rank:encoder", "image_px": 32}}
    with pytest.raises(MedsslError, match=r"failed: RuntimeError: this rank's disk is full$"):
        pretrain(fields, store)
    (note,) = [entry.key for entry in store.list("artifacts/") if entry.key.endswith("failure.json")]
    assert "Traceback" in json.loads(store.read(note))["traceback"]
    assert not family(os.getpid(), TRAINING_WORKER) and not finished(store)


@pytest.mark.acceptance
def test_a_loss_that_is_not_finite_stops_once_and_leaves_no_bad_checkpoint(
    undisturbed: Any, tmp_path: Path
) -> None:
    """A learning rate that blows up within a few steps: no retry, the step named, only finite checkpoints kept."""
    from safetensors.numpy import load as load_tensors

    store = open_store(str(tmp_path / "store"), create=True)
    optimiser = {"name": "sgd", "learning_rate": 1e12, "momentum": 0.0}
    fields = recipe(undisturbed, 2, optimiser=optimiser, schedule={"name": "constant"})
    with pytest.raises(NonFiniteLoss) as caught:
        pretrain(fields, store)
    message = str(caught.value)
    assert "not finite at step" in message and "learning rate 1e+12" in message and "checkpoint" in message
    assert "\n" not in message
    assert not [n for n in finished(store) if n.startswith("pretrain-")]
    for entry in store.list("artifacts/"):
        if entry.key.endswith("weights.safetensors"):
            import numpy as np

            assert all(np.isfinite(t).all() for t in load_tensors(store.read(entry.key)).values())
