"""What probing costs: `python -m tests.bench.probing [--agents 2000] [--ports 2000] [--seconds 60]`.

A bare server plays all agents, on as many ports; the daemon has them in its configuration and probes them every 30 s.
What is measured is the processor time of the daemon and its writer together, as a share of one core, once every agent
was seen healthy and its manifest is stored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.daemon import free_port, wait_ready

TICKS = os.sysconf("SC_CLK_TCK")


class _Agent(asyncio.Protocol):
    """Answers whole requests, whoever is asked for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.received.endswith(b"\r\n\r\n"):
            return
        path = self.received.split(b" ", 2)[1].decode()
        self.received = b""
        agent = f"urn:asap:agent:a{path.split('/')[1]}"
        document = (
            {"id": agent, "name": "a", "version": "1", "sla": {"availability": "99%"}, "ttl_seconds": 300}
            if path.endswith("manifest.json")
            else {"status": "healthy", "agent_id": agent, "agent_status": "READY"}
        )
        body = json.dumps(document).encode()
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def _serve(ports: int) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(_Agent, "127.0.0.1", 0, backlog=1000) for _ in range(ports)]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    await asyncio.sleep(3600)


@contextmanager
def fake_agents(ports: int) -> Iterator[list[int]]:
    """A server on so many ports of loopback; ends with the block."""
    command = [sys.executable, "-m", "tests.bench.probing", "--serve", "--ports", str(ports)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            found: list[int] = json.loads(process.stdout.readline())
            yield found
        finally:
            process.terminate()


@contextmanager
def daemon(directory: Path, agents: int, ports: list[int], more: str = "") -> Iterator[tuple[int, int, str]]:
    """A daemon with so many agents: its pid, its port and its key."""
    port = free_port()
    listed = "".join(
        f'[[agents]]\nid = "urn:asap:agent:a{number}"\nurl = "http://127.0.0.1:{ports[number % len(ports)]}/{number}"\n'
        for number in range(agents)
    )
    text = f'[http]\nbind = ["127.0.0.1:{port}"]\n[prober]\ninterval = "30s"\n{more}{listed}'
    (directory / "asapd.toml").write_text(text, encoding="utf-8")
    state = directory / "state"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "asapd", "run"),
                *("--config", str(directory / "asapd.toml"), "--state-dir", str(state)),
            ],
            env={**os.environ, "RUNTIME_DIRECTORY": str(directory / "run")},
            stderr=log,
        )
    try:
        wait_ready(process, directory)
        yield process.pid, port, (state / "admin.key").read_text().strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def cpu_s(pid: int) -> float:
    """Processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def get(port: int, key: str, path: str) -> dict[str, object]:
    """What a route of the daemon answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def writer_of(port: int, key: str) -> int:
    """The pid of the daemon's writer."""
    store = get(port, key, "/status")["store"]
    assert isinstance(store, dict)
    pid: int = store["writer_pid"]
    return pid


def wait_settled(port: int, key: str, agents: int) -> None:
    """Return once every agent is healthy."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        last = get(port, key, f"/agents/urn:asap:agent:a{agents - 1}")
        page = get(port, key, "/agents?state=unknown&limit=1")
        if last["state"] == "healthy" and page["count"] == 0 and last["manifest"] is not None:
            return
        time.sleep(1)
    raise SystemExit(f"not all agents are healthy after two minutes: {page}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.probing", description=__doc__)
    parser.add_argument("--agents", type=int, default=2000)
    parser.add_argument("--ports", type=int, default=2000, help="on how many ports of loopback the agents listen")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(options.ports))
        return
    with tempfile.TemporaryDirectory() as made, fake_agents(options.ports) as ports:
        directory = Path(made)
        with daemon(directory, options.agents, ports) as (pid, port, key):
            wait_settled(port, key, options.agents)
            # Two intervals, so that what the start brought is over and connections are as they stay.
            time.sleep(60)
            writer = writer_of(port, key)
            before, began_s = (cpu_s(pid), cpu_s(writer)), time.monotonic()
            time.sleep(options.seconds)
            took_s = time.monotonic() - began_s
            used = [cpu_s(one) - was for one, was in zip((pid, writer), before, strict=True)]
            down = get(port, key, "/agents?state=unhealthy&limit=1")["count"]
    shares = [100 * each / took_s for each in used]
    print(f"{options.agents} agents on {len(ports)} ports, probed every 30 s, over {took_s:.0f} s")
    print(f"daemon {shares[0]:.1f} %, writer {shares[1]:.1f} %, together {sum(shares):.1f} % of one core")
    print(f"agents down: {down}")


if __name__ == "__main__":
    main()
