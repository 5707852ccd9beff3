"""Ending a run in order when it gets SIGTERM: what a job's stop, a batch system and Kubernetes send.

A pretraining under way goes on to its next logged step, writes a checkpoint and ends; a second SIGTERM, or one that comes
in any other stage, ends the run at once, as Ctrl-C does. Nothing that was finished is lost either way, and the same command
goes on from there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from medssl.errors import MedsslError

_waiting: list[threading.Event] = []
"""Who wants to end in order; at most one pretraining at a time."""


class Stopped(MedsslError):
    """The run was told to stop, and did so in order."""

    exit_code = 143

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; run the same command again to go on")


class StopAtOnce(KeyboardInterrupt):
    """SIGTERM where there is nothing to end in order."""


@contextmanager
def sigterm_handled() -> Iterator[None]:
    """Takes SIGTERM as the above for the time of the block. Ray sets a handler of its own, which exits at once: this comes
    after `ray.init`. Outside the main thread, where Python handles no signals, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextmanager
def orderly_stop() -> Iterator[threading.Event]:
    """An event that a SIGTERM within the block sets, in place of ending the run there."""
    event = threading.Event()
    _waiting.append(event)
    try:
        yield event
    finally:
        _waiting.remove(event)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    fresh = [event for event in _waiting if not event.is_set()]
    if not fresh:
        raise StopAtOnce
    for event in fresh:
        event.set()
