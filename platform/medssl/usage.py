"""What runs used: wall-clock hours of each stage and the CPUs and GPUs that it had reserved, kept beside the study.

Every run that did something leaves `studies/<study>/usage/<time>-<token>.json`, also one that failed or was stopped; only a
killed driver leaves none. Reserved is what counts on a shared cluster: a GPU that waits for data is taken all the same.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from medssl.artifacts import STUDIES
from medssl.compute import Compute
from medssl.events import Event, OnEvent
from medssl.store import Store

SUBMITTER_VARIABLE = "MEDSSL_SUBMITTER"
"""Set by `medssl submit`: in a job the user is the cluster's."""
USAGE = "usage"
_DRIVER_ONLY, _WITHOUT_GPU = ("report",), ("decode",)


@dataclass
class Recorder:
    """Listens to a study's events and adds up; `on_event` takes the place of the study's own."""

    compute: Compute
    forward: OnEvent
    slots: int | None = None
    """Trials that hold their CPUs and GPUs at once, once a cluster is there."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: the first word of its label."""
    _begun: dict[str, float] = field(default_factory=dict)

    def on_event(self, event: Event) -> None:
        """Passes an event on, and notes when stages begin and end."""
        if event.kind == "begin":
            self._begun[event.label] = time.monotonic()
        elif event.kind == "end":
            self._end(event.label)
        self.forward(event)

    def close(self) -> None:
        """Ends what was cut short."""
        for label in list(self._begun):
            self._end(label)

    def _end(self, label: str) -> None:
        began = self._begun.pop(label, None)
        if began is not None:
            stage = _stage(label)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began

    def to_json(self) -> dict[str, Any]:
        """What was used, by stage: hours, CPU hours and GPU hours."""
        found = {}
        for stage, seconds in self.seconds.items():
            cpus, gpus = self._reserved(stage)
            hours = seconds / 3600
            found[stage] = {"hours": hours, "cpu_hours": hours * cpus, "gpu_hours": hours * gpus}
        return found

    def _reserved(self, stage: str) -> tuple[float, float]:
        compute = self.compute
        if stage in _DRIVER_ONLY:
            return 1.0, 0.0
        if stage == "pretrain":
            gpus = compute.workers if compute.gpus_per_worker else 0
            return float(compute.workers * compute.cpus_per_worker), float(gpus)
        slots = self.slots or compute.concurrent_trials or 1
        return float(slots * compute.trial_cpus), 0.0 if stage in _WITHOUT_GPU else slots * compute.gpus_per_worker


def _stage(label: str) -> str:
    word = label.partition(" ")[0]
    return "search" if "searches" in label else {"judge": "transfer"}.get(word, word)


@contextmanager
def recorded(store: Store, study: str, compute: Compute, forward: OnEvent) -> Iterator[Recorder]:
    """Records what happens in the block, and leaves it in the store at its end, however that comes."""
    recorder = Recorder(compute, forward)
    started = time.time()
    try:
        yield recorder
    finally:
        recorder.close()
        if recorder.seconds:
            name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(started))
            facts = {
                "study": study, "submitter": submitter(), "started": started, "ended": time.time(), "stages": recorder.to_json(),
            }  # fmt: skip
            store.write(f"{STUDIES}/{study}/{USAGE}/{name}-{uuid.uuid4().hex[:8]}.json", json.dumps(facts, indent=1).encode())


def submitter() -> str:
    """Who asked for this run."""
    given = os.environ.get(SUBMITTER_VARIABLE)
    if given:
        return given
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def summed(store: Store) -> list[dict[str, Any]]:
    """Sums over all runs in a store, by study and submitter: runs, hours, CPU hours, GPU hours."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in store.list(f"{STUDIES}/"):
        if f"/{USAGE}/" not in entry.key or not entry.key.endswith(".json"):
            continue
        facts = json.loads(store.read(entry.key))
        key = facts["study"], facts["submitter"]
        start = {"study": key[0], "submitter": key[1], "runs": 0, "hours": 0.0, "cpu_hours": 0.0, "gpu_hours": 0.0}
        row = rows.setdefault(key, start)
        row["runs"] += 1
        for stage in facts["stages"].values():
            for name in ("hours", "cpu_hours", "gpu_hours"):
                row[name] += stage[name]
    return [rows[key] for key in sorted(rows)]
