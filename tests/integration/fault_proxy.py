"""An HTTP proxy in front of the S3 server that injects faults on demand.

It forwards each request byte for byte, `Host` included, so signatures stay valid; only `Expect` is answered here.
Faults are drawn from `rates` (kind -> probability, from a fixed seed) or taken from `queue` (kinds for the next requests
whose method is in `methods`):

    503     the request is refused with SlowDown and never reaches the server
    reset   the connection is reset before the request reaches the server
    lost    the server carries the request out, then the connection is reset without an answer
    cut     the answer's head and half of its body come, then the connection ends
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>"


class FaultProxy:
    """The proxy on a free port of its own, in a thread of its own."""

    def __init__(self, upstream_port: int) -> None:
        self.rates: dict[str, float] = {}
        self.queue: collections.deque[str] = collections.deque()
        self.methods: set[str] = {"GET", "PUT", "POST", "HEAD", "DELETE"}
        self.injected: collections.Counter[str] = collections.Counter()
        self.requests = 0
        self.port = 0
        self._upstream_port = upstream_port
        self._random = random.Random(7)
        self._connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._thread.start()
        self._call(self._listen())

    def stop(self) -> None:
        self._call(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def clear(self) -> None:
        """No faults from now on."""
        self.rates, self.methods = {}, {"GET", "PUT", "POST", "HEAD", "DELETE"}
        self.queue.clear()
        self.injected.clear()

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Nothing listens on the port, and open connections are reset, for the body of the `with`."""
        self._call(self._hang_up())
        try:
            yield
        finally:
            self._call(self._listen())

    def outage_for(self, seconds: float) -> threading.Thread:
        """Starts an outage at once that ends by itself; join the thread to know that it has."""
        self._call(self._hang_up())

        def back() -> None:
            time.sleep(seconds)
            self._call(self._listen())

        thread = threading.Thread(target=back, daemon=True)
        thread.start()
        return thread

    def _call(self, coroutine: Any) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        done.result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._connections):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._exchange(reader, writer):
                await writer.drain()
        self._connections.discard(writer)
        writer.transport.abort()

    def _fault(self, method: str) -> str | None:
        self.requests += 1
        kind = None
        if method in self.methods:
            if self.queue:
                kind = self.queue.popleft()
            else:
                draw = self._random.random()
                for name, rate in self.rates.items():
                    if draw < rate:
                        kind = name
                        break
                    draw -= rate
        if kind is not None:
            self.injected[kind] += 1
        return kind

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        headers = _headers(head)
        method = head.split(b" ", 1)[0].decode()
        if headers.pop("expect", None):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")]
            head = b"\r\n".join(lines)
        body = await _body(reader, headers)
        fault = self._fault(method)
        if fault == "503":
            length = str(len(SLOW_DOWN)).encode()
            refusal = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: " + length
            writer.write(refusal + b"\r\n\r\n" + (b"" if method == "HEAD" else SLOW_DOWN))
            return True
        if fault == "reset":
            return False
        answer_head, answer = await self._ask(head + body, method)
        if fault == "lost":
            return False
        if fault == "cut":
            writer.write(answer_head + answer[: len(answer) // 2])
            await writer.drain()
            writer.close()
            return False
        writer.write(answer_head + answer)
        return True

    async def _ask(self, request: bytes, method: str) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=2**20)
        try:
            writer.write(request)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            while head.split(b" ", 2)[1] == b"100":
                head = await reader.readuntil(b"\r\n\r\n")
            empty = method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304")
            return head, b"" if empty else await _body(reader, _headers(head))
        finally:
            writer.close()


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        raw = b""
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            raw += line + await reader.readexactly(size + 2)
            if size == 0:
                return raw
    return await reader.readexactly(int(headers.get("content-length", 0)))
