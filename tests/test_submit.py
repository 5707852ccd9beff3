"""What `medssl submit` says before a cluster is asked for anything, and of addresses where none is. The rest is in cluster/."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from medssl.cli import main
from medssl.errors import RecipeError
from medssl.job_server import ClusterError, Job, JobServer, read_token, server_address
from medssl.submit import RECIPE_FILE, _job_id, _pack, _store_of_a_job, _variables, exit_code, find_job

CANARY = "token-canary-5e0d"
JOBS = [
    {"submission_id": f"{study}-{number}", "status": status, "start_time": number,
     "metadata": {"medssl_study": study, "medssl_store": f"s3://{number}", "medssl_submitter": "ann"}}
    for study, number, status in (
        ("a", 1, "RUNNING"), ("a", 2, "RUNNING"), ("b", 3, "RUNNING"), ("b", 4, "FAILED"), ("c-1f", 9, "SUCCEEDED"),
        ("c", 5, "FAILED"), ("d.e", 8, "SUCCEEDED"),
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) not in (0, 1)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("medssl: ")
    return said.err


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def other() -> Iterator[tuple[str, list[str]]]:
    """The address of a web server that is no Ray's, and the paths and headers it was asked with."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('Authorization')}")
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(JOBS).encode() if self.path == "/api/jobs/" else b"<html>hello</html>")

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_dead_address_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said = one_line(capsys, "jobs", "--address", f"http://127.0.0.1:{port}")
    assert f"no Ray cluster answers at http://127.0.0.1:{port}" in said and "check the address" in said


def test_a_server_that_never_answers_is_given_up_within_the_limit(silent: str) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match="no Ray cluster answers at"):
        JobServer(silent).probe()
    assert 4 < time.monotonic() - started < 15  # the limit is five seconds: this is what it promises, not a speed


def test_another_kind_of_server_is_named_as_one(other: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert "answers, but is no Ray job server" in one_line(capsys, "jobs", "--address", other[0])


def test_a_token_does_not_follow_a_redirection(other: tuple[str, list[str]]) -> None:
    address, asked = other
    with pytest.raises(ClusterError, match="answered 302"):
        JobServer(f"{address}/moved", CANARY).probe()
    assert asked == [f"/moved/api/version Bearer {CANARY}"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "no cluster is named: give --address http://HEAD:8265"),
        ("ray://head:10001", "address 'ray://head:10001' is not a job server's"),
        ("head:8265", "address 'head:8265' is not a job server's"),
        ("http://me:secret@head:8265", "the address holds credentials"),
        ("http://me:secret@[x", "address 'http://***@[x' is not a job server's"),
        ("http://[x", "address 'http://[x' is not a job server's"),
        ("http://head:port", "address 'http://head:port' is not a job server's"),
        ("http://head:82650", "address 'http://head:82650' is not a job server's"),
        ("http://.example:1", "address 'http://.example:1' is not a job server's"),
        (f"http://{'a' * 64}.example:1", "is not a job server's"),
        ("http://head:1/caf\u00e9", "address 'http://head:1/caf\u00e9' is not a job server's"),
        ("http://head:1/a b", "address 'http://head:1/a b' is not a job server's"),
        ("http://head\n:1", "is not a job server's"),
    ],
)
def test_addresses_that_are_none(given: str | None, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        server_address(given)
    assert words in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("given", ["http://[x", "http://.example:1", "http://127.0.0.1:1/caf\u00e9", "http://127.0.0.1:x"])
def test_an_address_that_is_none_is_one_line(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"address '{given}' is not a job server's" in one_line(capsys, "jobs", "--address", given)


def test_a_job_of_any_name_is_asked_for(other: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Names are one part of a path, whatever they hold."""
    server = JobServer(other[0])
    for name in ("caf\u00e9", "a b", "../version"):
        with pytest.raises(ClusterError, match="is no Ray job server"):
            server.job(name)
    assert [line.split(" None")[0] for line in other[1]] == ["/api/jobs/caf%C3%A9", "/api/jobs/a%20b", "/api/jobs/..%2Fversion"]


@pytest.mark.parametrize("given", ["http://[::1]:8265", "https://b\u00fccher.example:8265", "http://head:8265/ray"])
def test_unusual_addresses_are_taken(given: str) -> None:
    assert server_address(given) == given


def test_the_address_comes_from_the_environment_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://second:8265")
    assert server_address(None) == "http://second:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first:8265/")
    assert server_address(None) == "http://first:8265"
    assert server_address("https://given") == "https://given"


def test_the_token_is_where_rays_tools_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-home\n")
    assert read_token() == "of-home"
    (tmp_path / "mine").write_text("of-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    assert read_token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    assert read_token() == "of-variable"


LIKE_SECRETS = """
AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN WANDB_API_KEY DB_PASSWORD my_credentials APIKEY OPENAI_APIKEY
OPENAI_APIKEYS AZURE_STORAGE_ACCOUNTKEY SSHKEY PGPASS DB_PASS DB_PASS2 GPG_PASSPHRASE passcode GITHUB_PAT MINIO_ROOT_PW ROOTPW
MYSQL_PWD HTTP_AUTHORIZATION NPM_AUTH SENTRY_DSN AZURE_STORAGE_CONNECTION_STRING MY_JWT STORE_CREDS WIFI_PSK
"""
ORDINARY = """
PATH PYTHONPATH LD_LIBRARY_PATH PWD OLDPWD KEYBOARD KEYBOARD_LAYOUT XKB_KEYMAP MONKEY TURKEY_SITE COMPASS ENCOMPASS BYPASS_CACHE
PASSIVE_FTP PASSES PATIENCE PATTERN GIT_AUTHOR_NAME TOKENIZERS_PARALLELISM OMP_NUM_THREADS CUDA_VISIBLE_DEVICES NCCL_DEBUG
HTTPS_PROXY AWS_PROFILE MEDSSL_CACHE TZ SEED HPW2
"""


@pytest.mark.parametrize("name", ORDINARY.split())
def test_ordinary_variables_are_taken(name: str) -> None:
    assert _variables([f"{name}=1"])[name] == "1"


@pytest.mark.parametrize("name", LIKE_SECRETS.split())
def test_variables_that_look_like_secrets_are_refused(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _variables([f"{name}={CANARY}"])
    assert f"--env {name} looks like a secret" in str(caught.value) and CANARY not in str(caught.value)


def test_what_goes_with_a_job_says_where_the_store_is_and_nothing_that_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", CANARY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_REGION", "eu-1")
    monkeypatch.setenv("MINE", "4")
    found = _variables(["MINE", "YOURS=a=b"])
    assert found["AWS_ENDPOINT_URL"] == "http://store:9000" and found["AWS_REGION"] == "eu-1"
    assert found["MINE"] == "4" and found["YOURS"] == "a=b" and CANARY not in found.values()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{CANARY}@store:9000")
    assert "AWS_ENDPOINT_URL" not in _variables([])
    for wrong, words in (("NOT_THERE", "is not set here"), ("1x=2", "is no variable's name")):
        with pytest.raises(RecipeError, match=words):
            _variables([wrong])


def test_a_job_gets_the_recipe_and_what_is_named_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text("study: x\n")
    (tmp_path / "other.yaml").write_text("study: y\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net.py").write_text("pass\n")
    (tmp_path / "weights.pth").write_bytes(b"w")
    target = tmp_path / "job"
    target.mkdir()
    _pack(target, Path("study.yaml"), ["mine", str(tmp_path / "weights.pth")])
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert found == ["mine/net.py", RECIPE_FILE, "weights.pth"]
    for wrong, words in (("none.csv", "there is no such file"), ("weights.pth", "is there twice")):
        with pytest.raises(RecipeError, match=words):
            _pack(target, Path("study.yaml"), [wrong])


def test_what_cannot_be_copied_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text("study: x\n")
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    (tmp_path / "mine" / "deeper" / "old.pth").symlink_to("gone.pth")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "job").mkdir()
    for given, path in (("mine", "mine/deeper/old.pth"), ("pipe", "pipe"), ("x" * 300, "x" * 300)):
        with pytest.raises(RecipeError, match=f"--with {given}: {path} cannot be copied") as caught:
            _pack(tmp_path / "job", Path("study.yaml"), [given])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "left_with", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", 143, 143), ("STOPPED", None, 143)],
)
def test_exit_codes(status: str, left_with: int | None, code: int) -> None:
    assert exit_code(Job("a", status, "", {}, 1, 2, left_with)) == code


@pytest.fixture
def talking() -> Iterator[tuple[str, list[str]]]:
    """The address of a job server whose job "a-1" prints on and on, and the paths it was asked for."""
    asked: list[str] = []
    job = {"submission_id": "a-1", "status": "RUNNING", "start_time": 1}

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        if not request.path.endswith("/tail"):
            named = {"/api/version": {"version": "4", "ray_version": "2"}, "/api/jobs/": [job], "/api/jobs/a-1": job}
            return web.json_response(named.get(request.path, {"logs": ""}))
        found = web.WebSocketResponse()
        await found.prepare(request)
        for n in range(10_000):
            if found.closed:
                break
            await found.send_str(f"line {n}\n")
            await asyncio.sleep(0.02)
        return found

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.SockSite(runner, listening)
        await site.start()
        while not done.is_set():
            await asyncio.sleep(0.05)
        await runner.cleanup()

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        done.set()
        thread.join(10)


def test_who_reads_no_further_ends_the_command(talking: tuple[str, list[str]]) -> None:
    """`medssl logs a-1 --follow | head`: it does not begin anew, for as long as the job runs."""
    address, asked = talking
    command = [sys.executable, "-m", "medssl.cli", "logs", "a-1", "--follow", "--address", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        try:
            assert process.wait(60) == 141
        finally:
            process.kill()
        assert process.stderr.read() == ""
    assert asked.count("/api/jobs/a-1/logs/tail") == 1


def test_a_study_that_runs_twice_has_to_be_named_by_its_job(other: tuple[str, list[str]]) -> None:
    server = JobServer(other[0])
    with pytest.raises(ClusterError, match=r"several jobs run a study 'a': name one of a-2 \(ann, s3://2\), a-1 \(ann, s3://1\)"):
        find_job(server, "a")
    assert [find_job(server, name).id for name in ("a-1", "b", "c")] == ["a-1", "b-3", "c-5"]
    with pytest.raises(ClusterError, match="no job and no study 'd'"):
        find_job(server, "d")


def test_a_study_on_one_of_several_datasets_is_found_by_the_name_it_has_in_alerts(other: tuple[str, list[str]]) -> None:
    """Alerts and panels say STUDY.DATASET; the job has the name of the whole."""
    server = JobServer(other[0])
    assert [find_job(server, name).id for name in ("b.breast", "d.e.breast", "d.e")] == ["b-3", "d.e-8", "d.e-8"]
    for name in ("bb.breast", "d.breast"):
        with pytest.raises(ClusterError, match=f"no job and no study '{name}'"):
            find_job(server, name)


def test_the_number_of_a_job_is_one_that_none_has_had(other: tuple[str, list[str]]) -> None:
    """Jobs that were deleted leave gaps: a count would give the number of one that is there."""
    jobs = JobServer(other[0]).jobs()
    assert _job_id(jobs, "c", "1f") == "c-1f-10" and _job_id(jobs, "c", "2e") == "c-2e-1"


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("s3://bucket/a/", "s3://bucket/a"),
        ("S3://bucket//a", "s3://bucket/a"),
        ("/mnt/lab", "file:///mnt/lab"),
        ("file:///mnt/my%20lab/", "file:///mnt/my%20lab"),
    ],
)
def test_a_store_has_one_name(given: str, uri: str) -> None:
    assert _store_of_a_job(given) == uri


@pytest.mark.parametrize("given", ["medssl-store", "./store", "../store", "file:store"])
def test_a_store_below_this_folder_is_none_for_a_cluster(given: str) -> None:
    with pytest.raises(RecipeError, match="which the cluster does not have: give --store s3://"):
        _store_of_a_job(given)


@pytest.mark.parametrize("token", [f"{CANARY}\nsecond line", f"{CANARY}\u2026", f"{CANARY}\x00"])
def test_what_is_no_token_is_refused_and_not_repeated(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    path.write_text(token, encoding="utf-8")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    said = one_line(capsys, "jobs", "--address", "http://127.0.0.1:9")
    assert f"what {path} holds is no token" in said and CANARY not in said


def test_a_variable_with_a_password_in_its_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="--env HTTPS_PROXY holds a URL with a user or password") as caught:
        _variables([f"HTTPS_PROXY=http://me:{CANARY}@proxy:3128"])
    assert CANARY not in str(caught.value)
