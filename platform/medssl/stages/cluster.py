"""A Ray to run on: the one the user points to, or one of our own that ends with the run."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray

from medssl.compute import SPARE_CPUS
from medssl.errors import MedsslError
from medssl.exporter import export, stop_export
from medssl.stopping import sigterm_handled

_POLL_SECONDS = 2.0
_PROBE_SECONDS = 5.0


@contextmanager
def connected(
    *,
    cpus: int,
    address: str | None = None,
    gpus: float = 0,
    wait_minutes: float = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """A Ray with at least `cpus` + 2 logical CPUs, and `gpus` GPUs, for the time of the block.

    An initialised Ray is used as it is and left alone. Otherwise `address` (or RAY_ADDRESS) names a running cluster, or a
    local Ray is started and shut down at the end. Its usage statistics are off unless the user has set them. A cluster that is
    too small is asked to grow, and waited for at most `wait_minutes`.

    Raises:
        MedsslError: the address does not answer or wants a token, or the cluster is (still) too small.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ours = not ray.is_initialized()
    if ours:
        _start(cpus + SPARE_CPUS, address or os.environ.get("RAY_ADDRESS"), tell)
    try:
        with sigterm_handled() if ours else nullcontext(), _grown(cpus + SPARE_CPUS, gpus, wait_minutes, tell):
            _require_cpus(cpus)
            require_gpus(gpus)
            _tell_of_a_queue(cpus + SPARE_CPUS, gpus, tell)
            export()
            yield
    finally:
        if ours:
            stop_export()
            ray.shutdown()


@contextmanager
def _grown(cpus: int, gpus: float, minutes: float, tell: Callable[[str], None]) -> Iterator[None]:
    """Asks an autoscaler for what is missing and waits for it.

    A cluster has one such request, whoever made it, until another takes its place: it is repeated while this run waits, and
    withdrawn when the nodes are there, which the run's own work then holds.
    """
    wanted = {"CPU": float(cpus), "GPU": float(gpus)}

    def missing() -> dict[str, float]:
        there = ray.cluster_resources()
        return {name: amount for name, amount in wanted.items() if amount > there.get(name, 0)}

    if not minutes or not missing():
        yield
        return
    from ray.autoscaler.sdk import request_resources

    try:
        amounts = " and ".join(f"{amount:g} {name}s" for name, amount in missing().items())
        tell(f"the cluster has not {amounts} yet: waiting for its nodes for up to {minutes:g} minutes")
        end = time.monotonic() + 60 * minutes
        while missing() and time.monotonic() < end:
            request_resources(bundles=[{"CPU": 1}] * cpus + [{"GPU": 1}] * math.ceil(gpus))
            time.sleep(_POLL_SECONDS)
    finally:
        request_resources(bundles=[])
    yield


def _tell_of_a_queue(cpus: int, gpus: float, tell: Callable[[str], None]) -> None:
    """Ray waits without a word for what others have taken; here it is said."""
    free, total = ray.available_resources(), ray.cluster_resources()
    for name, amount in (("GPU", gpus), ("CPU", float(cpus))):
        if amount > free.get(name, 0):
            tell(
                f"the cluster is busy: {free.get(name, 0):g} of its {total.get(name, 0):g} {name}s are free and the run takes "
                f"{amount:g}; it waits for the others to end"
            )
            return


def _require_cpus(cpus: int) -> None:
    total = int(ray.cluster_resources().get("CPU", 0))
    if total < cpus + SPARE_CPUS:
        raise MedsslError(
            f"the Ray cluster has {total} CPUs and the run needs {cpus} for its workers and {SPARE_CPUS} for reading: "
            "add nodes, start Ray with a larger --num-cpus, or lower compute.workers"
        )


def require_gpus(gpus: float) -> None:
    """Refuses a recipe that asks for more GPUs than the cluster has, which Ray would wait for without end."""
    total = ray.cluster_resources().get("GPU", 0)
    if gpus > total:
        raise MedsslError(
            f"the recipe asks for {gpus:g} GPUs and the Ray cluster has {total:g}: lower compute.gpus_per_worker "
            "(0 trains on the CPU) or compute.workers"
        )


def _start(cpus: int, address: str | None, tell: Callable[[str], None]) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    theirs = address if address and address != "local" else None
    try:
        if theirs is None:
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody drains a machine of one's own
            ray.init(address="local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
            return
        _require_answer(theirs)
        ray.init(address=theirs, **quiet)
    except ray.exceptions.AuthenticationError as error:
        what = f"the cluster at '{theirs}' does not let this run in" if theirs else "Ray has no token to start with"
        raise MedsslError(f"{what} ({error.message}): set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the token's file") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        if theirs is None:
            raise
        raise _no_answer(theirs, str(error).splitlines()[0]) from None
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":  # and is let in all the same
        tell(f"warning: the cluster at {theirs} asks for no token: whoever reaches it can run programs on it")


def _require_answer(address: str) -> None:
    """Refuses an address where nobody listens, for which Ray itself waits half a minute and longer."""
    if address.startswith(("http://", "https://")):
        raise MedsslError(f"'{address}' is a job server's address: `medssl submit` takes it, a run needs the head's, HEAD:6379")
    scheme, mark, place = address.rpartition("://")
    host, colon, port = place.rpartition(":")
    if scheme not in ("", "ray") or (not mark and not colon):
        return  # `auto`, and what only Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:  # a UnicodeError of a name that no host can have is a ValueError
        raise _no_answer(address, str(error)) from None


def _no_answer(address: str, reason: str) -> MedsslError:
    return MedsslError(
        f"no Ray cluster answers at '{address}' ({reason}): check --address or RAY_ADDRESS; where the cluster asks for a token, "
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    )


def import_torch() -> Any:
    """torch, with torchvision, in a task that may be cancelled. Cancelled in mid-import it leaves modules half loaded, which no
    later import in the same process mends; so the process ends, and Ray starts another for the next task."""
    try:
        import torch
        import torchvision  # noqa: F401
    except KeyboardInterrupt:
        os._exit(1)
    return torch
