"""What long work tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something to show: a stage began, moved on, ended, or a line to print."""

    kind: str
    """begin, progress, end or message."""
    label: str
    done: int = 0
    total: int = 0
    note: str = ""


OnEvent = Callable[[Event], None]
