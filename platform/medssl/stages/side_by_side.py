"""Several stages under way in threads of one driver, shown as one and ended together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from medssl.events import Event, OnEvent
from medssl.stages.trials import Halt


class SideBySide:
    """Adds up the progress of what runs at once: listeners hear of one stage, from one thread at a time."""

    def __init__(self, emit: OnEvent, label: str) -> None:
        self.halt = Halt()
        self._emit, self._label = emit, label
        self._lock = threading.Lock()
        self._progress: dict[str, tuple[int, int]] = {}

    def emit_of(self, label: str) -> OnEvent:
        """Takes the events of one of the stages."""
        with self._lock:
            self._progress[label] = 0, 0

        def emit(event: Event) -> None:
            with self._lock:
                if event.kind == "message":
                    self._emit(event)
                elif event.kind == "progress":
                    self._progress[label] = event.done, event.total
                    done, total = (sum(each[i] for each in self._progress.values()) for i in (0, 1))
                    self._emit(Event("progress", self._label, done, total, f"{done} of {total} trials so far"))

        return emit

    @contextmanager
    def under_way(self, at_once: int) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Gives a function that starts a stage. Leaves when all are done; when one fails, or at Ctrl-C, the others are told to
        end, and the reason is raised."""
        self._emit(Event("begin", self._label))
        pool, begun = ThreadPoolExecutor(at_once), list[Future[None]]()
        try:
            yield lambda work: begun.append(pool.submit(work))
            done, _ = wait(begun, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
        except BaseException:
            self.halt.event.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self._emit(Event("end", self._label))
