"""Hours of runs: what is recorded of a run that ends, fails or is cut short, and how the sums come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medssl import usage
from medssl.cli import main
from medssl.compute import Compute
from medssl.events import Event
from medssl.stages.trials import trials_held
from medssl.store import Store, open_store
from medssl.usage import recorded, summed


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path), create=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `usage` sees, in seconds, to be moved on by the test."""
    now = [0.0]
    monkeypatch.setattr(usage.time, "monotonic", lambda: now[0])
    return now


def records(store: Store) -> list[dict[str, object]]:
    return [json.loads(store.read(entry.key)) for entry in store.list("studies/") if "/usage/" in entry.key]


def test_reserved_hours_by_stage(store: Store, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSSL_SUBMITTER", "ada@lab")
    seen: list[Event] = []
    compute = Compute(workers=4, cpus_per_worker=8, gpus_per_worker=0.5, trial_cpus=2, concurrent_trials=6)
    with recorded(store, "s", compute, seen.append) as recorder:
        for label, hours in (("pretrain a seed 0", 2.0), ("pretrain a seed 1", 1.0), ("evaluate probe", 0.5), ("report", 0.25)):
            recorder.on_event(Event("begin", label))
            recorder.on_event(Event("progress", label, 1, 2))
            clock[0] += 3600 * hours
            recorder.on_event(Event("end", label))
    assert [event.kind for event in seen] == ["begin", "progress", "end"] * 4
    (found,) = records(store)
    assert found["study"] == "s" and found["submitter"] == "ada@lab"
    assert found["stages"] == {
        "pretrain": {"hours": 3.0, "cpu_hours": 3.0 * 32, "gpu_hours": 3.0 * 4},  # a pretraining worker takes a whole GPU
        "evaluate": {"hours": 0.5, "cpu_hours": 0.5 * 12, "gpu_hours": 0.5 * 3},
        "report": {"hours": 0.25, "cpu_hours": 0.25, "gpu_hours": 0.0},
    }


@pytest.mark.parametrize(
    ("compute", "cpus", "gpus"),
    [
        (Compute(gpus_per_worker=1), 8, 8.0),  # 102 trials by the CPUs, of which 94 wait for a GPU
        (Compute(gpus_per_worker=0.5, trial_cpus=3), 48, 8.0),
        (Compute(gpus_per_worker=0.6), 8, 4.8),  # no trial takes parts of two GPUs
        (Compute(gpus_per_worker=1, concurrent_trials=20), 8, 8.0),
        (Compute(gpus_per_worker=1, concurrent_trials=3), 3, 3.0),
        (Compute(), 102, 0.0),
        (Compute(concurrent_trials=500, trial_cpus=4), 104, 0.0),
    ],
)
def test_no_more_is_reserved_than_the_cluster_has(
    store: Store, clock: list[float], compute: Compute, cpus: float, gpus: float
) -> None:
    """Eight nodes of 12 CPUs and a GPU, and one of 8 CPUs."""
    with recorded(store, "s", compute, lambda event: None) as recorder:
        recorder.slots = trials_held(compute, {"CPU": 104.0, "GPU": 8.0})
        for label in ("decode 90 images of squares at 32 px", "evaluate probe"):
            recorder.on_event(Event("begin", label))
            clock[0] += 3600
            recorder.on_event(Event("end", label))
    (found,) = records(store)
    assert found["stages"]["evaluate"] == {"hours": 1.0, "cpu_hours": cpus, "gpu_hours": pytest.approx(gpus)}  # type: ignore[index]
    assert found["stages"]["decode"]["gpu_hours"] == 0, "decoding reserves no GPU"  # type: ignore[index]


def test_a_run_that_fails_in_a_stage_is_recorded_up_to_there(store: Store, clock: list[float]) -> None:
    with pytest.raises(KeyboardInterrupt), recorded(store, "s", Compute(), lambda event: None) as recorder:
        recorder.on_event(Event("begin", "3 searches, 2 at once"))
        clock[0] += 1800
        raise KeyboardInterrupt
    assert records(store)[0]["stages"]["search"]["hours"] == 0.5  # type: ignore[index]


def test_a_run_that_did_nothing_leaves_nothing(store: Store) -> None:
    with recorded(store, "s", Compute(), lambda event: None) as recorder:
        recorder.on_event(Event("message", "nothing to do"))
    assert not records(store)


def test_sums_by_study_and_submitter(
    store: Store, clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for who, study, hours in (("ada", "one", 1), ("ada", "one", 2), ("bob", "one", 4), ("ada", "two", 8)):
        monkeypatch.setenv("MEDSSL_SUBMITTER", who)
        with recorded(store, study, Compute(workers=2, gpus_per_worker=1), lambda event: None) as recorder:
            recorder.on_event(Event("begin", "pretrain x"))
            clock[0] += 3600 * hours
            recorder.on_event(Event("end", "pretrain x"))
    rows = summed(store)
    found = {(r["study"], r["submitter"]): (r["runs"], r["hours"], r["cpu_hours"], r["gpu_hours"]) for r in rows}
    assert found == {("one", "ada"): (2, 3, 6, 6), ("one", "bob"): (1, 4, 8, 8), ("two", "ada"): (1, 8, 16, 16)}
    assert main(["usage", store.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    assert main(["usage", store.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].split() == ["one", "ada", "2", "3.00", "6.00", "6.00"]
