"""The demo's own daemon: a process like any other `asapd run`, in a directory that is gone afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import trio
from nacl.signing import SigningKey

from asapd.cli.demo_agent import DemoAgent
from asapd.cli.outcome import Exit
from asapd.config.values import read_bind
from asapd.wire.keys import private_pem

BREACH_WINDOW = "1m"
DELEGATOR = "urn:asap:agent:desk"
# Boot takes a second or two; the rest is for a host that is busy with other things.
BOOT_S = 30.0
STOP_S = 10.0
CLOSE_S = 1.0
# A process that has closed its connections is gone at once.
DYING_S = 1.0
# What a service manager told the demo is not meant for the daemon that the demo starts.
_SERVICE_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "CREDENTIALS_")
# sun_path holds 108 bytes with its NUL; the longest name below the directory is /run/ingest.sock.
_MAX_ROOT = 85


class DaemonFailedError(Exception):
    """The demo's daemon cannot start, or has ended. `exit_code` 2 is the caller's to mend, 70 is a bug."""

    def __init__(self, exit_code: Exit, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(eq=False)
class Daemon:
    """A running daemon, and a client with its first admin key."""

    address: str
    root: Path
    process: trio.Process
    admin: httpx2.AsyncClient

    @property
    def ingest_socket(self) -> Path:
        """Where programs of this host report usage."""
        return self.root / "run" / "ingest.sock"

    def client(self, key: str) -> httpx2.AsyncClient:
        """A client that shows a key."""
        return httpx2.AsyncClient(
            base_url=f"http://{self.address}", headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False
        )

    async def ask(self, method: str, path: str, body: object = None, **parameters: str) -> Any:
        """What a route answers to the admin.

        Raises:
            httpx2.HTTPError: no answer, or a refusal.
            DaemonFailedError: no answer, because the daemon has ended.
        """
        answer = None
        with suppress(httpx2.TransportError):
            answer = await self.admin.request(method, path, params=parameters, json=body)
        if answer is None:
            with trio.move_on_after(DYING_S):
                await self.wait_ended()
            raise httpx2.ConnectError(f"{method} {path} was not answered")
        return answer.raise_for_status().json()

    async def get(self, path: str, **parameters: str) -> Any:
        """Likewise, for GET."""
        return await self.ask("GET", path, **parameters)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Likewise, for POST."""
        return await self.ask("POST", path, body)

    async def wait_ended(self) -> None:
        """Wait for the end that nobody asked for.

        Raises:
            DaemonFailedError: always.
        """
        code = await self.process.wait()
        raise DaemonFailedError(Exit.INTERNAL, f"the daemon ended with exit code {code}: {last_words(self.root)}")


def free_address(http: str | None) -> str:
    """HOST:PORT to serve on: as asked for, or a free port of the loopback.

    Raises:
        DaemonFailedError: no such address, or it is taken.
    """
    try:
        wanted = read_bind(http or "127.0.0.1:0")
    except ValueError as error:
        raise DaemonFailedError(Exit.USAGE, f"--http {http}: {error}") from None
    if wanted.kind != "tcp" or not wanted.is_local:
        reason = "the demo speaks plain HTTP, so it takes HOST:PORT on the loopback only, such as 127.0.0.1:8727"
        raise DaemonFailedError(Exit.USAGE, f"--http {http}: {reason}")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(wanted.host, wanted.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(target)
            # Listening as well: two sockets may be bound to a port as long as neither listens.
            trial.listen()
            port = trial.getsockname()[1]
    except OSError as error:
        message = f"{http or 'a port of the loopback'} cannot be used: {error.strerror}; choose another with --http"
        raise DaemonFailedError(Exit.USAGE, message) from None
    return msgspec.structs.replace(wanted, port=port).text


def furnish(root: Path, address: str, agents: Sequence[DemoAgent]) -> None:
    """Write the configuration, the prices and the delegator's key below `root`."""
    if len(os.fsencode(root)) > _MAX_ROOT:
        raise DaemonFailedError(Exit.USAGE, f"{root} is too long a path for sockets: set TMPDIR to a shorter one")
    (root / "run").mkdir()
    keys = root / "keys"
    keys.mkdir(mode=0o700)
    key_file = keys / f"{DELEGATOR.rpartition(':')[2]}.pem"
    key_file.touch(mode=0o600)
    key_file.write_bytes(private_pem(SigningKey.generate()))
    (root / "prices.toml").write_text(_PRICES)
    rows = "".join(
        f'\n[[agents]]\nid = "{agent.part.urn}"\nurl = "{agent.url}"\npublic_key = "{agent.public_key}"\n'
        for agent in agents
    )
    (root / "asapd.toml").write_text(_CONFIG.format(address=address, window=BREACH_WINDOW) + rows)


@asynccontextmanager
async def running_daemon(root: Path, address: str) -> AsyncIterator[Daemon]:
    """Start `asapd run` on what `furnish` has written; on the way out it is stopped, and gone.

    Raises:
        DaemonFailedError: it did not start.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(_SERVICE_VARIABLES)}
    arguments = ["run", "--config", str(root / "asapd.toml"), "--state-dir", str(root / "state")]
    with (root / "asapd.log").open("wb") as log:
        # In a session of its own: Ctrl-C in the terminal is for the demo, which then stops the daemon in order.
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "asapd", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            start_new_session=True,
        )
    try:
        admin = await _wait_ready(root, address, process)
        try:
            yield Daemon(address, root, process, admin)
        finally:
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_S, shield=True):
                await admin.aclose()
    finally:
        with trio.CancelScope(deadline=trio.current_time() + 2 * STOP_S, shield=True):
            await _stop(process)


async def _wait_ready(root: Path, address: str, process: trio.Process) -> httpx2.AsyncClient:
    """A client with the admin key, once the daemon knows that key: something else on the port would not."""
    key_file = root / "state" / "admin.key"
    with trio.move_on_after(BOOT_S):
        while process.poll() is None:
            await trio.sleep(0.05)
            if not key_file.is_file() or not (key := key_file.read_text().strip()):
                continue
            admin = Daemon(address, root, process, None).client(key)  # type: ignore[arg-type]  # not asked for here
            try:
                ready = await admin.get("/readyz")
                known = await admin.get("/usage/summary")
            except httpx2.HTTPError:
                await admin.aclose()
                continue
            if ready.status_code == known.status_code == 200:
                return admin
            await admin.aclose()
    code = process.poll()
    if code is None:
        raise DaemonFailedError(Exit.INTERNAL, f"the daemon was not ready after {BOOT_S:.0f} s: {last_words(root)}")
    mendable = code == Exit.USAGE
    raise DaemonFailedError(Exit.USAGE if mendable else Exit.INTERNAL, f"the daemon did not start: {last_words(root)}")


async def _stop(process: trio.Process) -> None:
    if process.poll() is None:
        process.terminate()
    with trio.move_on_after(STOP_S):
        await process.wait()
    if process.poll() is None:
        process.kill()
    await process.wait()


def last_words(root: Path) -> str:
    """Why the daemon ended, as far as its log says so: a plain line for the operator, or its last error."""
    for line in reversed((root / "asapd.log").read_text("utf-8", "replace").splitlines()):
        try:
            entry = msgspec.json.decode(line)
        except msgspec.DecodeError:
            return line.removeprefix("asapd: ")[:500]
        if entry.get("level") in {"error", "critical"}:
            return str(entry.get("message"))[:500]
    return "its log does not say why"


_CONFIG = """\
[http]
bind = ["{address}"]
auth = "keys"

[admin]
socket = "run/admin.sock"

[ingest]
socket = "run/ingest.sock"

[metering.pricing]
file = "prices.toml"

[prober]
interval = "500ms"
timeout = "3s"
manifest_interval = "5s"

[sla]
windows = ["{window}", "1h", "24h", "7d", "30d"]
breach_window = "{window}"
min_samples = 20
evaluate_every = "500ms"

[delegation]
keys_dir = "keys"
reservation_ttl = "30s"
"""

_PRICES = """\
version = "demo"
currency = "USD"

[[price]]
model = "swift-1"
input_per_mtok = "0.40"
output_per_mtok = "1.60"

[[price]]
model = "deep-1"
input_per_mtok = "10.00"
output_per_mtok = "40.00"
"""
