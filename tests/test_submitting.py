"""A submission through Ray's own client, to a server that speaks as a cluster's job server does: what is sent, and when not."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from medssl.errors import RecipeError
from medssl.job_server import ClusterError, JobServer
from medssl.submit import RECIPE_FILE, Submitted, submit

STORE = "s3://bucket/lab"


class Cluster:
    """What the server was sent, and what it answers."""

    def __init__(self) -> None:
        self.address = ""
        self.jobs: list[dict[str, Any]] = []
        self.packages: dict[str, bytes] = {}
        self.between: list[dict[str, Any]] = []
        """Jobs that come just after the first listing."""
        self.unanswered = ""
        """The method of requests at which the connection is lost."""

    def files(self) -> set[str]:
        """Names in the working directory of the last job."""
        name = self.jobs[-1]["runtime_env"]["working_dir"].rpartition("/")[2]
        return {each for each in zipfile.ZipFile(io.BytesIO(self.packages[name])).namelist() if not each.endswith("/")}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "x"}
        if path.startswith("/api/v0/nodes"):
            return 200, {"data": {"result": {"result": [{"state": "ALIVE", "resources_total": {"CPU": 64, "GPU": 8}}]}}}
        if path.startswith("/api/packages/"):
            name = path.rpartition("/")[2]
            if method == "PUT":
                self.packages[name] = body
            return (200 if name in self.packages else 404), {}
        if method == "GET":
            shown = list(self.jobs)
            self.jobs += self.between
            self.between = []
            return 200, shown
        sent = json.loads(body)
        if any(job["submission_id"] == sent["submission_id"] for job in self.jobs):
            return 500, f"Job with submission_id {sent['submission_id']} already exists"
        self.jobs.append({**sent, "status": "PENDING"})
        return 200, {"job_id": sent["submission_id"], "submission_id": sent["submission_id"]}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    found = Cluster()

    class Handler(http.server.BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == found.unanswered:
                self.close_connection = True
                return
            code, said = found.answer(self.command, self.path, body)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(said.encode() if isinstance(said, str) else json.dumps(said).encode())

        do_GET = do_PUT = do_POST = respond

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found.address = f"http://127.0.0.1:{server.server_port}"
        yield found
        server.shutdown()


def submitted(cluster: Cluster, *arms: dict[str, Any], **options: Any) -> Submitted:
    recipe = {
        "study": "s", "dataset": "datasets/d", "arms": [{"name": "random"}, *arms],
        "protocols": [{"name": "probe", "kind": "linear_probe"}],
    }  # fmt: skip
    Path("study.yaml").write_text(yaml.safe_dump(recipe))
    return submit("study.yaml", STORE, JobServer(cluster.address), **options)


def test_two_who_submit_at_once_have_one_job(cluster: Cluster) -> None:
    """The other's job comes after the look at the cluster's jobs: this one chooses its number, and is told that it is taken."""
    first = submitted(cluster)
    assert not first.attached
    cluster.between, cluster.jobs = cluster.jobs, []
    assert submitted(cluster) == Submitted(first.job, attached=True) and len(cluster.jobs) == 1
    assert submitted(cluster) == Submitted(first.job, attached=True)


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_connection_that_is_lost_meanwhile_is_a_line(method: str, cluster: Cluster) -> None:
    """A tunnel that drops while the package is sent, or the job."""
    cluster.unanswered = method
    with pytest.raises(ClusterError, match=f"{cluster.address} did not take the job .*: run the same command again") as caught:
        submitted(cluster)
    assert "\n" not in str(caught.value)


def test_all_that_a_named_folder_holds_goes_along(cluster: Cluster) -> None:
    """Ray leaves out what a .gitignore or .rayignore in the folder names: weights and tables, which are never under git."""
    folder = Path("mine")
    (folder / "deeper").mkdir(parents=True)
    for name, text in {
        "net.py": "pass", "weights.pth": "w", "deeper/table.csv": "a", "deeper/x.bin": "b", ".gitignore": "*.pth\n*.csv\n",
        "deeper/.rayignore": "*.bin\n",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    submitted(cluster, include=["mine"])
    assert cluster.files() == {RECIPE_FILE, "mine/net.py", "mine/weights.pth", "mine/deeper/table.csv", "mine/deeper/x.bin"}


ARMS = [
    ({"name": "given", "initial_weights": "w/a.pth"}, "w/a.pth", "initial_weights of arm 'given'"),
    ({"name": "clinic", "predictions": "w/a.csv"}, "w/a.csv", "predictions of arm 'clinic'"),
]


@pytest.mark.parametrize(("arm", "path", "what"), ARMS)
def test_a_file_that_the_recipe_names_here_has_to_go_along(
    arm: dict[str, Any], path: str, what: str, cluster: Cluster, tmp_path: Path
) -> None:
    place = tmp_path / path
    place.parent.mkdir()
    place.write_text("x")
    with pytest.raises(RecipeError) as caught:
        submitted(cluster, arm)
    assert f"{what}: {path} is a file here, which the job would not have: add --with {path}" in str(caught.value)
    assert cluster.jobs == []
    for include in ([path], ["w"]):
        cluster.jobs = []
        submitted(cluster, arm, include=include)
        assert path in cluster.files()


def test_a_file_outside_this_folder_is_named_as_the_job_will_see_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.pth").write_text("x")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    with pytest.raises(RecipeError, match=r"add --with \.\./a\.pth, and write a\.pth in the recipe"):
        submitted(cluster, {"name": "given", "initial_weights": "../a.pth"}, include=["../a.pth"])
    submitted(cluster, {"name": "given", "initial_weights": "a.pth"}, include=["../a.pth"])
    assert cluster.files() == {RECIPE_FILE, "a.pth"}


@pytest.mark.parametrize("given", ["timm", "random", "s3://b/a.pth", "weights/of-the-store.pth", "/mnt/lab/a.pth"])
def test_what_is_no_file_here_is_the_nodes_affair(given: str, cluster: Cluster) -> None:
    submitted(cluster, {"name": "given", "initial_weights": given})
    assert cluster.files() == {RECIPE_FILE}


def test_an_absolute_path_is_said_to_be_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_text("x")
    said: list[str] = []
    submitted(cluster, {"name": "given", "initial_weights": str(path)}, tell=said.append)
    assert f"initial_weights of arm 'given': {path} has to be there on every node of the cluster" in said


def test_rays_own_client_without_its_token_is_a_line(cluster: Cluster) -> None:
    """It wants one where RAY_AUTH_MODE says so, though the cluster asks for none."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    environment |= {"RAY_AUTH_MODE": "token", "HOME": os.getcwd()}
    submitted(cluster)
    cluster.jobs = []
    command = [sys.executable, "-m", "medssl.cli", "submit", "study.yaml", "--store", STORE, "--address", cluster.address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "Traceback" not in done.stderr and "set RAY_AUTH_TOKEN" in done.stderr.splitlines()[-1]
