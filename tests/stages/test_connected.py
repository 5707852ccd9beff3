"""What a run says of the cluster it meets: too small, busy, or growing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from medssl.errors import MedsslError
from medssl.stages.cluster import connected

pytestmark = pytest.mark.ray


def said(cpus: int, **options: Any) -> list[str]:
    lines: list[str] = []
    with connected(cpus=cpus, tell=lines.append, **options):
        pass
    return lines


def test_a_free_cluster_is_not_worth_a_word(ray_session: Any) -> None:
    deadline = time.monotonic() + 600
    while ray_session.available_resources().get("CPU", 0) < 6 and time.monotonic() < deadline:
        time.sleep(0.2)  # what earlier tests held is given back
    assert said(4) == []


def test_one_that_is_too_small_is_refused_at_once(ray_session: Any) -> None:
    with pytest.raises(MedsslError, match="the Ray cluster has 6 CPUs and the run needs 5 for its workers and 2 for reading"):
        said(5)
    with pytest.raises(MedsslError, match="the recipe asks for 8 GPUs and the Ray cluster has 0"):
        said(1, gpus=8)


def test_a_busy_one_is_named_as_what_the_run_waits_for(ray_session: Any) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    taken = placement_group([{"CPU": 4}])
    ray_session.get(taken.ready(), timeout=600)
    try:
        (line,) = said(2)
    finally:
        remove_placement_group(taken)
    assert line.startswith("the cluster is busy: ") and "of its 6 CPUs are free and the run takes 4; it waits" in line


def test_nodes_that_come_are_waited_for(ray_session: Any) -> None:
    """Another node joins while the run waits; without one it is refused when the time is over."""
    lines: list[str] = []
    started: list[subprocess.Popen[bytes]] = []

    def tell(line: str) -> None:
        lines.append(line)
        if not started:
            address = ray_session.get_runtime_context().gcs_address
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=3", "--block"]
            again = ["bash", "-c", 'until "$@"; do sleep 1; done', "node"]  # a node gives up where its agent is slow to start
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen([*again, *command], start_new_session=True, **quiet))

    try:
        with connected(cpus=6, wait_minutes=3, tell=tell):
            assert ray_session.cluster_resources()["CPU"] >= 8
    finally:
        for node in started:
            os.killpg(node.pid, signal.SIGTERM)
            node.wait(60)
    assert lines[0] == "the cluster has not 8 CPUs yet: waiting for its nodes for up to 3 minutes"
    end = time.monotonic() + 600
    while ray_session.cluster_resources().get("CPU", 0) > 6:
        assert time.monotonic() < end, "the further node is still there"
        time.sleep(0.2)
    with pytest.raises(MedsslError, match="the Ray cluster has 6 CPUs and the run needs 6"):
        said(6, wait_minutes=0.02)
