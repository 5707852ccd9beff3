"""What the command line draws: progress bars with rates and remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from medssl.events import Event

_PLAIN_SECONDS = 10.0


class _Rate(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} images/s" if speed else "", style="cyan")


class Console:
    """Shows events of one command on standard error, so that standard output stays for results."""

    def __init__(self) -> None:
        self._rich = RichConsole(stderr=True, highlight=False)
        self._live = self._rich.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=self._rich, transient=False,
        )  # fmt: skip
        self._redirect = contextlib.redirect_stdout(sys.stderr)
        self._task: Any = None
        self._label = ""
        self._first = -1
        self._began = self._printed = 0.0

    def __enter__(self) -> Console:
        # Ray prints lines of its own to standard output; that is kept for the result alone.
        self._redirect.__enter__()
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._progress.stop()
        self._redirect.__exit__(kind, error, trace)

    def __call__(self, event: Event) -> None:
        """Draws one event."""
        if event.kind == "message":
            self._print(event.label)
        elif event.kind == "begin":
            self._begin(event)
        elif event.kind == "progress":
            self._advance(event)
        elif event.kind == "end":
            self._end(event)

    def on_progress(self, label: str) -> Any:
        """A callback (done, total[, note]) that draws one bar from its first call on, for stages used without a study."""

        def advance(done: int, total: int, note: str = "") -> None:
            self(Event("progress", label, done, total, note))

        return advance

    def _begin(self, event: Event) -> None:
        self._label, self._began, self._printed = event.label, time.monotonic(), time.monotonic()
        self._first = -1
        if self._live:
            self._task = self._progress.add_task(event.label, total=event.total or None, note="")
        else:
            self._print(f"{event.label} ...")

    def _advance(self, event: Event) -> None:
        if event.label != self._label:
            self._begin(Event("begin", event.label, total=event.total))
        if self._first < 0:
            self._first = event.done
        if self._live:
            self._progress.update(self._task, completed=event.done, total=event.total or None, note=event.note)
            return
        now = time.monotonic()
        if now - self._printed < _PLAIN_SECONDS or not event.total or event.done <= self._first:
            return
        self._printed = now
        rate = (event.done - self._first) / max(now - self._began, 1e-9)  # what an earlier run did is not this one's speed
        left = (event.total - event.done) / rate if rate else float("nan")
        self._print(
            f"{event.label}: {event.done:,}/{event.total:,} ({rate:,.0f} images/s, {left:,.0f} s left) {event.note}".rstrip()
        )

    def _end(self, event: Event) -> None:
        seconds = time.monotonic() - self._began
        if self._live and self._task is not None:
            task = self._progress.tasks[-1]
            self._progress.update(self._task, completed=task.total or task.completed, note=event.note)
        else:
            self._print(f"{event.label}: done in {seconds:,.0f} s {event.note}".rstrip())

    def _print(self, text: str) -> None:
        if self._live:
            self._progress.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)
