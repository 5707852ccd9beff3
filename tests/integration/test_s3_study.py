"""Studies on a real S3 server: two runs at once, faults and an outage in mid-run, secrets, and wrong settings."""

from __future__ import annotations

import io
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from watched import wait

from medssl.artifacts import finished, read_marker
from medssl.store import Store, open_store

pytestmark = [pytest.mark.ray, pytest.mark.s3]
Both = tuple[Store, list[tuple[str, str]], list[Path]]


@pytest.fixture(scope="module")
def path(undisturbed: Any, s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed study's recipe with its dataset in the S3 server."""
    uri = f"s3://lesions-{uuid.uuid4().hex[:8]}/datasets/lesions"
    open_store(uri, create=True)
    tiny.ingest_table(undisturbed.table, uri)
    return tiny.write(tmp_path_factory.mktemp("s3") / "study.yaml", undisturbed.fields | {"dataset": uri})


def losses(store: Store) -> list[tuple[int, int, float]]:
    frame = pq.read_table(io.BytesIO(store.read(f"artifacts/{pretraining(store)}/history.parquet"))).to_pandas()
    return sorted(zip(frame["rank"], frame["step"], frame["loss"], strict=True))


def without_report(store: Store) -> set[str]:
    """What is finished but the report, which names the dataset's place."""
    return {name for name in finished(store) if not name.startswith("report-")}


def pretraining(store: Store) -> str:
    return next(n for n in finished(store) if n.startswith("pretrain-"))


@pytest.fixture(scope="module")
def both(path: Path, _proxy: Any) -> Iterator[Both]:
    """Two processes with the same command at the same time, on a store with faults: 503s and cut bodies all along, and 20 s away
    while the workers train. Yields their store, what they printed, and the folders of their Rays."""
    store = open_store(f"s3://both-{uuid.uuid4().hex[:8]}/store", create=True)
    command = tiny.command("run", str(path), "--store", store.uri, "--json")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = set(ray_sessions())
    _proxy.clear()
    _proxy.rates = {"503": 0.05, "cut": 0.05}
    runs = [subprocess.Popen(command, env=tiny.environment(AWS_ENDPOINT_URL=_proxy.endpoint), **pipes) for _ in range(2)]
    wait(lambda: any("/checkpoints/step-" in e.key for e in store.list("artifacts/")), "a checkpoint")
    with _proxy.outage():
        time.sleep(20)  # the fault itself: a store that is away for 20 seconds
    ends = [run.communicate(timeout=900) for run in runs]
    _proxy.clear()
    assert [run.returncode for run in runs] == [0, 0], ends
    yield store, ends, [folder for folder in ray_sessions() if folder not in before]


def ray_sessions() -> list[Path]:
    return [folder for folder in Path("/tmp/ray").glob("session_*") if not folder.is_symlink()]


def test_two_runs_at_once_make_one_result(undisturbed: Any, both: Both) -> None:
    store, ends, _ = both
    waited = [errors for _, errors in ends if "is being run by" in errors]
    assert len(waited) == 1 and "nothing to do" in waited[0]
    assert ends[0][0] == ends[1][0]
    assert without_report(store) == without_report(undisturbed.store) and len(finished(store)) == len(finished(undisturbed.store))


def test_faults_and_an_outage_leave_the_result_and_the_training_alone(undisturbed: Any, both: Both) -> None:
    store, _, _ = both
    assert losses(store) == losses(undisturbed.store)
    marker = read_marker(store, pretraining(store))
    assert marker is not None and marker.facts["resumed_at_step"] == 0, "the training was started anew"


def test_a_secret_is_found_nowhere(both: Both) -> None:
    """Neither in the bucket, nor in Ray's folders or the output of the runs."""
    store, ends, sessions = both
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret in printed for end in ends for printed in end)
    for entry in store.list(""):
        assert secret.encode() not in store.read(entry.key), entry.key
    assert sessions, "the runs started no Ray of their own"
    for session in sessions:
        for file in session.rglob("*"):
            if file.is_file() and not file.is_symlink():
                assert secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("environment", "uri", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, None, ["secret"]),
        ({"AWS_ACCESS_KEY_ID": "NOBODY"}, None, ["key"]),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "MEDSSL_STORE_DEADLINE_SECONDS": "2"}, None, ["127.0.0.1:9"]),
        ({}, "s3://no-such-bucket-at-all/x", ["no-such-bucket-at-all"]),
        ({}, "s4://bucket/x", ["s4", "s3"]),
    ],
    ids=["secret", "key", "endpoint", "bucket", "scheme"],
)  # fmt: skip
def test_wrong_settings_are_one_clear_line(
    path: Path, both: Both, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], uri: str | None, words: list[str]
) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = tiny.medssl("run", str(path), "--store", uri or both[0].uri, check=False)
    assert done.returncode not in (0, 1)
    assert secret not in done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0]
