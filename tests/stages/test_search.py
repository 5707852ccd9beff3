"""Search and fan-out on a real local Ray Tune: every point once, resumption, failures, and what is left in the store."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.listener import latest_gauges

import medssl
from medssl.compute import Compute
from medssl.errors import MedsslError, NonFiniteLoss
from medssl.protocols import Search
from medssl.stages.search import Found, fan_out, search
from medssl.store import Store, open_store

pytestmark = pytest.mark.ray

COMPUTE = Compute(concurrent_trials=2, max_failures=1)
PAPER_004 = Search(
    learning_rate=(1e-5, 1e-4, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1), weight_decay=(0.0, 1e-5, 1e-4, 1e-3)
)  # fmt: skip
"""As many points as paper 004 tries: 7 by 4."""
GRID = Search(learning_rate=(0.001, 0.01, 0.1), weight_decay=(0.0, 0.01))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), create=True)


def logged(folder: Path, score: Callable[[Mapping[str, float]], float]) -> Callable[[Mapping[str, float]], float]:
    """The objective, with a line in a file for each call, wherever it runs."""

    def objective(point: Mapping[str, float]) -> float:
        with open(folder / "calls.jsonl", "a") as file:
            file.write(json.dumps(dict(point)) + "\n")
        return score(point)

    return objective


def calls(folder: Path) -> list[dict[str, float]]:
    file = folder / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def hill(point: Mapping[str, float]) -> float:
    """Highest, 0.9, at learning rate 0.01 without weight decay."""
    return 0.9 - 0.1 * abs(math.log10(point["learning_rate"]) + 2) - point["weight_decay"]


def test_a_grid_is_tried_whole_and_each_point_once(
    ray_session: Any, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    seen: list[tuple[int, int, str]] = []
    found = search(
        logged(tmp_path, hill), PAPER_004, store=store, name="search-a", compute=COMPUTE,
        on_progress=lambda *report: seen.append(report),
    )  # fmt: skip
    wanted = [(rate, decay) for rate in PAPER_004.learning_rate for decay in PAPER_004.weight_decay]
    assert sorted((c["learning_rate"], c["weight_decay"]) for c in calls(tmp_path)) == wanted
    assert [(p["learning_rate"], p["weight_decay"]) for p, _ in found.points] == wanted
    assert [score for _, score in found.points] == pytest.approx([hill(p) for p, _ in found.points])
    assert found.best == {"learning_rate": 0.01, "weight_decay": 0.0}
    assert found.score == pytest.approx(0.9)
    assert not found.on_edge
    assert seen[0][:2] == (0, 28)
    assert seen[-1] == (28, 28, "28 of 28 trials")
    assert {entry.key.split("/")[0] for entry in store.list()} == {"trials"}  # nothing of Tune's is left
    assert capfd.readouterr() == ("", "")

    again = search(logged(tmp_path, hill), PAPER_004, store=store, name="search-a", compute=COMPUTE)
    assert again == found
    assert len(calls(tmp_path)) == 28


def test_an_interrupted_search_goes_on_where_it_was(ray_session: Any, store: Store, tmp_path: Path) -> None:
    def broken(point: Mapping[str, float]) -> float:
        if len(calls(tmp_path)) > 3:
            raise MedsslError("the store is full: make room")
        return hill(point)

    with pytest.raises(MedsslError, match=r"^search-b: the store is full: make room$"):
        search(logged(tmp_path, broken), GRID, store=store, name="search-b", compute=COMPUTE)
    finished = [json.loads(store.read(entry.key)) for entry in store.list("trials/")]
    assert 0 < len(finished) < 6
    (tmp_path / "calls.jsonl").unlink()
    found = search(logged(tmp_path, hill), GRID, store=store, name="search-b", compute=COMPUTE)
    assert found.best == {"learning_rate": 0.01, "weight_decay": 0.0}
    assert len(calls(tmp_path)) == 6 - len(finished)
    done = [{key: entry[key] for key in ("learning_rate", "weight_decay")} for entry in finished]
    assert not any(point in done for point in calls(tmp_path))


def test_tpe_is_the_same_every_time_and_resumes(ray_session: Any, store: Store, tmp_path: Path) -> None:
    space = Search(sampler="tpe", learning_rate=(1e-4, 1.0), weight_decay=(0.0, 1e-4, 1e-1), trials=6)
    first = search(logged(tmp_path, hill), space, store=store, name="search-c", compute=COMPUTE)
    assert len(first.points) == len(calls(tmp_path)) == 6
    assert all(1e-4 <= p["learning_rate"] <= 1 and 0 <= p["weight_decay"] <= 0.1 for p, _ in first.points)
    assert {p["weight_decay"] == 0 for p, _ in first.points} == {True, False}
    assert first.score == max(score for _, score in first.points)
    for entry in store.list("trials/")[:2]:
        store.delete(entry.key)
    other = Compute(concurrent_trials=1)  # how many run at once does not matter
    second = search(logged(tmp_path, hill), space, store=store, name="search-c", compute=other)
    assert second == first
    assert len(calls(tmp_path)) == 8


def test_an_unforeseen_failure_ends_the_search_with_its_reason_and_is_not_replayed(
    ray_session: Any, store: Store, tmp_path: Path
) -> None:
    def wrong(point: Mapping[str, float]) -> float:
        raise KeyError("column")

    one = Search(learning_rate=(0.001, 0.01))
    with pytest.raises(MedsslError, match=r"KeyError: 'column'"):
        search(logged(tmp_path, wrong), one, store=store, name="search-e", compute=Compute(concurrent_trials=1, max_failures=3))
    assert len(calls(tmp_path)) == 1
    with pytest.raises(MedsslError, match=r"validation score of learning rate 0\.0+1, weight decay 0 is nan"):
        search(lambda point: float("nan"), one, store=store, name="search-e", compute=Compute(concurrent_trials=1))


def test_a_lost_process_is_replaced(ray_session: Any, store: Store, tmp_path: Path) -> None:
    def dies_once(point: Mapping[str, float]) -> float:
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        return hill(point)

    one = Search(learning_rate=(0.001, 0.01))
    with latest_gauges() as told:
        found = search(logged(tmp_path, dies_once), one, store=store, name="search-f", compute=COMPUTE)
    assert len(found.points) == 2
    assert len(calls(tmp_path)) == 3
    assert (told["trials_failed"], told["trials_done"], told["trials_running"]) == (1, 2, 0)


@pytest.mark.parametrize(
    ("best", "expected"),
    [((0.001, 0.01), True), ((0.1, 0.0), True), ((0.01, 0.01), True), ((0.01, 0.0), False)],
)
def test_the_edge_of_a_grid(best: tuple[float, float], expected: bool) -> None:
    from medssl.stages.search import _on_edge

    assert _on_edge({"learning_rate": best[0], "weight_decay": best[1]}, GRID) is expected
    assert not _on_edge({"learning_rate": 0.1, "weight_decay": 0.0}, Search(learning_rate=(0.1,)))


def test_tasks_fan_out_and_share_what_a_process_has_opened(ray_session: Any, tmp_path: Path) -> None:
    cache: dict[str, int] = {}

    def work(task: int) -> None:
        cache["opened"] = cache.get("opened", 0) + 1
        (tmp_path / f"task-{task}-{cache['opened']}").touch()

    seen: list[tuple[int, int, str]] = []
    costs, seeds = [10, 1, 1, 1, 1, 1], [35, 1, 1, 1, 1, 1]
    with latest_gauges() as told:
        fan_out(work, range(6), compute=COMPUTE, weights=costs, seeds=seeds, on_progress=lambda *report: seen.append(report))
    assert (told["trials_done"], told["trials_failed"], told["seeds_done"], told["seeds_planned"]) == (6, 0, 40, 40)
    names = sorted(path.name for path in tmp_path.glob("task-*"))
    assert [name.split("-")[1] for name in names] == ["0", "1", "2", "3", "4", "5"]
    assert max(int(name.split("-")[2]) for name in names) > 1
    assert seen[-1] == (15, 15, "6 of 6 trials")
    fan_out(work, [], compute=COMPUTE)


def test_a_task_that_fails_stops_the_others_and_says_why(ray_session: Any, store: Store, tmp_path: Path) -> None:
    def work(task: int) -> None:
        (tmp_path / f"task-{task}").touch()
        if task == 1:
            raise MedsslError("image 17 is gone: ingest again")

    with pytest.raises(MedsslError, match="image 17 is gone: ingest again"):
        fan_out(work, range(8), compute=Compute(concurrent_trials=1), store=store)
    assert not (tmp_path / "task-7").exists()
    assert store.list() == []


def test_a_trial_has_as_many_threads_as_cpus(ray_session: Any, tmp_path: Path) -> None:
    def work(task: int) -> None:
        import torch

        (tmp_path / f"threads-{torch.get_num_threads()}").touch()

    fan_out(work, [0], compute=Compute(concurrent_trials=1, trial_cpus=2))
    assert (tmp_path / "threads-2").exists()


@pytest.mark.s3
def test_a_point_that_diverges_is_the_worst_one_and_tune_leaves_no_secret_in_the_bucket(
    ray_session: Any, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that Tune writes while the search runs is looked at before it is deleted."""
    written: dict[str, bytes] = {}

    def diverging(point: Mapping[str, float]) -> float:
        if point["learning_rate"] > 0.01:
            raise NonFiniteLoss("the loss is not finite")
        return hill(point)

    def keep_instead(self: Store, prefix: str) -> None:
        written.update({entry.key: self.read(entry.key) for entry in self.list(prefix)})

    monkeypatch.setattr(type(s3_store), "delete_prefix", keep_instead)
    found: Found = search(diverging, GRID, store=s3_store, name="search-g", compute=COMPUTE)
    assert [score for point, score in found.points if point["learning_rate"] == 0.1] == [0.0, 0.0]
    assert found.best["learning_rate"] == 0.01
    assert any(key.endswith("tuner.pkl") for key in written)
    secrets = [os.environ[name].encode() for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")]
    assert not [key for key, data in written.items() if any(secret in data for secret in secrets)]


@pytest.mark.acceptance
def test_trials_share_a_gpu_by_the_fraction_that_the_recipe_gives(tmp_path: Path) -> None:
    """Two trials of half a GPU each on a Ray that declares one: both are under way at once, a third waits."""
    script = tmp_path / "half.py"
    script.write_text("""
import json, sys, time
import ray
ray.init("local", num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False)
from medssl.compute import Compute
from medssl.protocols import Search
from medssl.stages.search import search
from medssl.store import open_store

@ray.remote(num_cpus=0)
class Count:
    def __init__(self): self.now, self.most, self.shares = 0, 0, []
    def begin(self, share):
        self.now += 1; self.most = max(self.most, self.now); self.shares.append(share)
    def end(self): self.now -= 1
    def most_of(self): return self.most
    def told(self): return [self.most, self.shares]

count = Count.remote()

def objective(point):
    ray.get(count.begin.remote(ray.get_runtime_context().get_assigned_resources().get("GPU")))
    end = time.monotonic() + 600
    while ray.get(count.most_of.remote()) < 2 and time.monotonic() < end: time.sleep(0.05)
    ray.get(count.end.remote())
    return point["learning_rate"]

space = Search(learning_rate=(0.001, 0.01, 0.1, 0.2), weight_decay=(0.0,))
compute = Compute(gpus_per_worker=0.5, concurrent_trials=4)
search(objective, space, store=open_store(sys.argv[1], create=True), name="half", compute=compute)
print(json.dumps(ray.get(count.told.remote())))
""")
    command = [sys.executable, str(script), str(tmp_path / "store")]
    path = os.pathsep.join(filter(None, [str(Path(medssl.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False,
        env=os.environ | {"PYTHONPATH": path, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [2, [0.5] * 4]
