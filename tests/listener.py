"""Hears what telemetry says, in place of an exporter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from medssl import telemetry


class _Latest:
    def __init__(self) -> None:
        self.value: dict[str, float] = {}

    def gauge(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.value[name] = value

    def count(self, name: str, by: float, labels: Mapping[str, str]) -> None:
        """Counts are not kept."""


@contextmanager
def latest_gauges() -> Iterator[dict[str, float]]:
    """The last value of each gauge that was set in the block."""
    sink = _Latest()
    telemetry.send_to(sink)
    try:
        yield sink.value
    finally:
        telemetry.send_to(None)
