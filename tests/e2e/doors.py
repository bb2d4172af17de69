"""The daemon's HTTP doors, asked with any bytes for a body and any headers, and held to an answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from pathlib import Path
from typing import Any, NamedTuple, Self

Headers = list[tuple[str, str]]


class Answer(NamedTuple):
    """What came back."""

    status: int
    content_type: str
    body: bytes

    @property
    def document(self) -> Any:
        """The body, which has to be JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """Of a problem document; of other answers none."""
        return self.document["code"] if self.content_type == "application/problem+json" else None


class HttpDoor:
    """One connection, opened again when the daemon closes it after an answer."""

    def __init__(self, address: tuple[str, int] | Path, key: str = "") -> None:
        self._address = address
        self._always: Headers = [("Authorization", f"Bearer {key}")] if key else []
        self._connection: http.client.HTTPConnection | None = None

    def post(self, path: str, body: bytes, headers: Headers, *, chunked: bool = False) -> Answer:
        """The answer to a POST; a connection that was fresh has to bring one."""
        while True:
            is_fresh = self._connection is None
            try:
                return self._ask("POST", path, body, headers, chunked)
            except (http.client.RemoteDisconnected, ConnectionError):
                self.close()
                assert not is_fresh, f"no answer to {path} {headers} {body!r}"

    def get(self, path: str) -> Any:
        """What is there."""
        self.close()
        answer = self._ask("GET", path, b"", [], chunked=False)
        assert answer.status == 200, answer
        return answer.document

    def _ask(self, method: str, path: str, body: bytes, headers: Headers, chunked: bool) -> Answer:
        connection = self._connection = self._connection or self._connect()
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (*self._always, *headers):
            connection.putheader(name, value)
        if chunked:
            connection.putheader("Transfer-Encoding", "chunked")
        else:
            connection.putheader("Content-Length", str(len(body)))
        # An answer may come, and the connection be closed, before all of the body was sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.endheaders(body or None, encode_chunked=chunked)
            if chunked and not body:
                connection.send(b"0\r\n\r\n")
        found = connection.getresponse()
        answer = Answer(found.status, found.headers.get("content-type", ""), found.read())
        if found.will_close:
            self.close()
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        if not isinstance(self._address, Path):
            return http.client.HTTPConnection(*self._address, timeout=30)
        connection = http.client.HTTPConnection("asapd", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(str(self._address))
        return connection

    def close(self) -> None:
        """Closes the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class FrameDoor:
    """A connection that speaks frames, opened when it is first used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def send(self, body: bytes) -> dict[str, Any]:
        """The answer to a frame."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(30)
            self._socket.connect(str(self._path))
        self._socket.sendall(len(body).to_bytes(4, "big") + body)
        found: dict[str, Any] = json.loads(self._receive(int.from_bytes(self._receive(4, body), "big"), body))
        return found

    def _receive(self, length: int, body: bytes) -> bytes:
        assert self._socket is not None
        received = self._socket.recv(length, socket.MSG_WAITALL)
        assert len(received) == length, f"no answer to {body!r}"
        return received

    def close(self) -> None:
        """Closes the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
