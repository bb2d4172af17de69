"""A daemon in a process of its own, started, watched, stopped and killed as an operator or a power cut would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from decimal import Decimal
from http.client import HTTPConnection
from json import dumps
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import httpx2
import trio
from trio_websocket import WebSocketConnection, wrap_client_stream

T = TypeVar("T")

# How long anything that is expected may take on a busy machine with two cores.
PATIENCE_S = 60.0
POLL_S = 0.02

QUICK = """
[http]
bind = ["127.0.0.1:0"]
[prober]
interval = "200ms"
timeout = "1s"
jitter = "0%"
manifest_interval = "200ms"
[sla]
breach_window = "1m"
evaluate_every = "50ms"
"""
"""Sections that make a daemon on a free port, with short intervals."""


def command(config: Path | None, state_dir: Path) -> list[str]:
    """The command line of a daemon."""
    named = [] if config is None else ["--config", str(config)]
    return [sys.executable, "-m", "asapd", "run", *named, "--state-dir", str(state_dir)]


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket, which is closed even when nobody is there."""

    def __init__(self, path: Path) -> None:
        super().__init__("asapd", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Daemon:
    """One state directory, its configuration, and the process that serves it now."""

    def __init__(self, config: str = QUICK, under: Sequence[str] = ()) -> None:
        """With `under`, a command that becomes the one behind it."""
        self._under = under
        # Short, because the path of a Unix socket has 107 bytes at most.
        self.home = Path(tempfile.mkdtemp(prefix="asapd-"))
        self.config = self.home / "asapd.toml"
        self.config.write_text(config)
        self.state_dir = self.home / "state"
        self.runtime_dir = self.home / "run"
        self.stderr = self.home / "stderr"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    # --- life

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process without waiting for it."""
        environ = {name: value for name, value in os.environ.items() if name not in {"NOTIFY_SOCKET", "WATCHDOG_USEC"}}
        environ["RUNTIME_DIRECTORY"] = str(self.runtime_dir)
        with self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*self._under, *command(self.config, self.state_dir)],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                env=environ,
            )
        return self.process

    def start(self) -> Daemon:
        """Start and wait until it says that it is ready."""
        process = self.spawn()
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None, f"the daemon ended with {process.returncode}: {self.stderr.read_text()}"
            with contextlib.suppress(OSError):
                if self.admin_get("/readyz").status_code == 200:
                    break
            assert time.monotonic() < deadline_s, f"not ready: {self.stderr.read_text()}"
            time.sleep(POLL_S)
        self.url = next(one for one in self.status()["listening"] if one.startswith("http"))
        return self

    def listens(self) -> bool:
        """Whether the admin socket takes connections."""
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.runtime_dir / "admin.sock")) == 0

    def stop(self, *, within_s: float = PATIENCE_S) -> None:
        """SIGTERM, and it has to end with 0."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(within_s) == 0, self.stderr.read_text()
        self.process = None

    def kill(self) -> None:
        """SIGKILL to the daemon alone; its writer process ends a moment later by itself."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def kill_writer(self) -> int:
        """SIGKILL to the writer process alone; its pid."""
        pid: int = self.status()["store"]["writer_pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def close(self) -> None:
        """End whatever still runs and remove the directory."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        rmtree(self.home, ignore_errors=True)

    # --- looking in

    @property
    def pid(self) -> int:
        """The daemon's pid."""
        assert self.process is not None
        return self.process.pid

    @property
    def port(self) -> int:
        """The port of the HTTP door."""
        return int(self.url.rpartition(":")[2])

    @property
    def admin_key(self) -> str:
        """The first API key."""
        return (self.state_dir / "admin.key").read_text().strip()

    def admin_request(self, method: str, path: str, *, json: object = None) -> httpx2.Response:
        """One request over the admin socket."""
        with contextlib.closing(_UnixConnection(self.runtime_dir / "admin.sock")) as connection:
            headers = {} if json is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if json is None else dumps(json), headers)
            answer = connection.getresponse()
            return httpx2.Response(answer.status, headers=answer.getheaders(), content=answer.read())

    def admin_get(self, path: str) -> httpx2.Response:
        """One GET over the admin socket."""
        return self.admin_request("GET", path)

    def status(self) -> dict[str, Any]:
        """What `/status` says."""
        found: dict[str, Any] = self.admin_get("/status").json()
        return found

    def create_key(self, role: str, *agents: str, **more: Any) -> str:
        """A new API key."""
        body = {"name": f"{role}-{time.monotonic_ns()}", "role": role, "agents": list(agents) or ["*"], **more}
        made = self.admin_request("POST", "/keys", json=body)
        assert made.status_code == 201, made.text
        key: str = made.json()["key"]
        return key

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log so far, each of which has to be JSON."""
        return [json.loads(line) for line in self.stderr.read_text().splitlines()]

    def client(self, key: str | None = None, **options: Any) -> httpx2.AsyncClient:
        """A client over TCP, with the admin key unless another is given; an empty one sends none."""
        key = self.admin_key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Reading the authorities' certificates takes longer than all the rest of a test, and nothing here is TLS.
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=30, verify=False, **options)

    @contextlib.asynccontextmanager
    async def websocket(self, **options: Any) -> AsyncIterator[WebSocketConnection]:
        """A WebSocket, whose stream is closed whatever becomes of the daemon."""
        host = self.url.removeprefix("http://")
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream, trio.open_nursery() as nursery:
            connection = await wrap_client_stream(nursery, stream, host, "/ws", **options)
            try:
                yield connection
            finally:
                with trio.move_on_after(1, shield=True):
                    await connection.aclose()
                nursery.cancel_scope.cancel()

    async def raw(self, request: bytes, *, until: bytes | None = None) -> tuple[int, bytes]:
        """Send bytes and read until the daemon closes, or until something came: the status, and all that came."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            received = b""
            with trio.fail_after(PATIENCE_S), contextlib.suppress(trio.BrokenResourceError):
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(request)
                async for chunk in stream:
                    received += chunk
                    if until is not None and until in received:
                        break
        return int(received.split(b" ", 2)[1]) if received else 0, received

    def ingest_client(self) -> httpx2.AsyncClient:
        """A client over the ingest socket."""
        transport = httpx2.AsyncHTTPTransport(uds=str(self.runtime_dir / "ingest.sock"), verify=False)
        return httpx2.AsyncClient(transport=transport, base_url="http://asapd", timeout=30)


@contextlib.contextmanager
def running(config: str = QUICK) -> Iterator[Daemon]:
    """A daemon that is ready; it has to stop cleanly if it is still running at the end."""
    daemon = Daemon(config)
    try:
        yield daemon.start()
        if daemon.process is not None:
            daemon.stop()
    finally:
        daemon.close()


def exact(response: httpx2.Response) -> Any:
    """A JSON body with its numbers as they are written."""
    return json.loads(response.text, parse_float=Decimal)


async def until(probe: Callable[[], Any], *, within_s: float = PATIENCE_S) -> Any:
    """What an async function returns, once that is true."""
    with trio.fail_after(within_s):
        while not (found := await probe()):  # noqa: ASYNC110 -- another process's state sets no event here
            await trio.sleep(POLL_S)
    return found


async def every_page(client: httpx2.AsyncClient, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """All rows of a list, page by page."""
    rows: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        more = {} if cursor is None else {"cursor": cursor}
        page = await client.get(path, params={**parameters, **more})
        assert page.status_code == 200, page.text
        body = exact(page)
        assert body["count"] == len(body["data"])
        rows += body["data"]
        cursor = body["next_cursor"]
        if cursor is None:
            return rows


def check_problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a refusal, in the form of RFC 9457."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert document["code"] == code
    assert document["type"]
    assert document["title"]
    assert document["detail"]
    return document
