"""How a run finds the cluster that it is pointed to, or says why not: without a Ray of its own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from medssl.errors import MedsslError
from medssl.stages.cluster import _start

ROOT = Path(__file__).resolve().parents[2]


def start(address: str) -> list[str]:
    """What is said while a run attaches to a cluster, whether or not another test's Ray is running here."""
    said: list[str] = []
    _start(3, address, said.append)
    return said


def closed() -> str:
    """Host and port of a server that is gone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_who_is_not_there_is_told_before_ray_waits_for_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked"))
    address = scheme + closed()
    words = re.escape(f"no Ray cluster answers at '{address}' (")
    with pytest.raises(MedsslError, match=words) as caught:
        start(address)
    assert "refused" in str(caught.value) and "--address" in str(caught.value)


@pytest.mark.parametrize("address", [".example:6379", "head.invalid:6379", "127.0.0.1:99999", "ray://[::1:10001", "127.0.0.1:x"])
def test_what_is_no_address_is_a_line(address: str) -> None:
    words = re.escape(f"no Ray cluster answers at '{address}' (")
    with pytest.raises(MedsslError, match=words):
        start(address)


def test_a_job_servers_address_is_named_as_one() -> None:
    words = "'http://head:8265' is a job server's address: `medssl submit` takes it"
    with pytest.raises(MedsslError, match=words):
        start("http://head:8265")


@pytest.mark.parametrize("ours", [False, True])
def test_a_token_that_is_not_there_is_one_line(ours: bool, tmp_path: Path) -> None:
    """Ray itself refuses, before it connects or starts anything: what listens is no cluster."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"x")
    hidden = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "platform")}
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "medssl.cli", "ingest", "images", "--to", "store/d"]
        if ours:
            environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "none")
        else:
            command += ["--address", address]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    where = "Ray has no token to start with" if ours else f"the cluster at '{address}' does not let this run in"
    assert where in last and "set RAY_AUTH_TOKEN" in last


@pytest.mark.parametrize(("mode", "warned"), [("token", False), ("TOKEN", False), ("disabled", True), (None, True)])
def test_a_cluster_that_asks_for_no_token_is_warned_of(mode: str | None, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is let in without a token is on a cluster that asks for none."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    taken: list[Any] = []
    monkeypatch.setattr(ray, "init", lambda **options: taken.append(options["address"]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = start(address)
    assert taken == [address]
    warning = f"warning: the cluster at {address} asks for no token: whoever reaches it can run programs on it"
    assert said == ([warning] if warned else [])
