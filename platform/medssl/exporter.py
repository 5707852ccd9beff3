"""Sends what `medssl.telemetry` hears on to Ray's metrics, from any process that Ray knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medssl import telemetry


class _RayMetrics:
    """Ray's own counters and gauges, made when they are first needed."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def gauge(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """See `telemetry.Sink`."""
        self._of(name).set(value, tags=dict(labels))

    def count(self, name: str, by: float, labels: Mapping[str, str]) -> None:
        """See `telemetry.Sink`."""
        if by > 0:  # Ray refuses to add nothing
            self._of(name).inc(by, tags=dict(labels))

    def forget(self) -> None:
        """Lets go of what was made."""
        self._made.clear()

    def _of(self, name: str) -> Any:
        from ray.util import metrics

        if name not in self._made:
            metric = telemetry.METRICS[name]
            kind = metrics.Gauge if metric.kind == "gauge" else metrics.Counter
            self._made[name] = kind(telemetry.PREFIX + name, description=metric.description, tag_keys=metric.labels)
        return self._made[name]


_metrics = _RayMetrics()


def export() -> None:
    """From now on, in this process."""
    telemetry.send_to(_metrics)


def stop_export() -> None:
    """This process leaves its Ray, and its metrics with it: another Ray gets metrics of its own."""
    telemetry.send_to(None)
    _metrics.forget()
