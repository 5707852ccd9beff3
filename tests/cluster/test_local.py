"""How the local cluster waits for its nodes while the job server is not ready; all else of it is in the acceptance tests."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

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
