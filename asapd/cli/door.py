"""The daemon as asapctl sees it: HTTP over the admin socket, every failure with its exit code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from asapd.cli.outcome import Exit, Failure

# The daemon answers within 30 s or says why not; only a walk of a long audit log takes longer.
READ_S = 60.0
CONNECT_S = 5.0
PAGE = 1000
_SERVICE_SOCKET = Path("/run/asapd/admin.sock")


class RefusedError(Failure):
    """The daemon said no; `problem` is its problem document."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(_exit_of(status), _message(status, problem))
        self.status = status
        self.problem = problem


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


def unreachable(socket: Path, error: OSError | None) -> Failure:
    """Why nobody answers at a socket, and what to do."""
    match error:
        case PermissionError():
            return Failure(Exit.FORBIDDEN, f"{socket}: this user may not use the admin socket: ask for its group")
        case FileNotFoundError():
            hint = "start one with `asapd run`, or name its socket with --socket"
            if socket != _SERVICE_SOCKET and _SERVICE_SOCKET.exists():
                hint = f"one that runs as a service listens at {_SERVICE_SOCKET}: name it with --socket"
            return Failure(Exit.UNREACHABLE, f"{socket}: there is no daemon: {hint}")
        case ConnectionRefusedError():
            return Failure(Exit.UNREACHABLE, f"{socket}: the daemon that made this socket is gone: start it again")
        case None:
            return Failure(Exit.UNREACHABLE, f"{socket}: the daemon does not answer in time")
    return Failure(Exit.UNREACHABLE, f"{socket}: the daemon cannot be reached: {error.strerror or error}")


class Door:
    """Requests over one admin socket. Replies are JSON, numbers with a fraction as Decimal."""

    def __init__(self, socket: Path) -> None:
        import httpx2

        self.socket = socket
        transport = httpx2.HTTPTransport(uds=str(socket), verify=False)  # noqa: S501 -- a Unix socket has no TLS
        timeout = httpx2.Timeout(READ_S, connect=CONNECT_S)
        self._client = httpx2.Client(transport=transport, base_url="http://asapd", timeout=timeout, trust_env=False)

    def __enter__(self) -> Door:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """A resource; parameters that are None are left out."""
        return self._ask("GET", path, parameters)

    def delete(self, path: str, **parameters: Any) -> Any:
        """Remove a resource."""
        return self._ask("DELETE", path, parameters)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Make something; fields that are None are left out."""
        return self._ask("POST", path, {}, {} if body is None else body)

    def rows(self, path: str, *, limit: int | None = None, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The rows of a list, page by page; all of them unless limited."""
        left = limit
        cursor: str | None = None
        while left is None or left > 0:
            size = PAGE if left is None else min(left, PAGE)
            page = self.get(path, limit=size, cursor=cursor, **parameters)
            yield from page["data"]
            left = None if left is None else left - len(page["data"])
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def _ask(self, method: str, path: str, parameters: dict[str, Any], body: dict[str, Any] | None = None) -> Any:
        import httpx2
        import msgspec

        given = {name: value for name, value in parameters.items() if value is not None}
        sent = None if body is None else {name: value for name, value in body.items() if value is not None}
        content = None if sent is None else msgspec.json.Encoder(decimal_format="number").encode(sent)
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            response = self._client.request(method, path, params=given, content=content, headers=headers)
        except httpx2.TimeoutException:
            raise unreachable(self.socket, None) from None
        except httpx2.TransportError as error:
            raise unreachable(self.socket, _cause(error)) from None
        try:
            reply = msgspec.json.decode(response.content, float_hook=Decimal)
        except msgspec.DecodeError:
            raise Failure(Exit.UNREACHABLE, f"{self.socket}: what answers there is not asapd") from None
        if response.is_success:
            return reply
        raise RefusedError(response.status_code, reply if isinstance(reply, dict) else {})


def _cause(error: BaseException) -> OSError:
    """The operating system's error below a library's."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError):
            return below
        below = below.__cause__ or below.__context__
    return OSError(str(error) or "the connection was closed")


def _exit_of(status: int) -> Exit:
    match status:
        case 401 | 403:
            return Exit.FORBIDDEN
        case 502 | 503 | 504:
            return Exit.UNREACHABLE
        case _:
            return Exit.USAGE if status < 500 else Exit.INTERNAL


def _message(status: int, problem: dict[str, Any]) -> str:
    lines = [str(problem.get("detail") or problem.get("title") or f"the daemon answered with status {status}")]
    errors = problem.get("errors") or []
    if len(errors) > 1:
        lines += [f"  {error.get('field')}: {error.get('reason')}" for error in errors]
    return "\n".join(lines)
