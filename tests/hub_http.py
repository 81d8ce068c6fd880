"""Requests and responses of the Hub for tests, apart from the sockets that carry them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """One HTTP request: `segments` are the parts of its path, unquoted one by one."""

    method: str
    path: str
    segments: list[str]
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        """The bearer token."""
        given = self.headers.get("authorization", "")
        return given.removeprefix("Bearer ") if given.startswith("Bearer ") else None


@dataclass
class Response:
    """A status, headers and a body. `size`: the Content-Length of a HEAD's missing body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):  # noqa: N818  (an answer, not an error)
    """A request that is answered by a status and the headers that the client maps to errors."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        told = {"X-Error-Message": message, **headers}
        self.response = Response(
            status,
            json.dumps({"error": message}).encode(),
            told if code is None else {"X-Error-Code": code, **told},
        )


def ranged(data: bytes, request: Request, headers: dict[str, str]) -> Response:
    """The data, or the part that a Range header asks for."""
    asked = request.headers.get("range", "")
    if not asked.startswith("bytes="):
        return Response(200, data, {"Accept-Ranges": "bytes", **headers})
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(len(data), int(last) + 1 if first and last else len(data))
    if start >= len(data):
        return Response(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", **headers}
    return Response(206, data[start:stop], told)


def as_json(content: Any) -> Response:
    return Response(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
