"""Leases: one holder at a time, takeover from the dead and the silent, and a holder that finds out it has lost."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from medssl import leases
from medssl.errors import LeaseHeld, StoreError
from medssl.leases import Owner, is_dead, lease, this_process
from medssl.store import Store, open_store

CHILD = """
import sys, time
from medssl.leases import lease
from medssl.store import open_store
with lease(open_store(sys.argv[1]), "work", ttl_seconds=float(sys.argv[2]), run="child") as held:
    print("held", held.generation, flush=True)
    sys.stdin.readline()
print("done", flush=True)
"""

COUNTING_CHILD = """
import sys, time
from medssl.leases import lease
from medssl.store import open_store
store = open_store(sys.argv[1])
for turn in range(5):
    with lease(store, "count", ttl_seconds=30):
        count = int(store.read("count"))
        time.sleep(0.01)
        store.write("count", str(count + 1).encode())
"""

READER = """
import json, os, sys
from medssl.leases import Owner, is_dead
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(*(is_dead(Owner(**fields)) for fields in json.loads(sys.argv[1])))
"""


@pytest.fixture(params=["file", pytest.param("ceph", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(str(tmp_path / "store"), create=True)
    found: Store = request.getfixturevalue("s3_store")
    return found


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    """For what only takes time and does not depend on the kind of store."""
    return open_store(str(tmp_path / "store"), create=True)


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.fixture
def child(store: Store) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease "work" until it is told to stop."""
    process = start(CHILD, store.uri, "600")
    assert process.stdout is not None
    assert process.stdout.readline() == "held 1\n"
    yield process
    process.kill()
    process.communicate()


def test_generations_rise_and_old_ones_go(store: Store) -> None:
    for generation in (1, 2, 3):
        with lease(store, "work") as held:
            assert held.generation == generation
            held.check()
            assert [entry.key for entry in store.list("leases/")] == [f"leases/work/{generation:08d}.claim"]
    names = [entry.key for entry in store.list("leases/")]
    assert names == ["leases/work/00000003.claim", "leases/work/00000003.free"]


def test_names_are_independent(store: Store) -> None:
    with lease(store, "one"), lease(store, "two"), lease(store, "folder/three"):
        pass


def test_not_waiting_names_the_owner(store: Store, child: subprocess.Popen[str]) -> None:
    words = rf"'work' is being worked on by .* \(process {child.pid}, run child, since"
    with pytest.raises(LeaseHeld, match=words), lease(store, "work", wait=False):
        pass


def test_waits_until_it_is_released(store: Store, child: subprocess.Popen[str]) -> None:
    met: list[Owner] = []

    def release(owner: Owner) -> None:
        met.append(owner)
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()

    with lease(store, "work", on_wait=release) as held:
        assert held.generation == 2
    assert [owner.pid for owner in met] == [child.pid], "told once"
    assert child.wait(20) == 0


def test_killed_holder_is_taken_over_at_once(store: Store, child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)  # not waited for: a zombie counts as dead
    started = time.monotonic()
    owner = Owner(**json.loads(store.read("leases/work/00000001.claim")))
    while not is_dead(owner):
        assert time.monotonic() - started < 10
    with lease(store, "work", wait=False) as held:
        assert held.generation == 2
    assert time.monotonic() - started < 10, "its time to live is 600 s"


def test_a_reused_pid_is_not_the_owner() -> None:
    me = this_process()
    assert not is_dead(me)
    assert is_dead(dataclasses.replace(me, started="1"))
    assert is_dead(dataclasses.replace(me, pid=2**22 + 1))
    assert not is_dead(dataclasses.replace(me, pid=2**22 + 1, machine="another")), "cannot be known from here"
    assert not is_dead(dataclasses.replace(me, pid=2**22 + 1, machine="")), "cannot be known from here"


@pytest.mark.parametrize("hidepid", [1, 2])
def test_a_process_that_proc_hides_is_not_gone(hidepid: int) -> None:
    """As on many a cluster's login node: another user's process is there, and /proc does not tell of it."""
    me = this_process()
    owners = json.dumps([dataclasses.asdict(owner) for owner in (me, dataclasses.replace(me, pid=2**22 + 1))])
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"', "sh"]
    if os.getuid() or subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting /proc anew and becoming another user takes root")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [*hidden, sys.executable, "-c", READER, owners], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout == "False True\n", "the one that lives and the one that is gone"


def foreign_claim(store: Store, generation: int) -> None:
    """A claim of a process on another machine, whose death nobody here can see."""
    owner = dataclasses.replace(this_process(), host="elsewhere", machine="elsewhere")
    data = json.dumps(dataclasses.asdict(owner)).encode()
    assert store.create(f"leases/work/{generation:08d}.claim", data)


def test_silent_holder_is_taken_over_after_its_time(local_store: Store) -> None:
    foreign_claim(local_store, 4)
    local_store.write("leases/work/00000004.beat", b"17")
    with pytest.raises(LeaseHeld, match="elsewhere"), lease(local_store, "work", wait=False):
        pass
    started = time.monotonic()
    with lease(local_store, "work", ttl_seconds=6) as held:
        assert held.generation == 5
        assert 6 <= time.monotonic() - started < 12
        assert [entry.key for entry in local_store.list("leases/work/")] == ["leases/work/00000005.claim"]


def test_who_observes_waits_for_the_dead_alone(local_store: Store) -> None:
    """A holder elsewhere whose counter stands still is taken over after its time, one that beats is named in seconds."""
    foreign_claim(local_store, 4)
    started = time.monotonic()
    with lease(local_store, "work", ttl_seconds=6, wait=False, observe=True) as held:
        assert held.generation == 5
        assert 6 <= time.monotonic() - started < 12
    foreign_claim(local_store, 6)
    threading.Timer(2, local_store.write, ("leases/work/00000006.beat", b"1")).start()
    started = time.monotonic()
    with pytest.raises(LeaseHeld, match="elsewhere") as caught, lease(local_store, "work", wait=False, observe=True):
        pass
    assert 1 < time.monotonic() - started < 12, "its time to live is 30 s"
    assert isinstance(caught.value.owner, Owner) and caught.value.owner.host == "elsewhere"
    assert pickle.loads(pickle.dumps(caught.value)).owner == caught.value.owner


def test_who_observes_a_process_of_this_machine_need_not_wait(local_store: Store) -> None:
    with lease(local_store, "work"):
        started = time.monotonic()
        with pytest.raises(LeaseHeld), lease(local_store, "work", wait=False, observe=True):
            pass
        assert time.monotonic() - started < 3, "its first beat comes after 5 s"


def test_beating_holder_keeps_it(local_store: Store) -> None:
    foreign_claim(local_store, 1)
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(1):
            count += 1
            local_store.write("leases/work/00000001.beat", str(count).encode())
        local_store.create("leases/work/00000001.free", b"")

    beater = threading.Thread(target=beat)
    beater.start()
    threading.Timer(9, stop.set).start()
    started = time.monotonic()
    with lease(local_store, "work", ttl_seconds=6):
        assert time.monotonic() - started >= 9
    beater.join()


def test_holder_beats(local_store: Store) -> None:
    with lease(local_store, "work", ttl_seconds=6) as held:
        seen = set()
        end = time.monotonic() + 4.5
        while time.monotonic() < end:
            if local_store.exists(f"leases/work/{held.generation:08d}.beat"):
                seen.add(local_store.read(f"leases/work/{held.generation:08d}.beat"))
            time.sleep(0.2)
        assert len(seen) >= 2
        assert not held.lost


def test_a_holder_that_lost_its_lease_finds_out(store: Store) -> None:
    with lease(store, "work", ttl_seconds=6) as held:
        held.check()
        foreign_claim(store, held.generation + 1)
        with pytest.raises(LeaseHeld, match="taken over by another run"):
            held.check()
        assert held.lost
    assert not any(entry.key.endswith(".free") for entry in store.list()), "it does not release what is another's"


def test_the_heartbeat_finds_out_too(local_store: Store) -> None:
    with lease(local_store, "work", ttl_seconds=6) as held:
        foreign_claim(local_store, held.generation + 1)
        end = time.monotonic() + 10
        while not held.lost and time.monotonic() < end:
            time.sleep(0.1)
        assert held.lost


def test_a_late_comer_does_not_get_a_used_number(store: Store) -> None:
    """It looked long ago: its number was used, given back and tidied away meanwhile."""
    place = store.sub("leases/work")
    foreign_claim(store, 7)
    assert not leases._claim(place, 3, this_process())
    assert [entry.key for entry in place.list()] == ["00000007.claim"]


def test_processes_exclude_each_other(store: Store) -> None:
    store.write("count", b"0")
    children = [start(COUNTING_CHILD, store.uri) for _ in range(3)]
    for process in children:
        process.communicate(timeout=90)
        assert process.returncode == 0
    assert store.read("count") == b"15"


def test_exception_releases(store: Store) -> None:
    with pytest.raises(KeyError), lease(store, "work"):
        raise KeyError
    with lease(store, "work", wait=False) as held:
        assert held.generation == 2


def test_heartbeat_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    program = CHILD.replace("sys.stdin.readline()", "sys.exit(3)")
    process = start(program, open_store(str(tmp_path)).uri, "30")
    process.communicate(timeout=90)
    assert process.returncode == 3
    assert open_store(str(tmp_path)).exists("leases/work/00000001.free")


def test_ttl_too_short_for_retries(store: Store) -> None:
    with pytest.raises(ValueError, match="give 6 or more"), lease(store, "work", ttl_seconds=1):
        pass


def test_a_spoilt_claim_is_one_line(store: Store) -> None:
    store.write("leases/work/00000001.claim", b"not json")
    with pytest.raises(StoreError, match="is not a lease's claim"), lease(store, "work"):
        pass


def test_owner_is_plain_data() -> None:
    owner = this_process("study")
    assert pickle.loads(pickle.dumps(owner)) == owner
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(dataclasses.asdict(owner))
