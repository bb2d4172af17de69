"""A daemon that answers as it is told: over frames, and over HTTP on the same socket."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

Event = dict[str, Any]
Handle = Callable[[list[Event]], dict[str, Any] | None]
HandleHttp = Callable[[str, dict[str, str], Any], tuple[int, dict[str, Any]] | None]

PATIENCE_S = 10.0


def taken(events: list[Event]) -> dict[str, Any]:
    """What asapd says when all is well."""
    return {"ok": True, "recorded": len(events), "duplicates": 0}


def refused(code: str, *places: int) -> dict[str, Any]:
    """What asapd says when it refuses a batch for the events at some places, or without naming any."""
    errors = [{"field": "agent", "reason": "is bad", "index": place} for place in places]
    return {"ok": False, "code": code, "detail": "no", **({"errors": errors} if errors else {})}


class Fake:
    """Listens on a Unix socket. `handle` gives the answer to a frame, None closes the connection instead."""

    def __init__(self, path: Path, handle: Handle = taken, http: HandleHttp | None = None) -> None:
        self.path = path
        self.handle = handle
        self.http = http
        self.batches: list[list[Event]] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.log: list[str] = []
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def events(self) -> list[Event]:
        """All events so far, resent ones as often as they came."""
        return [event for batch in list(self.batches) for event in batch]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as stream:
                first = stream.peek(1)[:1]
                while (self._frame if first == b"\0" else self._request)(connection, stream):
                    pass
        except (OSError, ValueError):
            return

    def _frame(self, connection: socket.socket, stream: Any) -> bool:
        length = stream.read(4)
        if len(length) < 4:
            return False
        events = json.loads(stream.read(int.from_bytes(length)))
        self.batches.append(events)
        self.log.append("usage")
        answer = self.handle(events)
        if answer is None:
            return False
        body = json.dumps(answer).encode()
        connection.sendall(len(body).to_bytes(4) + body)
        return True

    def _request(self, connection: socket.socket, stream: Any) -> bool:
        line = stream.readline().decode()
        if not line:
            return False
        headers = {}
        while (header := stream.readline().decode().strip()) != "":
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        data = stream.read(int(headers.get("content-length", 0)))
        body = json.loads(data) if data else None
        self.requests.append((line.split()[1], headers, body))
        self.log.append(line.split()[1])
        answer = None if self.http is None else self.http(line.split()[1], headers, body)
        if answer is None:
            return False
        written = json.dumps(answer[1]).encode()
        head = f"HTTP/1.1 {answer[0]} X\r\ncontent-type: application/json\r\ncontent-length: {len(written)}\r\n\r\n"
        connection.sendall(head.encode() + written)
        return True

    def close(self) -> None:
        """Go away, as a daemon that is killed: its socket file stays."""
        for one in [self._listener, *self._connections]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def until(probe: Callable[[], Any]) -> Any:
    """What a function returns, once that is true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := probe()):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    return found
