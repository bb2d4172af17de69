"""The daemon as asapctl sees it: HTTP over the admin socket, every failure with its exit code."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from asapd.cli.outcome import Exit, Failure

# The daemon answers within 30 s or says why not; only a walk of a long audit log takes longer, and what has its own
# patience.
READ_S = 60.0
CONNECT_S = 5.0
PAGE = 1000
_CUT_OFF = "the reply was cut off: nothing was written, ask again"
_UCRED = struct.Struct("3i")  # pid, uid, gid
_SERVICE_SOCKET = Path("/run/asapd/admin.sock")


class RefusedError(Failure):
    """The daemon said no; `problem` is its problem document."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(_exit_of(status), _message(status, problem))
        self.status = status
        self.problem = problem


class CutOffError(Failure):
    """A reply ended before its end, which nobody needs to have meant: asked again, it may come."""


def default_socket() -> Path:
    """`$ASAPD_SOCKET`, else where a daemon of this user listens when nobody says otherwise."""
    if given := os.environ.get("ASAPD_SOCKET"):
        return Path(given)
    from asapd.config import default_runtime_dir, default_state_dir

    is_root = os.geteuid() == 0
    state_dir = default_state_dir(os.environ, is_root)
    return default_runtime_dir(os.environ, is_root, state_dir) / "admin.sock"


def segment(name: str) -> str:
    """A name as one segment of a path."""
    return quote(name, safe="")


def _may_be_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return True  # a directory that this user may not look into


def unreachable(path: Path, error: OSError | None) -> Failure:
    """Why nobody answers at a socket, and what to do."""
    match error:
        case PermissionError():
            return Failure(Exit.FORBIDDEN, f"{path}: this user may not use the admin socket: ask for its group")
        case FileNotFoundError():
            hint = "start one with `asapd run`, or name its socket with --socket"
            if path != _SERVICE_SOCKET and _may_be_there(_SERVICE_SOCKET):
                hint = f"one that runs as a service listens at {_SERVICE_SOCKET}: name it with --socket"
            return Failure(Exit.UNREACHABLE, f"{path}: there is no daemon: {hint}")
        case ConnectionRefusedError() if not path.is_socket():
            return Failure(Exit.UNREACHABLE, f"{path}: is not a socket: name the admin socket of a daemon")
        case ConnectionRefusedError():
            return Failure(Exit.UNREACHABLE, f"{path}: the daemon that made this socket is gone: start it again")
        case None:
            return Failure(Exit.UNREACHABLE, f"{path}: the daemon does not answer in time")
    return Failure(Exit.UNREACHABLE, f"{path}: the daemon cannot be reached: {error.strerror or error}")


class Door:
    """Requests over one admin socket. Replies are JSON, numbers with a fraction as Decimal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owners: set[int] = set()
        """The users whose programs answered, as the kernel knows them; who owns the directory may swap the socket."""

    def get(self, path: str, **parameters: Any) -> Any:
        """A resource; parameters that are None are left out."""
        return self._ask("GET", path, parameters)

    def delete(self, path: str, **parameters: Any) -> Any:
        """Remove a resource."""
        return self._ask("DELETE", path, parameters)

    def post(
        self, path: str, body: dict[str, Any] | None = None, *, patience_s: float | None = None, **parameters: Any
    ) -> Any:
        """Make something; fields and parameters that are None are left out."""
        return self._ask("POST", path, parameters, {} if body is None else body, patience_s)

    def send(self, path: str, content: bytes) -> Any:
        """Hand over JSON just as it is written, because a signature covers it."""
        return self._ask("POST", path, {}, content)

    def rows(self, path: str, *, limit: int | None = None, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The rows of a list; all of them unless limited."""
        for page in self.pages(path, limit=limit, **parameters):
            yield from page["data"]

    def whole(self, path: str, **parameters: Any) -> dict[str, Any]:
        """A list as one page, with what it says beside its rows."""
        pages = list(self.pages(path, **parameters))
        rows = [row for page in pages for row in page["data"]]
        return {**pages[-1], "data": rows, "count": len(rows)}

    def pages(self, path: str, *, limit: int | None = None, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The pages of a list, with what each says beside its rows."""
        left = limit
        cursor: str | None = None
        while left is None or left > 0:
            size = PAGE if left is None else min(left, PAGE)
            page = self.get(path, limit=size, cursor=cursor, **parameters)
            yield page
            left = None if left is None else left - len(page["data"])
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def _ask(
        self,
        method: str,
        path: str,
        parameters: dict[str, Any],
        body: dict[str, Any] | bytes | None = None,
        patience_s: float | None = None,
    ) -> Any:
        import http.client
        from contextlib import closing

        import msgspec

        given = {name: value for name, value in parameters.items() if value is not None}
        content = body if isinstance(body, bytes) else None
        if isinstance(body, dict):
            sent = {name: value for name, value in body.items() if value is not None}
            content = msgspec.json.Encoder(decimal_format="number").encode(sent)
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            # One connection a request: an idle one may be closed by the daemon just when it is used again.
            with closing(http.client.HTTPConnection("asapd", timeout=READ_S)) as connection:
                connection.sock = self._connect(patience_s)
                connection.request(method, f"{path}?{urlencode(given)}" if given else path, content, headers)
                response = connection.getresponse()
                raw = response.read()
            reply = msgspec.json.Decoder(float_hook=Decimal).decode(raw)
        except TimeoutError:
            raise unreachable(self.path, None) from None
        except OSError as error:
            raise unreachable(self.path, error) from None
        except http.client.IncompleteRead:
            raise unreachable(self.path, ConnectionResetError("it ended in the middle of its answer")) from None
        except (http.client.HTTPException, msgspec.DecodeError):
            raise Failure(Exit.UNREACHABLE, f"{self.path}: what answers there is not asapd") from None
        if response.status < 400:
            return reply
        raise RefusedError(response.status, reply if isinstance(reply, dict) else {})

    def lines(self, path: str, content: bytes | None, **parameters: Any) -> Iterator[dict[str, Any]]:
        """A reply of one JSON object a line, as they come; with content it is a POST."""
        import msgspec

        _, parts = self._stream("GET" if content is None else "POST", path, parameters, content)
        rest = b""
        for part in parts:
            *whole, rest = (rest + part).split(b"\n")
            yield from map(msgspec.json.decode, whole)

    def download(self, path: str, **parameters: Any) -> tuple[dict[str, str], Iterator[bytes]]:
        """A long reply as it comes: its headers by lower-case name, and its parts, which fail when it is cut off."""
        return self._stream("GET", path, parameters)

    def made(self, path: str, patience_s: float) -> tuple[dict[str, str], Iterator[bytes]]:
        """Like `download`, of what is made first, which may take so long."""
        return self._stream("POST", path, {}, patience_s=patience_s)

    def _stream(
        self,
        method: str,
        path: str,
        parameters: dict[str, Any],
        body: bytes | None = None,
        *,
        patience_s: float | None = None,
    ) -> tuple[dict[str, str], Iterator[bytes]]:
        import http.client
        from contextlib import closing

        import msgspec

        given = {name: value for name, value in parameters.items() if value is not None}
        try:
            connection = http.client.HTTPConnection("asapd", timeout=READ_S)
            connection.sock = self._connect(patience_s)
            connection.request(method, f"{path}?{urlencode(given)}" if given else path, body)
            response = connection.getresponse()
            if response.status >= 400:
                with closing(connection), response:
                    problem = msgspec.json.decode(response.read())
                raise RefusedError(response.status, problem)
            if not response.chunked and response.length is None:  # cut off before the header that says where it ends
                response.close()
                connection.close()
                raise CutOffError(Exit.UNREACHABLE, f"{self.path}: {_CUT_OFF}")
        except TimeoutError:
            raise unreachable(self.path, None) from None
        except OSError as error:
            raise unreachable(self.path, error) from None
        except (http.client.HTTPException, msgspec.DecodeError):
            raise Failure(Exit.UNREACHABLE, f"{self.path}: what answers there is not asapd") from None

        def parts() -> Iterator[bytes]:
            try:
                while part := response.read1(1 << 16):
                    yield part
            except (OSError, http.client.HTTPException):
                raise CutOffError(Exit.UNREACHABLE, f"{self.path}: {_CUT_OFF}") from None
            finally:
                response.close()
                connection.close()

        return {name.lower(): value for name, value in response.getheaders()}, parts()

    def _connect(self, patience_s: float | None) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.settimeout(CONNECT_S)
            connected.connect(str(self.path))
            known = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            self.owners.add(_UCRED.unpack(known)[1])
            connected.settimeout(READ_S if patience_s is None else patience_s)
        except BaseException:
            connected.close()
            raise
        return connected


def _exit_of(status: int) -> Exit:
    match status:
        case 401 | 403:
            return Exit.FORBIDDEN
        case 502 | 503 | 504:
            return Exit.UNREACHABLE
        case _:
            return Exit.USAGE if status < 500 else Exit.INTERNAL


def _message(status: int, problem: dict[str, Any]) -> str:
    detail = str(problem.get("detail") or problem.get("title") or f"the daemon answered with status {status}")
    # The detail often quotes the first error; what it already says is not said twice.
    errors = [error for error in problem.get("errors") or [] if str(error.get("reason")) not in detail]
    return "\n".join([detail, *(f"  {error.get('field')}: {error.get('reason')}" for error in errors)])
