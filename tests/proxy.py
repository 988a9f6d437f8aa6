"""A proxy in front of a real S3 server that fails, cuts off, delays or flips bits of what it is told to."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, Literal

import pytest

Fault = Literal["fail", "cut", "delay", "flip", "flip request", "expired"]

# The answer of S3 to a temporary key whose time is over.
_EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message></Error>"
)
_DELAY_SECONDS = 0.2


@dataclass
class Proxy:
    """What to do to a request: `fault(method, path, number)`, where number counts the requests for it from 1.

    `place(bytes)` is the byte that a flip hits, of so many.
    `seen` has method, path and headers of each request, and its answer's headers.
    """

    url: str
    fault: Callable[[str, str, int], Fault | None] = lambda method, path, number: None
    place: Callable[[int], int] = lambda size: size // 2
    seen: list[tuple[str, str, dict[str, str], dict[str, str]]] = field(default_factory=list)
    done: list[tuple[Fault, str]] = field(default_factory=list)
    _counts: dict[tuple[str, str], int] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def choose(self, method: str, path: str) -> Fault | None:
        """What happens to this request, which is noted in `done`."""
        with self._lock:
            number = self._counts[method, path] = self._counts.get((method, path), 0) + 1
            fault = self.fault(method, path, number)
            if fault:
                self.done.append((fault, path))
            return fault

    def count(self, method: str, name: str) -> int:
        """How many requests there were for the file of this name."""
        return max(
            (n for (m, path), n in self._counts.items() if m == method and path.endswith(name)), default=0
        )


@contextmanager
def proxied(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy for `server`, as http://HOST:PORT; AWS_ENDPOINT_URL leads to it."""
    host = server.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", lambda request: _answer(request, proxy, host))
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{listener.server_port}")
    thread = Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    try:
        yield proxy
    finally:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        listener.shutdown()
        listener.server_close()
        thread.join()


def _answer(request: BaseHTTPRequestHandler, proxy: Proxy, host: str) -> None:
    path = request.path.partition("?")[0]
    fault = proxy.choose(request.command, path)
    sent = _body(request)
    if fault == "delay":
        time.sleep(_DELAY_SECONDS)
    if fault in ("fail", "expired"):
        refused = fault == "expired"
        xml = {"Content-Type": "application/xml"}
        _send(request, 403 if refused else 503, xml, _EXPIRED if refused else b"")
        return
    if fault == "flip request":
        sent = _flipped(sent, proxy.place)
    server = HTTPConnection(host)
    try:
        # As it came: the signature covers the host's name.
        server.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name.lower() != "expect":
                server.putheader(name, value)
        server.endheaders(sent)
        response = server.getresponse()
        content, headers = response.read(), dict(response.getheaders())
    finally:
        server.close()
    proxy.seen.append((request.command, request.path, dict(request.headers.items()), headers))
    content = _flipped(content, proxy.place) if fault == "flip" else content
    _send(request, response.status, headers, content, fault)


def _body(request: BaseHTTPRequestHandler) -> bytes:
    """The request's body as it came, also where it comes in chunks."""
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    lines = []
    while True:
        lines.append(request.rfile.readline())
        size = int(lines[-1].split(b";")[0], 16)
        if not size:
            break
        lines.append(request.rfile.read(size + 2))
    while lines[-1] != b"\r\n":
        lines.append(request.rfile.readline())
    return b"".join(lines)


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    content: bytes,
    fault: Fault | None = None,
) -> None:
    request.send_response_only(status)
    for name, value in headers.items():
        if name.lower() not in ("transfer-encoding", "content-length", "connection"):
            request.send_header(name, value)
    length = headers.get("Content-Length", len(content)) if request.command == "HEAD" else len(content)
    request.send_header("Content-Length", str(length))
    request.end_headers()
    if request.command == "HEAD":
        return
    if fault == "cut":
        request.wfile.write(content[: len(content) // 2])
        request.close_connection = True
    else:
        request.wfile.write(content)


def _flipped(content: bytes, place: Callable[[int], int]) -> bytes:
    """The same with one bit flipped."""
    if not content:
        return content
    harmed = bytearray(content)
    harmed[place(len(harmed))] ^= 4
    return bytes(harmed)
