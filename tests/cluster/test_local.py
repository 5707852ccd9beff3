"""How the local cluster waits for its nodes while the job server is not ready; all else of it is in the acceptance tests."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import local
import pytest
from local import Cluster


def nodes(count: int) -> bytes:
    return json.dumps({"data": {"result": {"result": [{"state": "ALIVE"}] * count + [{"state": "DEAD"}]}}}).encode()


UNREADY = [
    (500, b"no"),
    (200, b"<html>"),
    (200, b'{"result": false}'),
    (200, b'{"data": {"result": null}}'),
    (0, b""),
    (200, b"[]"),
]


@pytest.fixture
def answers() -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """A server's address, and what it answers, one after the other and the last for ever; 0 hangs up."""
    left: list[tuple[int, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = left.pop(0) if len(left) > 1 else left[0]
            if code:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", left
        server.shutdown()


def test_answers_that_are_none_are_waited_out(answers: tuple[str, list[tuple[int, bytes]]], tmp_path: Path) -> None:
    address, left = answers
    cluster = Cluster(tmp_path / "c", store="s3://elsewhere/lab")
    try:
        cluster.dashboard = address
        left += [*UNREADY, (200, nodes(1)), (200, nodes(2))]
        cluster._wait(lambda: cluster._alive() == 2, "worker node 1")
        assert left == [(200, nodes(2))], "it came to the last answer"
    finally:
        cluster.stop()


def test_a_folder_that_is_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    for name in ("file", "file/below"):
        monkeypatch.setattr("sys.argv", ["local.py", str(tmp_path / name), "--store", "s3://elsewhere/lab"])
        assert local.main() == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and f"cannot use the folder {tmp_path / name}" in said[0]
    assert (tmp_path / "file").read_text() == "kept"
