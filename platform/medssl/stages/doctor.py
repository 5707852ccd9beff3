"""What a run needs from this machine, its Ray and its store: one check, one line, and what to do where one fails."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from medssl.errors import MissingKey, StoreError
from medssl.store import Store, open_store

SMALLEST_SHARED_MEMORY_BYTES = 2**30
SMALLEST_MEMORY_BYTES = 4 * 2**30
RAY_START_SECONDS = 120
GIB = 2**30

_RAY_PROGRAM = """
import os, sys
import ray

@ray.remote
def add(first, second):
    return first + second

address = os.environ.get("RAY_ADDRESS")
options = {} if address else {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)
answer = ray.get(add.remote(1, 2))
nodes = [node for node in ray.nodes() if node["Alive"]]
resources = ray.cluster_resources()
ray.shutdown()
assert answer == 3
print("RESULT", len(nodes), int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
"""

_IMPORT_PROGRAM = """
import importlib, json
found = {}
for name in ("ray", "torch", "torchvision"):
    try:
        found[name] = [True, importlib.import_module(name).__version__]
    except Exception as error:
        found[name] = [False, f"{type(error).__name__}: {error}".splitlines()[0]]
gpus = []
if found["torch"][0]:
    import torch
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)")
print("RESULT", json.dumps([found, gpus]))
"""


@dataclass(frozen=True)
class Check:
    """One line of the doctor."""

    name: str
    ok: bool
    detail: str
    """What was found."""
    advice: str = ""
    """What to do; only where it is not ok."""


def run_checks(store_uri: str | None = None, *, start_ray: bool = True) -> list[Check]:
    """All checks; those of the store when a URI is given. `start_ray` starts a small Ray, or joins RAY_ADDRESS's (10 s)."""
    checks = [_python(), *_packages(), _processors(), _memory(), _shared_memory(), _usage_statistics()]
    if start_ray:
        checks.append(_ray_starts())
    if store_uri is not None:
        checks += _store(store_uri)
    return checks


def _check(name: str, ok: bool, detail: str, advice: str) -> Check:
    return Check(name, ok, detail, "" if ok else advice)


# --- this machine ---


def _python() -> Check:
    return _check("python", sys.version_info >= (3, 11), platform.python_version(), "use Python 3.11 or newer")


def _packages() -> Iterator[Check]:
    """Ray and torch can be imported (torchvision beside another build of torch cannot) and have the versions asked for."""
    again = "install medssl again into a new virtual environment"
    done = subprocess.run([sys.executable, "-c", _IMPORT_PROGRAM], capture_output=True, text=True, check=False)
    result = _result(done.stdout)
    if result is None:
        yield Check("packages", False, _last_line(done.stderr), again)
        return
    found, gpus = json.loads(result)
    for name, (imported, version) in found.items():
        wanted = _wanted(name)
        if imported:
            ok = wanted is None or _satisfies(version, wanted)
            yield _check(name, ok, version, f"medssl wants {name}{wanted}: {again}")
        else:
            yield Check(name, False, f"cannot be imported: {version}", again)
    yield Check("accelerators", True, ", ".join(gpus) or "none: training runs on the CPU")


def _result(output: str) -> str | None:
    """What a program of ours printed after RESULT."""
    found = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return found[-1].removeprefix("RESULT ") if found else None


def _last_line(errors: str) -> str:
    return (errors.strip().splitlines() or ["no message"])[-1]


def _wanted(name: str) -> str | None:
    """The versions that the installed medssl asks for; None where it runs from its source tree."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("medssl") or []
    except metadata.PackageNotFoundError:
        return None
    found = [Requirement(line) for line in lines if "extra ==" not in line]
    return next((str(requirement.specifier) for requirement in found if requirement.name == name), None)


def _satisfies(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version.partition("+")[0], prereleases=True)


def _processors() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _control_group("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        usable = max(1, min(usable, int(quota[0]) // int(quota[1])))
    return _check("processors", usable >= 2, str(usable), "with one processor training and reading take turns: use two")


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return Check("memory", True, "unknown on this system")
    limit = _control_group("memory.max")
    if limit.isdigit():
        total = min(total, int(limit))
    return _check("memory", total >= SMALLEST_MEMORY_BYTES, f"{total / GIB:.1f} GiB", "4 GiB are the least for Ray and torch")


def _control_group(name: str) -> str:
    """A limit of this process's container; '' where there is none."""
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", True, "this system has no /dev/shm; Ray uses files")
    free = shutil.disk_usage(folder).free
    advice = "Ray's object store falls back to the disk: give the container more, e.g. docker run --shm-size=4g"
    return _check("shared memory", free >= SMALLEST_SHARED_MEMORY_BYTES, f"/dev/shm has {free / GIB:.1f} GiB free", advice)


# --- Ray ---


def _usage_statistics() -> Check:
    setting = os.environ.get("RAY_USAGE_STATS_ENABLED", "0")
    if setting not in ("0", "1"):
        return Check("usage statistics", False, f"RAY_USAGE_STATS_ENABLED={setting!r}", "Ray accepts 0 or 1 only: set 0")
    on = "on, because RAY_USAGE_STATS_ENABLED=1 is set: Ray reports to its makers"
    return Check("usage statistics", True, on if setting == "1" else "off")


def _ray_starts() -> Check:
    """A Ray of its own in another process, so that nothing is left of it here."""
    place = os.environ.get("RAY_ADDRESS")
    name, advice = "ray starts", "see the log in /tmp/ray/session_latest/logs"
    if place:
        name, advice = "ray answers", "check RAY_ADDRESS, or unset it to use a Ray of this machine"
    environment = {"RAY_USAGE_STATS_ENABLED": "0", **os.environ}
    process = subprocess.Popen(
        [sys.executable, "-c", _RAY_PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=RAY_START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Check(name, False, f"no answer within {RAY_START_SECONDS} s", advice)
    result = _result(output)
    if result is None:
        return Check(name, False, _last_line(errors), advice)
    nodes, cpus, gpus = result.split()
    at = f" at {place}: {nodes} nodes, {cpus} CPUs, {gpus} GPUs" if place else ""
    return Check(name, True, f"and runs a task{at}")


# --- the store ---


def _store(uri: str) -> Iterator[Check]:
    """Opens the store, then tries what runs rely on under a key of its own, which is removed."""
    try:
        store = open_store(uri)
    except StoreError as error:
        yield Check("store", False, str(error))
        return
    yield Check("store", True, f"{store.uri} answers and accepts the credentials")
    place = store.sub(f"doctor-{uuid.uuid4().hex}")
    try:
        for name, attempt in (("write and read back", _reads_back), ("create if absent", _creates_once)):
            yield _tried(f"store: {name}", attempt, place)
    finally:
        last = _tried("store: delete", _deletes, place)
    yield last


def _tried(name: str, attempt: Callable[[Store], str], place: Store) -> Check:
    """`attempt` returns what it found; a failed expectation is a ValueError with the advice."""
    try:
        return Check(name, True, attempt(place))
    except ValueError as error:
        return Check(name, False, "not as it must be", str(error))
    except StoreError as error:
        return Check(name, False, str(error))


def _reads_back(place: Store) -> str:
    body = os.urandom(2**20)
    place.write("body", body)
    if hashlib.sha256(place.read("body")).digest() != hashlib.sha256(body).digest():
        raise ValueError("what was written came back changed: do not use this store")
    if [entry.size for entry in place.list()] != [len(body)]:
        raise ValueError("a listing does not show what was just written: do not use this store")
    return "1 MiB came back the same, and is listed"


def _creates_once(place: Store) -> str:
    if not place.create("once", b"first") or place.create("once", b"second") or place.read("once") != b"first":
        raise ValueError("the server overwrites despite If-None-Match: two runs could work on one stage; update the server")
    return "the second of two creators is refused"


def _deletes(place: Store) -> str:
    place.delete_prefix("")
    try:
        place.read("once")
    except MissingKey:
        return "nothing is left"
    raise ValueError("a deleted object is still there: do not use this store")
