"""The ways to the daemon: frames over its ingest socket, requests over HTTP, and what its answers mean."""

from __future__ import annotations

import contextlib

# The resolver and whoever opens a text file import these with their first use, in whatever thread that is; a child that
# is forked in the middle of an import waits for its end for ever.
import encodings.ascii
import encodings.idna  # noqa: F401 -- for what importing them does
import http.client
import json
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from asapd.client.address import Address, Socket, Web
from asapd.client.event import token_text

CONNECT_S = 3.0
ANSWER_S = 30.0
MAX_ANSWER_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Taken:
    """The events are recorded; `duplicates` of them were before. Or a reservation is closed."""

    recorded: int
    duplicates: int
    settled: int = 0
    """1 for a reservation that was not closed or gone before."""

    @property
    def is_written(self) -> bool:
        """Whether it shows that the daemon can write: what was done before takes reading alone."""
        return self.recorded + self.settled > 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The daemon will never take these events as they are. `places` has those it names, with reasons."""

    code: str
    detail: str
    places: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Away:
    """Nobody knows whether the events are recorded, or nobody could take them now: send them again.

    `is_bug` says that the events may have caused it: the daemon answered with a failure of its own, or a proxy refused.
    """

    reason: str
    is_bug: bool = False


Answer = Taken | Refused | Away

# What is about the events, not about the caller or the state of the daemon.
_ABOUT_EVENTS = {"malformed", "invalid", "usage_conflict", "too_large", "too_many_events", "idempotency_key_reused"}
_TOO_LARGE = {413, 414, 431}
# Of the key or the address mostly; `forbidden` also says that the key may not settle this one reservation.
_ABOUT_CALLER = {"forbidden", "host_not_allowed", "not_found"}
# What a proxy says for its own sake, of the way there, the key or the time.
_ABOUT_NO_EVENT = {401, 407, 408, 425, 429, 431}


def judge(document: Mapping[str, Any]) -> Answer:
    """What a refusal means for the events."""
    code, detail = str(document.get("code", "")), str(document.get("detail", ""))
    places: dict[int, str] = {}
    errors = document.get("errors")
    for error in errors if isinstance(errors, list) else []:
        if isinstance(error, dict) and isinstance(error.get("index"), int):
            places.setdefault(error["index"], f"{error.get('field')} {error.get('reason')}")
    if code in _ABOUT_EVENTS or (code == "forbidden" and places):
        return Refused(code, detail, places)
    return Away(f"{code}: {detail}", is_bug=code == "internal")


def _unexplained(status: int) -> Away:
    """An answer that is not the daemon's: a proxy may refuse what is in this request, or all of them."""
    return Away(
        f"HTTP status {status}", is_bug=status == 500 or (400 <= status < 500 and status not in _ABOUT_NO_EVENT)
    )


class Link(Protocol):
    """A way to report events."""

    def report(self, events: Sequence[bytes]) -> Answer:
        """Report events, each in JSON; returns once they are recorded, refused, or nobody knows. Never raises."""
        ...

    def abort(self) -> None:
        """From another thread: have a report that waits for its answer come back, and make no connection any more."""
        ...

    def close(self) -> None:
        """Close the connection, which in a forked child leaves it to the parent."""
        ...


class FrameLink:
    """Frames over the ingest socket, one in flight."""

    def __init__(self, address: Socket) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._is_aborted = False

    def report(self, events: Sequence[bytes]) -> Answer:
        """See `Link`."""
        body = b"[" + b",".join(events) + b"]"
        frame = len(body).to_bytes(4) + body
        try:
            answer = self._exchange(frame)
        except (OSError, ValueError) as error:
            self.close()
            return Away(_reason(error))
        if answer.get("ok") is True:
            return Taken(_number(answer, "recorded"), _number(answer, "duplicates"))
        if answer.get("code") == "too_large":
            self.close()
        return judge(answer)

    def _exchange(self, frame: bytes) -> dict[str, Any]:
        is_fresh = self._socket is None
        try:
            return self._once(frame)
        except ConnectionError:
            # A connection that was idle says only now that the daemon went away in the meantime.
            if is_fresh:
                raise
        self.close()
        return self._once(frame)

    def _once(self, frame: bytes) -> dict[str, Any]:
        if self._is_aborted:
            raise ConnectionAbortedError("the meter is closed")
        sock = self._socket
        if sock is None:
            sock = self._socket = connect(self._address, CONNECT_S)
            sock.settimeout(ANSWER_S)
        # A daemon that refuses a frame by its length answers before it has read it.
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(frame)
        length = int.from_bytes(_receive(sock, 4))
        if length > MAX_ANSWER_BYTES:
            raise ValueError("what answers there does not speak frames")
        answer = json.loads(_receive(sock, length))
        if not isinstance(answer, dict):
            raise ValueError("what answers there is not asapd")
        return answer

    def close(self) -> None:
        """See `Link`."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def abort(self) -> None:
        """See `Link`."""
        self._is_aborted = True
        sock = self._socket
        if sock is not None:
            # Closing alone would not wake the thread that waits in `recv`.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionResetError("the daemon closed the connection")
        data += more
    return bytes(data)


def connect(address: Socket, timeout_s: float) -> socket.socket:
    """A connection to a Unix socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address.path())
    except BaseException:
        sock.close()
        raise
    return sock


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, address: Socket, timeout_s: float) -> None:
        super().__init__("asapd", timeout=timeout_s)
        self._address = address

    def connect(self) -> None:
        """Over the Unix socket instead of TCP."""
        self.sock = connect(self._address, CONNECT_S)
        self.sock.settimeout(self.timeout)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer of HTTP; `document` is empty when the body is no JSON object."""

    status: int
    document: dict[str, Any]


class Requests:
    """Requests with JSON bodies over HTTP/1.1, on kept connections; any thread may use it, and a forked child.

    Without any lock: the handler of a signal may close it in the middle of anything.
    """

    def __init__(self, address: Address, key: str | None, tls: ssl.SSLContext | None) -> None:
        self._address = address
        self._key = key
        self._tls = tls
        # Each with the process that made it: in a child it is the parent's yet, who would take its answers.
        self._idle: deque[tuple[int, http.client.HTTPConnection]] = deque()
        self._is_closed = False

    def post(
        self,
        path: str,
        body: bytes,
        *,
        idempotency: str | None = None,
        token: str | None = None,
        timeout_s: float = ANSWER_S,
    ) -> Response:
        """POST a body; a request that may have been lost with a kept connection is sent again, so it must bear that.

        Raises:
            OSError: nobody answers.
            ValueError: what answers does not speak HTTP.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        if idempotency is not None:
            headers["Idempotency-Key"] = idempotency
        if token is not None:
            headers["X-ASAP-Delegation-Token"] = token
        prefix = self._address.prefix if isinstance(self._address, Web) else ""
        kept = self._kept()
        if kept is not None:
            with contextlib.suppress(ConnectionError):
                return self._request(kept, prefix + path, body, headers, timeout_s)
        return self._request(self._connection(timeout_s), prefix + path, body, headers, timeout_s)

    def _kept(self) -> http.client.HTTPConnection | None:
        with contextlib.suppress(IndexError):
            while True:
                maker, connection = self._idle.pop()
                if maker == os.getpid():
                    return connection
                connection.close()  # which leaves it to the parent
        return None

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        address = self._address
        if isinstance(address, Socket):
            return _UnixConnection(address, timeout_s)
        if not address.is_tls:
            return http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return http.client.HTTPSConnection(address.host, address.port, timeout=timeout_s, context=self._tls)

    def _request(
        self, connection: http.client.HTTPConnection, path: str, body: bytes, headers: dict[str, str], timeout_s: float
    ) -> Response:
        try:
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            # A server that refuses a body by its length answers before it has read it.
            with contextlib.suppress(BrokenPipeError):
                connection.request("POST", path, body, headers)
            response = connection.getresponse()
            data = response.read(MAX_ANSWER_BYTES)
            is_kept = not response.will_close and response.isclosed()
        except OSError:
            connection.close()
            raise
        except http.client.HTTPException as error:
            connection.close()
            raise ValueError(f"what answers there does not speak HTTP: {error!r}") from None
        except BaseException:
            connection.close()
            raise
        if is_kept:
            self._idle.append((os.getpid(), connection))
            if self._is_closed:  # meanwhile, or before: nobody would close it
                self.close()
        else:
            connection.close()
        document: Any = None
        with contextlib.suppress(ValueError):
            document = json.loads(data)
        return Response(response.status, document if isinstance(document, dict) else {})

    def close(self) -> None:
        """Keep no connection any more, and close those not in use; in a forked child that leaves them to the parent."""
        self._is_closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()[1].close()


class WebLink:
    """`POST /usage` over HTTP."""

    def __init__(self, web: Requests) -> None:
        self._web = web

    def report(self, events: Sequence[bytes]) -> Answer:
        """See `Link`."""
        return report(self._web, events)

    def abort(self) -> None:
        """See `Link`. A request under way goes on until its answer or its deadline."""

    def close(self) -> None:
        """See `Link`. The connections belong to `Requests`."""


def report(web: Requests, events: Sequence[bytes], token: str | None = None) -> Answer:
    """Report events over HTTP, all of them under a token if one is given."""
    if token is not None and token_text(token) != token:  # from a file that was damaged or edited
        return Refused("malformed", "the token of the delegation can be no header of a request")
    try:
        response = web.post("/usage", b"[" + b",".join(events) + b"]", token=token)
    except (OSError, ValueError) as error:
        return Away(_reason(error))
    document = response.document
    if response.status in {200, 201} and document.get("status") == "recorded":
        return Taken(_number(document, "recorded"), _number(document, "duplicates"))
    if response.status == 413 and "code" not in document:
        # A proxy's own limit.
        return Refused("too_large", "the request is too large")
    if response.status == 431 and token is not None:
        # Without a token it is about the key, which is no fault of the events.
        code = str(document.get("code", "headers_too_large"))
        return Refused(code, "the headers of the request are too large: the token of the delegation is too long")
    if "code" not in document:
        return _unexplained(response.status)
    return judge(document)


def is_reservation(text: object) -> bool:
    """Whether this can be a reservation's id, which becomes a part of a path."""
    return isinstance(text, str) and re.fullmatch("[A-Za-z0-9_-]{1,128}", text) is not None


def settle(web: Requests, reservation: str, timeout_s: float = ANSWER_S) -> Answer:
    """Close a reservation; one that is closed already, or gone, is as good."""
    if not is_reservation(reservation):  # from a spool of an older build, which took any
        return Refused("invalid", "this is no reservation's id")
    try:
        response = web.post(
            f"/reservations/{reservation}/settle", b"", idempotency=f"settle-{reservation}", timeout_s=timeout_s
        )
    except (OSError, ValueError) as error:
        return Away(_reason(error))
    code = str(response.document.get("code", ""))
    if response.status == 200 or code in {"reservation_closed", "reservation_not_found"}:
        return Taken(0, 0, settled=int(response.status == 200))
    if response.status in {400, 403, 404, 409, 422} and code and code not in _ABOUT_CALLER:
        return Refused(code, str(response.document.get("detail", "")))
    if response.status in _TOO_LARGE:
        # The daemon's limits or a proxy's: the same request is over them for ever.
        return Refused(code or "too_large", str(response.document.get("detail", "the request is too large")))
    if not code:
        return _unexplained(response.status)
    return Away(f"{code} {response.status}", is_bug=code == "internal" or code in _ABOUT_CALLER)


def make_link(address: Address, web: Requests) -> Link:
    """The link for an address."""
    return FrameLink(address) if isinstance(address, Socket) else WebLink(web)


def _number(document: Mapping[str, Any], name: str) -> int:
    value = document.get(name)
    return value if isinstance(value, int) else 0


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
