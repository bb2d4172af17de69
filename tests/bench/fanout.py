"""How soon subscribers hear of a breach: `python -m tests.bench.fanout [--quick]`.

To the frame at the subscriber, by the one clock of this host: from before the commit of the tipping event (its
`recorded_at`), from its answer, which follows the commit by the way through the door, and from the detection
(`detected_at` of the breach, before its commit); with one subscriber, and with a thousand of which fifty never read, to
the last of those that do. Beside it run 200 events a second, and in a third case, with one subscriber, arrays of a
thousand, one after the other.
"""

from __future__ import annotations

import base64
import json
import selectors
import socket
import sys
import threading
import time
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path

from tests.e2e.daemon import Daemon, running

SUBSCRIBERS, SILENT = 1_000, 50
LOAD_EVERY_S, LOAD_EVENTS = 0.05, 10
# The first probes of all agents are another load.
SETTLE_S = 5.0


def settings(agents: int) -> str:
    """A daemon where one slow task breaks an agent's promise."""
    head = """
[http]
bind = ["127.0.0.1:0"]
[prober]
interval = "1h"
[sla]
min_samples = 1
default_tier = "fast"
[[sla.tier]]
name = "fast"
max_latency_p95_ms = 500
"""
    return head + "".join(f'[[agents]]\nid = "{urn(n)}"\nurl = "http://127.0.0.1:9"\n' for n in range(agents))


def urn(number: int) -> str:
    """One agent, which breaks its promise once."""
    return f"urn:asap:agent:bench-{number}"


def subscriber(daemon: Daemon, *, small: bool = False) -> socket.socket:
    """A WebSocket that has subscribed, its handshake and answer read."""
    sock = socket.socket()
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", daemon.port))
    key = base64.b64encode(b"0123456789abcdef").decode()
    head = (
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{daemon.port}\r\nAuthorization: Bearer {daemon.admin_key}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {key}\r\n\r\n"
    )
    text = b'{"jsonrpc":"2.0","id":1,"method":"sla.subscribe"}'
    sock.sendall(head.encode())
    _read_until(sock, b"\r\n\r\n")
    # A text frame with a mask of zeros, RFC 6455, section 5.2.
    sock.sendall(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
    _read_until(sock, b'"subscribed":true')
    return sock


def _read_until(sock: socket.socket, wanted: bytes) -> None:
    received = b""
    while wanted not in received:
        part = sock.recv(65_536)
        if not part:
            raise SystemExit(f"a subscriber was not let in: {received!r}")
        received += part


def post(connection: HTTPConnection, key: str, events: list[dict[str, object]]) -> None:
    """Record events."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/usage", json.dumps(events).encode(), headers)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 201:
        raise SystemExit(f"{answer.status} {body!r}")


def event(agent: str, name: str, duration_ms: int) -> dict[str, object]:
    """One task's usage."""
    return {
        "id": name,
        "task_id": name,
        "agent": agent,
        "consumer": "urn:asap:agent:desk",
        "timestamp": time.time(),
        "metrics": {"duration_ms": duration_ms},
    }


def load(daemon: Daemon, stop: threading.Event, every_s: float, count: int) -> None:
    """Work that breaks nothing, until told to stop."""
    connection, sent = HTTPConnection("127.0.0.1", daemon.port), 0
    while not stop.wait(every_s):
        post(connection, daemon.admin_key, [event(f"{urn(0)}-busy", f"l{sent + n}", 5) for n in range(count)])
        sent += count


def one_alert(daemon: Daemon, number: int, selector: selectors.BaseSelector, count: int) -> tuple[float, ...]:
    """Have one agent break its promise; seconds until the last of so many subscribers has the frame, from each."""
    connection = HTTPConnection("127.0.0.1", daemon.port)
    post(connection, daemon.admin_key, [event(urn(number), f"tip{number}", 900)])
    answered_s = time.time()
    waiting, wanted, last_s = count, urn(number).encode() + b'"', 0.0
    while waiting:
        ready = selector.select(20)
        if not ready:
            raise SystemExit(f"{waiting} subscribers heard nothing for 20 s")
        for key, _ in ready:
            data = key.fileobj.recv(65_536)  # type: ignore[union-attr]  # only sockets are registered
            if not data:
                raise SystemExit("a subscriber was let go")
            if wanted in data:
                waiting -= 1
                last_s = time.time()
    headers = {"Authorization": f"Bearer {daemon.admin_key}"}
    since = [last_s - answered_s]
    for path, field in (
        (f"/usage?agent={urn(number)}", "recorded_at"),
        (f"/sla/breaches?agent_id={urn(number)}", "detected_at"),
    ):
        connection.request("GET", path, headers=headers)
        (row,) = json.loads(connection.getresponse().read())["data"]
        since.append(last_s - datetime.fromisoformat(row[field]).timestamp())
    connection.close()
    return tuple(since)


def resident_mib(pid: int) -> float:
    """Memory of the daemon."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def measure(readers: int, silent: int, alerts: int, every_s: float = LOAD_EVERY_S, count: int = LOAD_EVENTS) -> None:
    """One daemon, its subscribers, and what they say."""
    with running(settings(alerts + 1)) as daemon, selectors.DefaultSelector() as selector:
        stop = threading.Event()
        worker = threading.Thread(target=load, args=(daemon, stop, every_s, count))
        quiet = [subscriber(daemon, small=True) for _ in range(silent)]
        sockets = [subscriber(daemon) for _ in range(readers)]
        for sock in sockets:
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ)
        worker.start()
        time.sleep(SETTLE_S)
        before = resident_mib(daemon.pid)
        try:
            took = []
            for number in range(1, alerts + 1):
                took.append(one_alert(daemon, number, selector, readers))
                time.sleep(0.05)
            after = resident_mib(daemon.pid)
        finally:
            stop.set()
            worker.join()
            for sock in (*quiet, *sockets):
                sock.close()
    figures = {
        "subscribers": readers,
        "events_beside_s": None if not every_s else round(count / every_s),
        "silent": silent,
        "alerts": alerts,
        **{
            f"from_{what}_ms": _spread(list(seconds))
            for what, seconds in zip(("answer", "event", "detection"), zip(*took, strict=True), strict=True)
        },
        "resident_mib": [round(before, 1), round(after, 1)],
    }
    print(json.dumps(figures))


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"p50": len(ordered) // 2, "p99": int(len(ordered) * 0.99), "max": len(ordered) - 1}
    return {name: round(ordered[min(index, len(ordered) - 1)] * 1000, 1) for name, index in at.items()}


def main() -> None:
    """All three cases."""
    is_quick = "--quick" in sys.argv
    measure(1, 0, 20 if is_quick else 200)
    measure(SUBSCRIBERS - SILENT, SILENT, 5 if is_quick else 60)
    measure(1, 0, 5 if is_quick else 60, every_s=0.0, count=1_000)


if __name__ == "__main__":
    main()
