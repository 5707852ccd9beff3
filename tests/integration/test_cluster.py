"""A token-protected cluster of a head and two worker nodes, each a process of its own, and studies as jobs on it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from local import Cluster, kill_group
from watched import TRAINING_WORKER, family, wait

from medssl.artifacts import finished, read_marker
from medssl.job_server import JobServer
from medssl.store import Store, open_store

pytestmark = [pytest.mark.acceptance, pytest.mark.ray, pytest.mark.s3]  # ten minutes on a slow machine
EPOCHS = 40
ROOT = Path(__file__).resolve().parents[2]
NONE_OF_IT = {
    "overview: Steps that were not finite", "storage: Retries a second", "storage: Errors",
    "storage: Images set aside by ingests", "cluster: GPU", "cluster: GPU memory",
}  # fmt: skip
"""Panels with nothing to show of a run that is well, on nodes without GPUs; its images were ingested elsewhere."""


@pytest.fixture(scope="module")
def cluster(s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    store = f"s3://cluster-{uuid.uuid4().hex[:8]}/lab"
    open_store(store, create=True)
    made = Cluster(tmp_path_factory.mktemp("cluster"), store=store)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def study(ray_session: Any, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny.ingest(folder / "drawn", f"{cluster.store}/datasets/lesions")
    fields = tiny.pretraining_only(study="on-a-cluster")
    fields["arms"] = [fields["arms"][0] | {"epochs": EPOCHS}]
    fields["protocols"][0]["search"] = {"learning_rate": [0.003, 0.01], "weight_decay": [0.01], "head_seeds": 1}
    return tiny.write(folder / "study.yaml", fields)


@pytest.fixture(scope="module")
def calm(cluster: Cluster, study: Path) -> Store:
    """The same study undisturbed, in a store of its own."""
    store = open_store(f"s3://calm-{uuid.uuid4().hex[:8]}/lab", create=True)
    dataset = f"dataset={cluster.store}/datasets/lesions"
    tiny.medssl("run", str(study), "--store", store.uri, "--set", dataset)
    return store


def medssl(cluster: Cluster, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command as in a shell that has sourced env.sh; what it asks of Ray's own client goes with the token given here."""
    names = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_MODE"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | changes).items():
            patch.setenv(name, value)
        return tiny.medssl(*arguments, check=False)


def one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode not in (0, 1) and len(lines) == 1 and words in lines[0], done.stderr


def losses(store: Store) -> list[tuple[int, int, float]]:
    name = next(n for n in finished(store) if n.startswith("pretrain-"))
    frame = pq.read_table(io.BytesIO(store.read(f"artifacts/{name}/history.parquet"))).to_pandas()
    return sorted(zip(frame["rank"], frame["step"], frame["loss"], strict=True))


def checkpoint_steps(store: Store) -> list[int]:
    keys = [e.key for e in store.list("artifacts/") if "/checkpoints/step-" in e.key and e.key.endswith(".json")]
    return [int(key.rpartition("step-")[2].removesuffix(".json")) for key in keys]


def test_who_may_not_come_in_is_told_why_at_once(cluster: Cluster, study: Path) -> None:
    one_line(medssl(cluster, "submit", str(study), RAY_AUTH_TOKEN="canary-wrong-token"), "refuses your token")
    asked = medssl(cluster, "jobs", RAY_AUTH_TOKEN_PATH="/nonexistent", HOME="/nonexistent")
    one_line(asked, "asks for a token: set RAY_AUTH_TOKEN")
    assert "canary-wrong-token" not in asked.stderr
    token = cluster.token_file.read_text()
    assert cluster.token_file.stat().st_mode & 0o077 == 0 and not JobServer(cluster.dashboard, token).is_open()


def test_what_the_cluster_cannot_run_is_refused_before_it_waits(cluster: Cluster, study: Path) -> None:
    refused = medssl(cluster, "submit", str(study), "--set", "compute.workers=8", "--set", "compute.gpus_per_worker=1")
    one_line(refused, "asks for 10 CPUs (2 of them for reading) and the cluster has 6")
    refused = medssl(cluster, "submit", str(study), "--set", "compute.gpus_per_worker=1")
    one_line(refused, "asks for 2 GPUs and the cluster has 0")
    lost = medssl(cluster, "submit", str(study), "--store", "s3://no-such-bucket-at-all/x")
    assert lost.returncode == 2 and "no-such-bucket-at-all" in lost.stdout and "Traceback" not in lost.stdout


def test_a_study_is_stopped_resubmitted_and_loses_a_node(cluster: Cluster, study: Path, calm: Store) -> None:
    store = open_store(cluster.store)
    first = medssl(cluster, "submit", str(study), "--detach", "--json")
    assert first.returncode == 0, first.stderr
    job = json.loads(first.stdout)["job"]
    again = medssl(cluster, "submit", str(study), "--detach", "--json")
    assert json.loads(again.stdout) == {"job": job, "attached": True}
    one_line(medssl(cluster, "submit", str(study), "--set", "arms.0.epochs=5"), f"is being run with other values by job {job}")
    wait(lambda: bool(checkpoint_steps(store)), "a checkpoint", 300)
    stopped = medssl(cluster, "stop", "on-a-cluster")
    assert stopped.returncode == 0 and f"job {job}: STOPPED" in stopped.stdout, stopped.stderr
    said = medssl(cluster, "logs", job).stdout
    found = re.search(r"stopped after step (\d+), the last checkpoint is of step (\d+); run the same command again", said)
    assert found and found.group(1) == found.group(2), said
    assert max(checkpoint_steps(store)) == int(found.group(1))

    follower = subprocess.Popen(
        tiny.command("submit", str(study)), env=tiny.environment(**cluster.environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait(lambda: max(checkpoint_steps(store), default=0) > int(found.group(1)), "a checkpoint after the resumption", 300)
    (victim,) = [node for node in cluster.nodes if trains(node)]
    kill_group(victim)
    cluster.nodes.remove(victim)
    cluster.add_node()
    printed, errors = follower.communicate(timeout=600)
    assert follower.returncode == 0, printed + errors
    assert re.search(r"job on-a-cluster-[0-9a-f]{8}-\d+ submitted", errors) and "left with 0" in errors
    assert "report.html" in printed and store.exists("studies/on-a-cluster/report.html")
    assert losses(store) == losses(calm)
    marker = read_marker(store, next(n for n in finished(store) if n.startswith("pretrain-")))
    assert marker is not None and marker.facts["resumed_at_step"] > int(found.group(1))

    rows = json.loads(medssl(cluster, "jobs", "--json").stdout)
    mine = [row for row in rows if row["study"] == "on-a-cluster" and row["store"] == cluster.store]
    assert [row["status"] for row in mine] == ["SUCCEEDED", "STOPPED"]
    done = medssl(cluster, "submit", str(study))
    assert done.returncode == 0 and "nothing to do" in done.stdout


def test_every_panel_shows_something_of_that_run(cluster: Cluster) -> None:
    """Prometheus, which scraped the cluster all along, has data for every expression of the dashboards, without the 0 that some
    fall back on. What such a run has none of, a test of the panels gives them."""
    if cluster.prometheus is None:
        pytest.skip("no prometheus: apt-get install -y --no-install-recommends prometheus")
    asked = {}
    for path in sorted((ROOT / "dashboards" / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                shown = target["expr"].replace("$study", ".*").removesuffix(" or vector(0)")
                asked[f"{path.stem}: {panel['title']}"] = shown
    assert len(asked) > 30
    now = time.time()
    asked_of = {"start": now - 1800, "end": now, "step": 5}
    given = {title: prometheus(cluster, "query_range", query=text, **asked_of)["result"] for title, text in asked.items()}
    assert {title for title, found in given.items() if not found} <= NONE_OF_IT
    rules = prometheus(cluster, "rules")["groups"][0]["rules"]
    assert len(rules) == 7 and {rule["health"] for rule in rules} == {"ok"}


def test_no_secret_is_in_what_the_cluster_shows(cluster: Cluster, study: Path) -> None:
    server = JobServer(cluster.dashboard, cluster.token_file.read_text())
    shown = server._request("GET", "/api/jobs/", 30).decode() + "".join(server.logs(job.id) for job in server.jobs())
    assert "on-a-cluster" in shown
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], cluster.token_file.read_text()):
        assert secret not in shown


def prometheus(cluster: Cluster, what: str, **asked: Any) -> Any:
    """The data of one request to the cluster's Prometheus."""
    url = f"http://127.0.0.1:{cluster.prometheus_port}/api/v1/{what}?{urllib.parse.urlencode(asked)}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)["data"]


def trains(node: subprocess.Popen[bytes]) -> bool:
    """Whether a training worker is among a node's processes."""
    return bool(family(node.pid, TRAINING_WORKER))
