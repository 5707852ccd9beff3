"""SIGTERM and kill -9 of the driver, then `run` again: it goes on, does nothing twice, and none of its processes is left."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import tiny
from watched import PATIENCE, TRAINING_WORKER, alive, family, wait

from medssl.artifacts import finished, read_marker
from medssl.store import Store, open_store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, int]]:
    """A running Ray cluster that is not the run's own; its address and its head's process id."""
    folder = Path("/tmp") / f"medssl-ray-{os.getpid()}"
    ray = str(Path(sys.executable).with_name("ray"))
    head = subprocess.Popen(
        [ray, "start", "--head", "--port=0", "--num-cpus=6", "--include-dashboard=false", f"--temp-dir={folder}", "--block"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=tiny.environment(),
    )  # fmt: skip
    try:
        assert head.stdout is not None
        printed = ""
        for line in head.stdout:
            printed += line
            found = re.search(r"--address='([\d.]+:\d+)'", line)
            if found:
                yield found.group(1), head.pid
                break
        else:
            pytest.fail(f"no Ray came up:\n{printed}")
    finally:
        members = family(head.pid)
        head.kill()
        for process in members:
            process.kill()
        psutil.wait_procs(members, timeout=20)


def marked_steps(store: Store) -> list[int]:
    keys = [e.key for e in store.list("artifacts/") if "/checkpoints/step-" in e.key and e.key.endswith(".json")]
    return [int(key.rpartition("step-")[2].removesuffix(".json")) for key in keys]


def losses(store: Store) -> list[tuple[int, int, float]]:
    name = next(n for n in finished(store) if n.startswith("pretrain-"))
    frame = pq.read_table(io.BytesIO(store.read(f"artifacts/{name}/history.parquet"))).to_pandas()
    return sorted(zip(frame["rank"], frame["step"], frame["loss"], strict=True))


@pytest.fixture
def recipe(undisturbed: Any) -> Path:
    path: Path = undisturbed.recipe
    return path


@pytest.fixture
def calm(undisturbed: Any) -> Store:
    store: Store = undisturbed.store
    return store


def kill_driver(arguments: list[str], store: Store, step: int, head: int = 0) -> list[psutil.Process]:
    """Starts a run, sends its driver SIGKILL when it has a checkpoint of a step, and waits for the end of its workers.

    Returns:
        its other processes: Ray's agents take a minute to go.
    """
    driver = subprocess.Popen(
        tiny.command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=tiny.environment()
    )
    wait(lambda: any(marked >= step for marked in marked_steps(store)), f"a checkpoint of step {step}", driver=driver)
    ours = family(driver.pid) + family(head, TRAINING_WORKER)
    trainers = alive(family(driver.pid, TRAINING_WORKER) + family(head, TRAINING_WORKER))
    assert trainers
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait(lambda: not alive(trainers), f"the end of the training workers, still there: {alive(trainers)}")
    return ours


def stop_driver(arguments: list[str], store: Store, log_file: Path) -> int:
    """Starts a run and sends its driver SIGTERM (as a job's stop, a batch system and Kubernetes do) at its first checkpoint.

    Returns:
        the step that it stopped after, which is that of its last checkpoint; none of its workers is left.
    """
    with open(log_file, "w") as log:
        driver = subprocess.Popen(tiny.command(*arguments), stdout=log, stderr=log, env=tiny.environment())
    wait(lambda: bool(marked_steps(store)), "the first checkpoint", driver=driver)
    trainers = family(driver.pid, TRAINING_WORKER)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=PATIENCE) == 143
    said = log_file.read_text()
    assert "Traceback" not in said
    line = r"medssl: pretrain barlow_twins seed 0 stopped after step (\d+), the last checkpoint is of step (\d+); run the same"
    found = re.search(line, said)
    assert found, said
    assert found.group(1) == found.group(2) and max(marked_steps(store)) == int(found.group(1))
    wait(lambda: not alive(trainers), f"the end of the training workers: {alive(trainers)}")
    return int(found.group(1))


@pytest.mark.acceptance
def test_a_stopped_run_goes_on_from_the_very_step(ray_session: Any, recipe: Path, tmp_path: Path) -> None:
    arguments = ["run", str(recipe), "--store", str(tmp_path / "store"), "--set", "arms.1.epochs=30"]
    store = open_store(str(tmp_path / "store"), create=True)
    stopped = stop_driver(arguments, store, tmp_path / "log.txt")
    tiny.medssl(*arguments)
    steps = [(rank, step) for rank, step, _ in losses(store)]
    assert steps == [(rank, step) for rank in (0, 1) for step in range(1, len(steps) // 2 + 1)]
    marker = read_marker(store, next(n for n in finished(store) if n.startswith("pretrain-")))
    assert marker is not None and marker.facts["resumed_at_step"] == stopped < len(steps) // 2


@pytest.mark.parametrize("stopped_before", [False, pytest.param(True, marks=pytest.mark.acceptance)])
def test_a_run_that_was_killed_goes_on(recipe: Path, calm: Store, tmp_path: Path, stopped_before: bool) -> None:
    """SIGKILL leaves the checkpoints that there are, SIGTERM one of the current step; it goes on as if undisturbed."""
    arguments = ["run", str(recipe), "--store", str(tmp_path / "store")]
    store = open_store(str(tmp_path / "store"), create=True)
    stopped = stop_driver(arguments, store, tmp_path / "log.txt") if stopped_before else 0
    ours = kill_driver(arguments, store, stopped + 2)
    before = {e.key: store.read(e.key) for e in store.list("markers/")}
    assert any("initialise-" in key for key in before) and not any("pretrain-" in key for key in before)
    again = tiny.medssl(*arguments)
    assert "pretrain" in again.stderr and "initialise" not in again.stderr
    assert {key: store.read(key) for key in before} == before
    assert losses(store) == losses(calm)
    marker = read_marker(store, next(n for n in finished(store) if n.startswith("pretrain-")))
    # its workers may have come to the end before they knew that the killed driver was gone
    assert marker is not None and marker.facts["resumed_at_step"] >= stopped + 2
    assert not family(os.getpid(), TRAINING_WORKER)
    assert finished(store) == finished(calm)
    wait(lambda: not alive(ours), f"the end of the run's processes, still there: {alive(ours)}")


@pytest.mark.acceptance
def test_a_killed_run_in_a_cluster_goes_on(recipe: Path, calm: Store, tmp_path: Path, cluster: tuple[str, int]) -> None:
    """The driver goes, the cluster stays: its training workers end by themselves."""
    address, head = cluster
    arguments = ["run", str(recipe), "--store", str(tmp_path / "store"), "--address", address]
    store = open_store(str(tmp_path / "store"), create=True)
    ours = kill_driver(arguments, store, 4, head)
    before = {e.key: store.read(e.key) for e in store.list("markers/")}
    assert any("initialise-" in key for key in before) and not any("pretrain-" in key for key in before)
    again = tiny.process(*arguments)
    assert "pretrain" in again.stderr and "initialise" not in again.stderr
    assert {key: store.read(key) for key in before} == before
    assert losses(store) == losses(calm) and finished(store) == finished(calm)
    assert not family(head, TRAINING_WORKER)
    wait(lambda: not alive(ours), f"the end of the run's processes, still there: {alive(ours)}")


@pytest.mark.acceptance
def test_killed_searches_of_two_arms_go_on_and_repeat_no_finished_trial(ray_session: Any, tmp_path: Path) -> None:
    """Two searches of three fine-tunings are under way at once when the machine is lost: driver and trials are killed."""
    store_uri = str(tmp_path / "store")
    tiny.ingest(tmp_path / "drawn", f"{store_uri}/datasets/lesions")
    whole = tiny.recipe()
    rates = [0.0003, 0.003, 0.03]
    tuned = whole["protocols"][1] | {
        "head_seeds": 1, "training": {"epochs": 30}, "search": {"learning_rate": rates, "weight_decay": [0.0], "head_seeds": 1},
    }  # fmt: skip
    arms = [{"name": "small"}, {"name": "smaller", "encoder": {"name": "test_resnet", "image_px": 24}}]
    repeats = {"pretraining_seeds": 1, "label_draws": 1, "labels": 40}
    compute = {"workers": 2, "concurrent_trials": 4}
    fields = tiny.recipe(arms=arms, repeats=repeats, protocols=[tuned], comparisons=[], compute=compute)
    command = tiny.command("run", str(tiny.write(tmp_path / "study.yaml", fields)), "--store", store_uri)
    store = open_store(store_uri, create=True)

    def scored() -> dict[str, str]:
        """What is known of each finished trial's file, by its path."""
        return {e.key: f"{e.size} {Path(tmp_path / 'store' / e.key).stat().st_mtime_ns}" for e in store.list("artifacts/search-")
                if "/trials/" in e.key}  # fmt: skip

    with open(tmp_path / "first.txt", "w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=tiny.environment())
    wait(lambda: len({key.split("/")[1] for key in scored()}) == 2, "a finished trial of each search", driver=driver)
    ours = family(driver.pid, "ImplicitFunc")  # trials; Ray's agents linger
    assert ours
    driver.kill()
    for trial in ours:  # left alone they come to their ends within seconds
        with suppress(psutil.NoSuchProcess):
            trial.kill()
    driver.wait()
    wait(lambda: not alive(ours), f"the end of the run's processes, still there: {alive(ours)}")
    assert "2 searches, 2 at once" in (tmp_path / "first.txt").read_text()
    before = scored()
    assert len(before) < 6 and not [name for name in finished(store) if name.startswith("search-")]
    again = tiny.medssl(*command[3:])
    after = scored()
    assert len(after) == 6 and {key: after[key] for key in before} == before
    assert "2 searches, 2 at once" in again.stderr
    assert sum(name.startswith("search-") for name in finished(store)) == 2
