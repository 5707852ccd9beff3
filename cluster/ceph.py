"""A real S3 server in a folder, for the local cluster and tests: Ceph's RADOS gateway, one monitor, one OSD, on free ports.

No root services, no systemd: three daemons that are stopped through the pid files they wrote themselves, by `stop`, or
by a guard process when the process that started them is killed. Run by hand with `python cluster/ceph.py FOLDER`
(prints the exports; stops on Ctrl-C).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool")
PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
ACCESS_KEY = "AKTEST"
SECRET_KEY = "SKTEST-canary-9c1f3b7e5d"
GATEWAY_AUTH = ("--auth-client-required=none", "--ms-mon-client-mode=crc")

CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
run dir = {folder}/run
admin socket = {folder}/run/$cluster-$name.asok
log file = {folder}/log/$cluster-$name.log
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block create = true
bluestore block size = 34359738368
osd memory target = 939524096
# A machine that stands still for a while must not make the only OSD doubt itself for minutes.
osd heartbeat grace = 600
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
rgw frontends = beast endpoint=127.0.0.1:{gateway} tcp_nodelay=1
rgw data = {folder}/rgw
rgw gc obj min wait = 30
rgw gc processor period = 30
rgw gc processor max time = 30
"""


def missing_programs() -> list[str]:
    """Programs of the server that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ceph:
    """The server in `folder`; data stay there over stop and start."""

    def __init__(self, folder: Path, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> None:
        self.folder = folder
        self._access_key, self._secret_key = access_key, secret_key
        self._conf = folder / "ceph.conf"
        known = re.search(r"endpoint=127\.0\.0\.1:(\d+)", self._conf.read_text()) if self._conf.exists() else None
        self.port = int(known.group(1)) if known else free_port()  # of a folder that was used before: the port it had
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The standard AWS variables that reach this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Starts all three daemons, for the first time or again; returns when the gateway answers."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # its logs hold the keys
        self._only_one()
        made = self.folder / "made"  # written last: a first start that was broken off is begun again
        new = not made.exists()
        if new:
            self._write_files()
        if self._guard is None:
            # It reads a pipe that nobody writes to: the end of it is the end of this process, however it came.
            command = [sys.executable, __file__, "--guard", str(self.folder)]
            self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._run("ceph-mon", "-i", "a", "--pid-file", self._pid_file("mon"))
        if new:
            osd = str(uuid.uuid4())
            self._run("ceph", "osd", "new", osd)
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._run("ceph-osd", "-i", "0", "--pid-file", self._pid_file("osd"))
        self._wait(lambda: " 1 up" in self._run("ceph", "osd", "stat"), "the OSD")
        if new:
            keys = (f"--access-key={self._access_key}", f"--secret-key={self._secret_key}")
            self._run("radosgw-admin", *GATEWAY_AUTH, "user", "create", "--uid=test", "--display-name=test", *keys)
            made.touch()
        self.start_gateway()

    def start_gateway(self) -> None:
        """Starts the gateway alone: a server that was away for a while."""
        self._run("radosgw", "-n", "client.rgw.a", *GATEWAY_AUTH, "--pid-file", self._pid_file("rgw"))
        self._wait(self._answers, "the gateway")

    def stop_gateway(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Takes the gateway away; monitor and OSD stay."""
        self._end("rgw", how)

    def stop(self) -> None:
        """Stops the daemons, if this object started them."""
        if self._lock is None:
            return
        self.kill()
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None
        os.close(self._lock)
        self._lock = None

    def kill(self) -> None:
        """Ends the folder's daemons, whoever started them, by their own pid files."""
        for name in ("rgw", "osd", "mon"):
            self._end(name, signal.SIGKILL)

    def _only_one(self) -> None:
        """Takes the folder for this server; the process ids that an earlier one has left are nobody's."""
        if self._lock is not None:
            return
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RuntimeError(f"a server runs in {self.folder} already: stop it, or take another folder") from None
        self._lock = lock
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        (self.folder / "run").mkdir()

    def _write_files(self) -> None:
        for name in ("mon", "osd", "rgw"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("mon", "osd", "log", "run", "rgw"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        fsid, mon, mon_v1 = str(uuid.uuid4()), free_port(), free_port()
        self._conf.write_text(CONFIGURATION.format(fsid=fsid, mon=mon, mon_v1=mon_v1, gateway=self.port, folder=self.folder))
        addresses = f"[v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]"
        monmap = str(self.folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, monmap, "--clobber")
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)

    def _pid_file(self, name: str) -> str:
        return str(self.folder / "run" / f"{name}.pid")

    def _run(self, program: str, *arguments: str) -> str:
        command = [program, *arguments]
        if program != "monmaptool":
            command[1:1] = ["-c", str(self._conf)]
        # Daemons keep a pipe open that they inherit: their output goes to a file.
        with (self.folder / "log" / "commands.txt").open("a+") as output:
            start = output.seek(0, os.SEEK_END)
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=120, check=False
            )
            output.seek(start)
            text = output.read()
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed with {done.returncode}: {text[-2000:]}")
        return text

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def _wait(self, ready: object, what: str, seconds: float = 90) -> None:
        assert callable(ready)
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise RuntimeError(f"{what} did not start within {seconds:.0f} s; see {self.folder}/log")
            time.sleep(0.2)

    def _end(self, name: str, how: signal.Signals) -> None:
        path = Path(self._pid_file(name))
        try:
            pid = int(path.read_text())
            os.kill(pid, how)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return
        end = time.monotonic() + 30
        while _alive(pid) and time.monotonic() < end:
            time.sleep(0.05)
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def main() -> None:
    """Runs the server until Ctrl-C, or guards one."""
    if sys.argv[1] == "--guard":
        sys.stdin.buffer.read()
        Ceph(Path(sys.argv[2])).kill()
        return
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # else they end the process before sigwait sees them
    server = Ceph(Path(sys.argv[1]).resolve())
    try:
        server.start()
        print("\n".join(f"export {name}={value}" for name, value in server.environment.items()), flush=True)
        signal.sigwait(signals)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
