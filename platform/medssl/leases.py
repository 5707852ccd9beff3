"""Leases in the store: one run at a time works on a stage, and a run that died does not block the next.

A lease is a row of generations below `leases/<name>/`, and nothing but create-if-absent decides who has it:

    00000007.claim   created by the holder of generation 7: who it is
    00000007.beat    a counter the holder raises every ttl/6 seconds
    00000007.free    left behind when the holder is done

Who wants the lease looks at the highest generation. Free, dead or silent: it tries to create the next claim, and of
many that try one succeeds. Numbers only rise, so a run that was thought dead and comes back finds a higher claim and
knows that it has lost. The claim and the free mark of the last generation stay (two small objects); older ones are
deleted by the next holder.

When is a holder silent? Its counter has not moved for `ttl_seconds` of the watcher's own monotonic clock; no two
clocks are compared. The store may be away for longer than that: then the holder cannot write, but nor can the watcher
read. So a look that was slow or failed starts the watcher's time anew, and after the store is back the holder has a
whole ttl for its next beat, which comes within retry.LONGEST_WAIT_SECONDS plus one request. A holder that alone is
cut off from the store for longer than the ttl loses the lease; it finds out at its next `check`, before it publishes.
A holder on the same machine whose process is gone is taken over at once.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from medssl.errors import LeaseHeld, MissingKey, StoreError
from medssl.retry import LONGEST_WAIT_SECONDS
from medssl.store import Store

log = logging.getLogger(__name__)

LEASES = "leases"
BEATS_PER_TTL = 6
LONGEST_LOOK_SECONDS = 2.0
"""A look at the store that takes longer than this met an outage: it says nothing about the holder's silence."""
SHORTEST_TTL_SECONDS = 2 * LONGEST_WAIT_SECONDS
RELEASE_SECONDS = 5.0


@dataclass(frozen=True)
class Owner:
    """Who holds a lease."""

    host: str
    pid: int
    started: str
    """Start time of the process in the machine's own count: tells a reused pid apart. Empty where unknown."""
    machine: str
    """Identity of machine, boot and pid name space: pids can be compared where it is equal. Empty where unknown."""
    user: str
    run: str
    """Free text naming the run, e.g. its study."""
    since: str
    """UTC time at which the lease was taken, for people."""
    token: str
    """Unique to this holding."""

    def __str__(self) -> str:
        run = f", run {self.run}" if self.run else ""
        return f"{self.user} on {self.host} (process {self.pid}{run}, since {self.since})"


def this_process(run: str = "") -> Owner:
    """The calling process as an owner."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
        machine=_machine(),
        user=user,
        run=run,
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        token=uuid.uuid4().hex,
    )


def is_dead(owner: Owner) -> bool:
    """Whether the owner's process is certainly gone. False when it lives, or runs where this process cannot look."""
    return _lives(owner) is False


def _lives(owner: Owner) -> bool | None:
    """Whether the owner's process is there; None where this process cannot tell."""
    if not owner.machine or owner.machine != _machine():
        return None
    started = _started(owner.pid)
    if started is None:
        return False
    return None if "" in (started, owner.started) else started == owner.started


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}:{uuid.getnode():x}" if sys.platform == "darwin" else ""


def _started(pid: int) -> str | None:
    """Start time of a living process as text ('' where the system does not tell), None when it is gone or a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # gone, or another user's where /proc is mounted with hidepid: a signal tells which
            pass
        else:
            state, start = fields[0], fields[19]
            return None if state in ("Z", "X") else start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


# --- the objects of a lease ---


@dataclass(frozen=True)
class _State:
    """The highest generation of a lease: 0 when nobody ever had it."""

    generation: int
    free: bool
    beaten: bool


def _key(generation: int, kind: str) -> str:
    return f"{generation:08d}.{kind}"


def _generation(key: str) -> int:
    number = key.partition(".")[0]
    return int(number) if number.isdigit() else 0


def _look(place: Store) -> _State:
    keys = {entry.key for entry in place.list()}
    generation = max((_generation(key) for key in keys if key.endswith(".claim")), default=0)
    return _State(generation, _key(generation, "free") in keys, _key(generation, "beat") in keys)


def _read_owner(place: Store, generation: int) -> Owner | None:
    try:
        return Owner(**json.loads(place.read(_key(generation, "claim"))))
    except MissingKey:  # a later holder has tidied up meanwhile
        return None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{place.uri_of(_key(generation, 'claim'))} is not a lease's claim: delete it") from error


class Lease:
    """A lease that this process holds; made by :func:`lease`."""

    def __init__(self, place: Store, name: str, generation: int, owner: Owner, ttl_seconds: float) -> None:
        self.name = name
        self.owner = owner
        self.generation = generation
        self._place = place
        self._period = ttl_seconds / BEATS_PER_TTL
        self._stop = threading.Event()
        self._lost = threading.Event()
        # A daemon: a lease never keeps its process alive, and dies with it.
        self._thread = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether a higher generation was seen at the last beat or check. Costs nothing."""
        return self._lost.is_set()

    def check(self) -> None:
        """Asks the store whether the lease is still this process's: one listing, right before publishing a result.

        Raises LeaseHeld when another run has taken it over.
        """
        if not self.lost and _look(self._place).generation != self.generation:
            self._lost.set()
        if self.lost:
            raise LeaseHeld(
                f"lease '{self.name}' was taken over by another run while this one was cut off from the store: "
                "let that run finish, then run again"
            )

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._period) and not self.lost:
            count += 1
            try:
                if _look(self._place).generation != self.generation:
                    self._lost.set()
                    log.error("lease '%s' was taken over by another run", self.name)
                    return
                self._place.write(_key(self.generation, "beat"), str(count).encode())
            except StoreError as error:  # goes on: the store may come back before anybody notices
                log.warning("lease '%s': heartbeat failed: %s", self.name, error)

    def _release(self) -> None:
        self._stop.set()
        self._thread.join(RELEASE_SECONDS)
        if self.lost or os.getpid() != self.owner.pid:
            return
        try:
            self._place.create(_key(self.generation, "free"), b"")
            self._place.delete(_key(self.generation, "beat"))
        except StoreError as error:
            log.warning("lease '%s' could not be given back and will expire: %s", self.name, error)


@contextlib.contextmanager
def lease(
    store: Store,
    name: str,
    *,
    ttl_seconds: float = 30,
    wait: bool = True,
    observe: bool = False,
    on_wait: Callable[[Owner], None] | None = None,
    run: str = "",
) -> Iterator[Lease]:
    """Holds the lease `name` of `store` for the body of the `with`.

    While another run has it: waits (and calls `on_wait` once for each owner met), or with `wait=False` raises LeaseHeld
    naming the owner, unless that owner's process is seen to be dead. With `observe` too a process that cannot be seen from
    here is first listened to: LeaseHeld at its next beat, taken over after its silence. `ttl_seconds`: after how long a
    silence a holder counts as dead; at least 6, so that a beat that had to be retried is in time. `run` is shown to those
    who wait. Not re-entrant.
    """
    if ttl_seconds < SHORTEST_TTL_SECONDS:
        raise ValueError(f"ttl_seconds={ttl_seconds} is too short for retries: give {SHORTEST_TTL_SECONDS:.0f} or more")
    place = store.sub(f"{LEASES}/{name}")
    owner = this_process(run)
    generation = _acquire(place, name, owner, ttl_seconds, wait=wait, observe=observe, on_wait=on_wait)
    held = Lease(place, name, generation, owner, ttl_seconds)
    try:
        yield held
    finally:
        held._release()


def _acquire(
    place: Store,
    name: str,
    owner: Owner,
    ttl_seconds: float,
    *,
    wait: bool,
    observe: bool,
    on_wait: Callable[[Owner], None] | None,
) -> int:
    """Creates a claim of its own and returns its generation."""
    silence = _Silence(ttl_seconds)
    told = ""
    while True:
        started = time.monotonic()
        state = _look(place)
        holder = None if state.free or state.generation == 0 else _read_owner(place, state.generation)
        lives = None if holder is None else _lives(holder)
        gone = state.generation == 0 or state.free or lives is False
        if not gone and holder is not None:
            gone = silence.over(state.generation, _read_beat(place, state), started)
        if gone:
            if _claim(place, state.generation + 1, owner):
                return state.generation + 1
            continue
        if holder is not None and not wait and (not observe or lives or silence.was_broken):
            raise LeaseHeld(f"'{name}' is being worked on by {holder}: wait for that run, or stop it", holder)
        if holder is not None and on_wait is not None and told != holder.token:
            told = holder.token
            on_wait(holder)
        time.sleep(min(1.0, ttl_seconds / BEATS_PER_TTL))


def _claim(place: Store, generation: int, owner: Owner) -> bool:
    """Whether this process got the generation; then tidies up what lies below it."""
    if not place.create(_key(generation, "claim"), json.dumps(asdict(owner)).encode()):
        return False
    keys = [entry.key for entry in place.list()]
    # A late comer may create a number that was already used, freed and tidied away: the higher one tells.
    if max(_generation(key) for key in keys if key.endswith(".claim")) != generation:
        place.delete(_key(generation, "claim"))
        return False
    for key in keys:
        if _generation(key) < generation:
            place.delete(key)
    return True


def _read_beat(place: Store, state: _State) -> bytes:
    if not state.beaten:
        return b""
    try:
        return place.read(_key(state.generation, "beat"))
    except MissingKey:
        return b""


class _Silence:
    """Measures, by this process's clock, for how long a holder's counter has stood still while the store answered."""

    def __init__(self, ttl_seconds: float) -> None:
        self.was_broken = False
        """Whether the counter has been seen to move, or the lease to pass to another."""
        self._ttl_seconds = ttl_seconds
        self._seen: tuple[int, bytes] | None = None
        self._since = 0.0
        self._last_look = 0.0

    def over(self, generation: int, beat: bytes, look_started: float) -> bool:
        """Takes one look (which began at `look_started`) into account; whether the silence has lasted the ttl."""
        now = time.monotonic()
        # Time in which nobody looked is no silence either: this process itself may have been suspended.
        slow = now - look_started > LONGEST_LOOK_SECONDS or look_started - self._last_look > 2 * LONGEST_LOOK_SECONDS
        self.was_broken |= self._seen not in (None, (generation, beat))
        if self._seen != (generation, beat) or slow:
            self._seen = (generation, beat)
            self._since = now
        self._last_look = now
        return now - self._since >= self._ttl_seconds
