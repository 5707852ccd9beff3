"""Patience with a store that is away for a while: one loop of jittered exponential backoff until a deadline.

Every request of the store and of the pyarrow filesystem goes through :func:`patiently`. What is worth another attempt
is the caller's knowledge (`is_transient`); how long to go on is set here, once: 120 seconds, or
MEDSSL_STORE_DEADLINE_SECONDS.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from medssl import telemetry
from medssl.errors import StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE_VARIABLE = "MEDSSL_STORE_DEADLINE_SECONDS"
DEFAULT_DEADLINE_SECONDS = 120.0
FIRST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 3.0
"""Bound on one wait: after the store is back, work goes on within this time plus one request."""
QUIET_SECONDS = 3.0
"""Shorter interruptions are not worth a line in the log."""


def deadline_seconds() -> float:
    """How long a request is attempted before it counts as failed; StoreError when the variable is not a number."""
    text = os.environ.get(DEADLINE_VARIABLE, "")
    if not text:
        return DEFAULT_DEADLINE_SECONDS
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise StoreError(f"{DEADLINE_VARIABLE}={text!r} is not a number of seconds: give 0 or more, e.g. 120")
    return value


def waits() -> Callable[[], float]:
    """A function giving one wait after the other, in seconds: doubling, half of each at random, bounded."""
    step = FIRST_WAIT_SECONDS

    def following() -> float:
        nonlocal step
        wait = step * random.uniform(0.5, 1.0)
        step = min(step * 2, LONGEST_WAIT_SECONDS)
        return wait

    return following


def patiently(
    attempt: Callable[[], T],
    *,
    is_transient: Callable[[Exception], bool],
    what: str,
    deadline: float | None = None,
) -> T:
    """`attempt()`, again after each transient failure until `deadline` seconds are over (None: `deadline_seconds()`).

    Raises the attempt's own exception: a lasting one at once, a transient one when time is up. `what` names the request
    in the log, without secrets.
    """
    limit = deadline_seconds() if deadline is None else deadline
    started = time.monotonic()
    following = waits()
    warned = False
    while True:
        telemetry.count("store_requests")
        try:
            result = attempt()
        except Exception as error:
            passed = time.monotonic() - started
            wait = following()
            if not is_transient(error):
                raise
            if passed + wait > limit:
                telemetry.count("store_errors")
                raise
            telemetry.count("store_retries")
            if passed > QUIET_SECONDS and not warned:
                warned = True
                log.warning("%s: no answer from the store (%s), trying for %.0f s", what, type(error).__name__, limit)
            time.sleep(wait)
        else:
            if warned:
                log.warning("%s: the store is back after %.0f s", what, time.monotonic() - started)
            return result
