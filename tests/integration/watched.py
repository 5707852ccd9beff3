"""What the tests of real faults watch: conditions that come about, and processes that come and go."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil

TRAINING_WORKER = "RayTrainWorker"
PATIENCE = 900.0
"""Seconds after which something will not come about any more: a bound for what hangs, not for what is slow."""


def wait(
    condition: Callable[[], bool], what: str, seconds: float = PATIENCE, driver: subprocess.Popen[Any] | None = None
) -> None:
    """Fails when something does not come about in time, or when the process that should bring it about has ended."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        assert driver is None or driver.poll() is None or condition(), f"left with {driver.poll()} before {what}"
        time.sleep(0.05)


def family(pid: int, name: str = "") -> list[psutil.Process]:
    """The processes below one whose command lines hold a name; none where there is no such process (any more)."""
    try:
        return [process for process in psutil.Process(pid).children(recursive=True) if name in _command_line(process)]
    except psutil.NoSuchProcess:
        return []


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def most_at_once(ray: Any, task: str, since: float, count: int) -> int:
    """How many tasks of Ray Data were under way at once, of the `count` or more that began after a time, by Ray's timeline."""
    spans: list[tuple[float, float]] = []

    def told() -> bool:
        events = [e for e in ray.timeline() if e["cat"] == f"task::MapBatches({task})" and e["ts"] > since * 1e6]
        spans[:] = [(e["ts"], e["ts"] + e["dur"]) for e in events]
        return len(spans) >= count

    wait(told, f"{count} tasks in the timeline")
    return max(sum(start <= at < stop for start, stop in spans) for at, _ in spans)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""
