"""A Hub for tests: a loopback server that the real huggingface_hub client talks to.

    with HubServer() as hub:
        repo = hub.add("org/base", {"config.json": b"{}", "model.safetensors": data})
        hub.fail("GET /api/models/", 503, times=2)

Two origins, as on the real one: the Hub, and a "CDN" that large files are redirected to and that
answers 400 when a token leaks to it. Every request is recorded; faults are injected by the
beginning of "METHOD /path" (of either origin).
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from hub_http import Request, Response
from hub_repos import Blob, Repo
from hub_routes import Hub

if TYPE_CHECKING:
    from typing_extensions import Self

Change = Callable[[Response], Response]


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests that begin with `route`.

    refusal: what is answered without doing what was asked for. instead: makes another response of
    the right one. after: bytes of the body after which the connection is dropped, though the
    headers promise all of it. cut: bytes of the request's body after which the connection is
    dropped, so that the request has no effect. lost: whether the request has its effect and the
    connection is dropped before the answer.
    """

    route: str
    times: int
    refusal: Response | None = None
    instead: Change | None = None
    after: int | None = None
    cut: int | None = None
    lost: bool = False


@dataclass(frozen=True)
class Seen:
    """A request that was answered: "METHOD /path", its Range header, and the bytes sent back."""

    call: str
    range: str | None
    status: int
    sent: int


class HubServer(Hub):
    """The server; a context manager. `seen` are the requests so far; see `Uploads` for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, answer))
            for answer in (self.answer, self.answer_cdn)
        ]
        ports = [server.server_address[1] for server in self._servers]
        self.url, self.cdn = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> Self:
        self._threads = [
            threading.Thread(target=s.serve_forever, args=(0.01,)) for s in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close both origins; a second call does nothing."""
        while self._threads:
            self._servers[-1].shutdown()
            self._threads.pop().join()
            self._servers.pop().server_close()

    def add(self, name: str, files: Mapping[str, bytes], *, revision: str = "main") -> Repo:
        """Commit files to a model repository, which is made if need be.

        Weights and deltas become large objects, as on the real Hub.
        """
        repo = self.repos.setdefault(("model", name), Repo("model", name))
        large = (".sdelta", ".safetensors", ".bin")
        blobs = {path: Blob(data, path.endswith(large)) for path, data in files.items()}
        self.objects |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
        repo.commit(revision, {**blobs})
        return repo

    def fail(
        self, route: str, status: int, times: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with an error status, and do nothing else."""
        refusal = Response(status, b"{}", dict(headers or {}))
        self.faults.append(Fault(route, times, refusal=refusal))

    def drop(self, route: str, after: int, times: int = 1) -> None:
        """Drop the connection after so many bytes of the body."""
        self.faults.append(Fault(route, times, after=after))

    def cut(self, route: str, after: int, times: int = 1) -> None:
        """Drop the connection after so many bytes of what the client sends."""
        self.faults.append(Fault(route, times, cut=after))

    def lose(self, route: str, times: int = 1) -> None:
        """Do what is asked, and drop the connection before answering."""
        self.faults.append(Fault(route, times, lost=True))

    def meanwhile(self, route: str, act: Callable[[], object], times: int = 1) -> None:
        """Do something after a request and before its answer."""

        def acted(right: Response) -> Response:
            act()
            return right

        self.faults.append(Fault(route, times, instead=acted))

    def corrupt(self, route: str, times: int = 1) -> None:
        """Send a body of the right length with one wrong byte in its middle."""

        def changed(right: Response) -> Response:
            middle = len(right.body) // 2
            wrong = bytes([right.body[middle] ^ 1])
            body = right.body[:middle] + wrong + right.body[middle + 1 :]
            return Response(right.status, body, right.headers)

        self.faults.append(Fault(route, times, instead=changed))

    def shorten(self, route: str, times: int = 1) -> None:
        """Send half of the body as if it were all of it."""

        def halved(right: Response) -> Response:
            return Response(right.status, right.body[: len(right.body) // 2], right.headers)

        self.faults.append(Fault(route, times, instead=halved))

    def calls(self, pattern: str = "") -> list[str]:
        """The "METHOD /path" of all requests that match a regular expression, in order."""
        return [each.call for each in self.seen if re.search(pattern, each.call)]

    def fault(self, call: str) -> Fault | None:
        """The fault that is due for a request; it is used up by this."""
        with self._lock:
            for fault in self.faults:
                if fault.times and call.startswith(fault.route):
                    fault.times -= 1
                    return fault
        return None


def _handler(hub: HubServer, answer: Callable[[Request], Response]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            parts = urlsplit(self.path)
            call = f"{self.command} {unquote(parts.path)}"
            fault = hub.fault(call)
            if fault is not None and fault.cut is not None:
                self.rfile.read(fault.cut)
                hub.seen.append(Seen(call, None, 0, 0))
                self._hang_up()
                return
            request = Request(
                method=self.command,
                path=parts.path,
                segments=[unquote(part) for part in parts.path.strip("/").split("/")],
                query=parse_qs(parts.query),
                headers={name.lower(): value for name, value in self.headers.items()},
                body=self._body(),
            )
            refusal = None if fault is None else fault.refusal
            response = answer(request) if refusal is None else refusal
            if fault is not None and fault.lost:
                hub.seen.append(Seen(call, None, 0, 0))
                self._hang_up()
                return
            if fault is not None and fault.instead is not None:
                response = fault.instead(response)
            body = b"" if self.command == "HEAD" else response.body
            if fault is not None and fault.after is not None:
                body = body[: fault.after]
                self.close_connection = True
            sent = len(body)
            hub.seen.append(Seen(call, self.headers.get("Range"), response.status, sent))
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.body)))
            self.end_headers()
            self.wfile.write(body)

        def _hang_up(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Tests read `seen` instead."""

    return Handler
