"""Progress of work that runs elsewhere: workers report to a board, the driver reads it and draws.

The board is a Ray actor that takes no CPU; a lost report is harmless, the next one holds the whole state.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

OnProgress = Callable[[int, int, str], None]
"""Called with (done, total, note); done and total count images."""


SILENT_SECONDS = 300.0
"""How long a run that is to stop waits for a report: half of what `medssl stop` gives it."""


@dataclass(frozen=True)
class Report:
    """State of one piece of work."""

    done: int
    total: int
    note: str = ""


@ray.remote(num_cpus=0)
class Board:
    """Holds the latest report of each piece of work by name."""

    def __init__(self) -> None:
        self._reports: dict[str, Report] = {}
        self._stop = False

    def post(self, name: str, report: Report) -> bool:
        """Replaces the report of `name`; whether the work is wanted to stop."""
        self._reports[name] = report
        return self._stop

    def stop(self) -> None:
        """Tells whoever reports from now on to stop."""
        self._stop = True

    def read(self) -> dict[str, Report]:
        """All reports."""
        return dict(self._reports)


def answered(answer: Any) -> bool:
    """Whether the answer to a report is there and says stop. Nothing waits for it, and a lost board says nothing."""
    try:
        return bool(ray.wait([answer], timeout=0)[0]) and bool(ray.get(answer))
    except ray.exceptions.RayError:
        return False


@contextmanager
def board(
    on_progress: OnProgress | None, stop_wanted: threading.Event | None = None, poll_seconds: float = 0.5
) -> Iterator[Any]:
    """A board whose summed reports are handed to `on_progress` from a thread of this process; yields its actor handle. Once
    `stop_wanted` is set, workers are told so in answer to their reports; where none comes for five minutes (nobody works: the
    cluster is busy, a node is lost) this process is sent a second SIGTERM, which ends it at once."""
    # On the driver's node: it is lost with the driver, not with a worker's node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    handle = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    over = threading.Event()

    def watch() -> None:
        seen: dict[str, Report] | None = None
        silent_since: float | None = None
        while not over.wait(poll_seconds):
            reports = _read(handle)
            if stop_wanted is not None and stop_wanted.is_set():
                if silent_since is None:
                    handle.stop.remote()
                if silent_since is None or reports != seen:
                    silent_since = time.monotonic()
                elif time.monotonic() - silent_since > SILENT_SECONDS:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            seen = reports
            _draw(reports, on_progress)

    thread = threading.Thread(target=watch, name="medssl-progress", daemon=True)
    thread.start()
    try:
        yield handle
    finally:
        over.set()
        thread.join(timeout=5)
        _draw(_read(handle), on_progress)
        ray.kill(handle)


def _read(handle: Any) -> dict[str, Report]:
    try:
        return dict(ray.get(handle.read.remote(), timeout=5))
    except ray.exceptions.RayError:  # the cluster is going away; the stage itself says what happened
        return {}


def _draw(reports: Mapping[str, Report], on_progress: OnProgress | None) -> None:
    if reports and on_progress is not None:
        last = list(reports.values())[-1]
        on_progress(sum(r.done for r in reports.values()), sum(r.total for r in reports.values()), last.note)
