"""A cluster on this machine, to try everything out with one command: object store, Ray head, two worker nodes, Prometheus.

    python cluster/local.py FOLDER [--nodes 2] [--cpus 3] [--port 8265]

runs until Ctrl-C or SIGTERM, and keeps the store's data in FOLDER for the next time. In another terminal

    source FOLDER/env.sh
    medssl submit STUDY.yaml

The cluster asks for a token, which like the store's keys is made anew for FOLDER and readable by its owner only. Job server
(with its dashboard), store and Prometheus listen on 127.0.0.1 alone. Ray's nodes do not: Ray takes the machine's own address for
127.0.0.1, and their ports are open on all its networks. Those that take orders want the token; those for metrics, and those at
which training workers find each other, want nothing: where strangers reach the machine, a firewall has to keep them out.

Needs `pip install 'medssl[cluster]'`, and from Debian radosgw, ceph-mon, ceph-osd, ceph-common and, for the dashboards,
prometheus (all optional: without the first, give --store for a store of your own).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ceph import PACKAGES, Ceph, free_port, missing_programs

BUCKET = "s3://medssl/lab"
START_SECONDS = 120.0


class Cluster:
    """The processes of a local cluster; `start` and `stop`."""

    def __init__(
        self, folder: Path, *, nodes: int = 2, cpus: int = 3, head_cpus: int = 0, port: int = 0, store: str | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.dashboard = f"http://127.0.0.1:{port or free_port()}"
        self.gcs_port = free_port()
        self.token_file = folder / "token"
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._started = 0
        self.head: subprocess.Popen[bytes] | None = None
        self.prometheus: subprocess.Popen[bytes] | None = None
        self.prometheus_port = free_port()
        self._has_prometheus = shutil.which("prometheus") is not None
        self.store = store or BUCKET
        self._count, self._cpus, self._head_cpus = nodes, cpus, head_cpus
        self._ray_folder = Path(tempfile.mkdtemp(prefix="medssl-ray-", dir="/tmp"))  # its sockets' paths must be short
        keys = self._secrets()
        _write_private(self.token_file, keys["token"])
        self.ceph = Ceph(folder / "ceph", "medssl", keys["store"]) if store is None else None

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell needs: the job server, the token's file, Prometheus, the store and its keys."""
        found = {
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "MEDSSL_STORE": self.store,
        }
        if self._has_prometheus:
            found["PROMETHEUS_URL"] = f"http://127.0.0.1:{self.prometheus_port}"
        return found | (self.ceph.environment if self.ceph else {})

    def start(self) -> None:
        """Starts everything; returns when the nodes are there.

        Raises:
            RuntimeError: something did not come up; where its log is.
        """
        if self.ceph is not None:
            self.ceph.start()
            _make_bucket(self.store, self.ceph.environment)
        port = self.dashboard.rpartition(":")[2]
        head = ["--head", f"--port={self.gcs_port}", f"--dashboard-port={port}", "--dashboard-host=127.0.0.1",
                f"--temp-dir={self._ray_folder}", f"--num-cpus={self._head_cpus}", "--include-dashboard=true"]  # fmt: skip
        self.head = self._ray("head", head)
        self._wait(lambda: "ray_version" in _get(f"{self.dashboard}/api/version", self.token_file.read_text()), "the head")
        for number in range(1, 1 + self._count):  # one by one: nodes that start together on one machine take each other's ports
            self.add_node()
            self._wait(lambda wanted=1 + number: self._alive() == wanted, f"worker node {number}")
        if self._has_prometheus:
            self._start_prometheus()
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.environment.items())
        _write_private(self.folder / "env.sh", exports)

    def add_node(self) -> subprocess.Popen[bytes]:
        """Starts one more worker node."""
        self._started += 1
        # A folder of its own, as on a machine of its own: in a shared one a node unpacks a job's files anew under it.
        folder = f"--temp-dir={self._ray_folder}/{self._started}"
        node = self._ray(f"node-{self._started}", [f"--address=127.0.0.1:{self.gcs_port}", f"--num-cpus={self._cpus}", folder])
        self.nodes.append(node)
        return node

    def stop(self) -> None:
        """Ends everything; the store's data stay."""
        for process in (self.prometheus, *self.nodes, self.head):
            if process is not None:
                kill_group(process)
        if self.ceph is not None:
            self.ceph.stop()
        shutil.rmtree(self._ray_folder, ignore_errors=True)
        note = Path("/tmp/ray/ray_current_cluster")  # where `ray.init()` without an address would look for this cluster
        with contextlib.suppress(OSError):
            if note.read_text().strip().endswith(f":{self.gcs_port}"):
                note.unlink()

    def _secrets(self) -> dict[str, str]:
        path = self.folder / "secrets.json"
        if not path.exists():
            _write_private(path, json.dumps({"token": secrets.token_hex(32), "store": secrets.token_hex(20)}))
        return dict(json.loads(path.read_text()))

    def _ray(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1", *arguments]
        command.append(f"--dashboard-agent-listen-port={free_port()}")  # jobs go through it: one for each node of the machine
        further = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # a job's `python` is this one
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
            "RAY_PROMETHEUS_HOST": f"http://127.0.0.1:{self.prometheus_port}",
        }
        hidden = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
        with open(self.folder / f"{name}.log", "wb") as log:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            return subprocess.Popen(command, env=hidden | self.environment | further, start_new_session=True, **quiet)

    def _alive(self) -> int:
        answer = _get(f"{self.dashboard}/api/v0/nodes?limit=1000", self.token_file.read_text())
        return sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"])

    def _start_prometheus(self) -> None:
        rules = Path(__file__).resolve().parent.parent / "dashboards"
        configuration = (rules / "prometheus.yml").read_text().replace("/tmp/ray/", f"{self._ray_folder}/")
        place = self.folder / "prometheus"
        place.mkdir(exist_ok=True)
        (place / "prometheus.yml").write_text(configuration)
        shutil.copyfile(rules / "alerts.yml", place / "alerts.yml")
        command = ["prometheus", f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data",
                   f"--web.listen-address=127.0.0.1:{self.prometheus_port}"]  # fmt: skip
        with open(place / "log.txt", "wb") as log:
            self.prometheus = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not _holds(ready):
            ended = [p for p in (self.head, *self.nodes) if p is not None and p.poll() is not None]
            if ended or time.monotonic() > end:
                raise RuntimeError(f"{what} did not come up: see {self.folder}/*.log")
            time.sleep(0.3)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a node with all its processes, as a lost machine would."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _get(url: str, token: str) -> dict[str, Any]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token.strip()}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return dict(json.loads(answer.read()))


def _holds(ready: Callable[[], bool]) -> bool:
    """A job server that is coming up refuses, hangs up, is slow, or answers with something else: it is not ready yet."""
    try:
        return ready()
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return False


def _make_bucket(uri: str, environment: dict[str, str]) -> None:
    import boto3

    client = boto3.client(
        "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], region_name=environment["AWS_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"], aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    client.create_bucket(Bucket=uri.removeprefix("s3://").partition("/")[0])


def _write_private(path: Path, text: str) -> None:
    """A file that its owner alone can read, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def main() -> int:
    """Runs the cluster until it is told to end."""
    parser = argparse.ArgumentParser(description="a medssl cluster on this machine")
    parser.add_argument("folder", help="where the store's data, logs and keys go")
    parser.add_argument("--nodes", type=int, default=2, help="worker nodes (default: 2)")
    parser.add_argument("--cpus", type=int, default=3, help="logical CPUs of each (default: 3)")
    parser.add_argument("--port", type=int, default=8265, help="of the job server and Ray dashboard (default: 8265)")
    parser.add_argument("--store", help="a store of your own in place of one in FOLDER")
    arguments = parser.parse_args()
    missing = missing_programs()
    if missing and not arguments.store:
        print(f"local.py: no {', '.join(missing)}: apt-get install {PACKAGES}, or give --store", file=sys.stderr)
        return 2
    folder = Path(arguments.folder).resolve()
    try:
        cluster = Cluster(folder, nodes=arguments.nodes, cpus=arguments.cpus, port=arguments.port, store=arguments.store)
    except OSError as error:
        print(f"local.py: cannot use the folder {folder} ({error.strerror}): name a folder that you can write", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        prometheus = cluster.environment.get("PROMETHEUS_URL", "not installed")
        for line in (f"ready: source {cluster.folder}/env.sh", f"dashboard {cluster.dashboard}", f"Prometheus {prometheus}"):
            print(line)
        print("Ctrl-C ends it", flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        print("ended; the store's data are kept")
    except RuntimeError as error:
        print(f"local.py: {error}", file=sys.stderr)
        return 1
    finally:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
