"""What a run says of itself while it runs: counters and gauges by name, sent on to whoever exports them.

Plain code counts here and knows of no exporter. In a Ray process `medssl.exporter` sends them on to Ray's metrics, which
Prometheus scrapes as `ray_medssl_...` (a counter with `_total`); elsewhere they go nowhere and cost next to nothing. METRICS is
the one list of them: dashboards, alert rules and tests go by it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

PREFIX = "medssl_"


@dataclass(frozen=True)
class Metric:
    """One of them."""

    kind: Literal["gauge", "counter"]
    description: str
    labels: tuple[str, ...] = ("study", "arm")


_STORE = ()
_TRIALS = ("study", "stage", "arm")
METRICS: Mapping[str, Metric] = {
    "loss": Metric("gauge", "Loss of the pretraining at the last logged step."),
    "loss_term": Metric("gauge", "A term of the loss.", ("study", "arm", "term")),
    "learning_rate": Metric("gauge", "Learning rate of the pretraining."),
    "images_per_second": Metric("gauge", "Images a second over all ranks, since the last logged step."),
    "step_seconds": Metric("gauge", "Seconds of a step, since the last logged step."),
    "data_wait_share": Metric("gauge", "Share of the time spent waiting for images, 0 to 1."),
    "effective_rank": Metric("gauge", "Effective rank of a batch's features; 1 is a collapse onto one direction."),
    "embedding_std": Metric("gauge", "Standard deviation of normalised features times the root of their width; 0 is one point."),
    "epochs_done": Metric("gauge", "Epochs of the pretraining that are done, with the part of the current one."),
    "epochs": Metric("gauge", "Epochs that the pretraining has in all."),
    "expected_end_time_seconds": Metric("gauge", "Unix time at which the pretraining ends at the present rate."),
    "progress_time_seconds": Metric("gauge", "Unix time of the last logged step, before the first of the start."),
    "running": Metric("gauge", "1 while a pretraining is under way, 0 when it has ended."),
    "non_finite_steps": Metric("counter", "Steps whose loss or gradient was not finite; the first ends the pretraining."),
    "checkpoint_time_seconds": Metric("gauge", "Unix time of the last whole checkpoint, before the first of the start."),
    "checkpoint_upload_seconds": Metric("gauge", "Seconds that the last checkpoint took to be written."),
    "trials_done": Metric("gauge", "Trials of the stage that have ended well.", _TRIALS),
    "trials_running": Metric("gauge", "Trials of the stage under way.", _TRIALS),
    "trials_failed": Metric("gauge", "Lost attempts of the stage's trials, and trials that failed by themselves.", _TRIALS),
    "trials_planned": Metric("gauge", "Trials that the stage has in all.", _TRIALS),
    "seeds_done": Metric("gauge", "Head seeds of the stage that are evaluated; those of a probe train as one trial.", _TRIALS),
    "seeds_planned": Metric("gauge", "Head seeds that the stage has in all.", _TRIALS),
    "best_score": Metric("gauge", "Best validation score that a search has found.", ("study", "arm", "protocol")),
    "store_requests": Metric("counter", "Requests to the object store, each attempt once.", _STORE),
    "store_retries": Metric("counter", "Requests that were repeated.", _STORE),
    "store_errors": Metric("counter", "Requests given up, or refused for another reason than a missing object.", _STORE),
    "store_read_bytes": Metric("counter", "Bytes of objects read.", _STORE),
    "store_written_bytes": Metric("counter", "Bytes of objects written.", _STORE),
    "images_set_aside": Metric("gauge", "Images that an ingest could not use.", ("dataset",)),
}  # fmt: skip
"""By name, without the prefix."""


class Sink(Protocol):
    """Where they go."""

    def gauge(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Sets a gauge."""

    def count(self, name: str, by: float, labels: Mapping[str, str]) -> None:
        """Adds to a counter."""


_labels: ContextVar[Mapping[str, str]] = ContextVar("medssl_telemetry_labels", default=MappingProxyType({}))
_lock = threading.Lock()
_sink: Sink | None = None
_waiting: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
"""What was counted before there was a sink."""


def send_to(sink: Sink | None) -> None:
    """Sends everything from now on to `sink`, and what was counted before."""
    global _sink  # noqa: PLW0603
    with _lock:
        _sink = sink
        if sink is not None:
            for (name, labels), by in _waiting.items():
                sink.count(name, by, dict(labels))
            _waiting.clear()


@contextmanager
def labelled(**labels: str) -> Iterator[None]:
    """Gives everything said within the block, in this thread, these labels where it has them."""
    token = _labels.set({**_labels.get(), **labels})
    try:
        yield
    finally:
        _labels.reset(token)


def gauge(name: str, value: float, **labels: str) -> None:
    """Sets a gauge of METRICS; labels that are not given are the block's."""
    if _sink is not None:
        _sink.gauge(name, float(value), _chosen(name, "gauge", labels))


def count(name: str, by: float = 1.0, **labels: str) -> None:
    """Adds to a counter of METRICS."""
    chosen = _chosen(name, "counter", labels)
    if _sink is not None:
        _sink.count(name, float(by), chosen)
        return
    with _lock:
        key = name, tuple(sorted(chosen.items()))
        _waiting[key] = _waiting.get(key, 0.0) + by


def _chosen(name: str, kind: str, given: Mapping[str, str]) -> dict[str, str]:
    metric = METRICS[name]
    if metric.kind != kind or set(given) - set(metric.labels):
        raise ValueError(f"{name} is a {metric.kind} with labels {metric.labels}, not a {kind} with {sorted(given)}")
    known = {**_labels.get(), **given}
    return {label: known.get(label, "") for label in metric.labels}
