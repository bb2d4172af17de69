"""A daemon to measure, the load on it, and what can be seen of it from outside."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey

from asapd.core.delegation import Claims
from asapd.core.types import DAY_US, SECOND_US
from asapd.wire.token import sign
from tests.bench.load import http_exchange

ROOT, MIDDLE, LEAF = (f"urn:asap:agent:{name}" for name in ("root", "middle", "leaf"))
KEYS = {ROOT: SigningKey(b"r" * 32), MIDDLE: SigningKey(b"m" * 32)}


@dataclass
class Daemon:
    """A running daemon, and how to reach it."""

    port: int
    lane: int
    """The port of the fast lane."""
    socket: Path
    key: str
    pid: int

    def get(self, path: str) -> tuple[float, bytes]:
        """Seconds that a GET took, and its body."""
        with socket.create_connection(("127.0.0.1", self.port)) as sock:
            start_s = time.perf_counter()
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n\r\n"
            status, body = http_exchange(sock, request.encode())
            seconds = time.perf_counter() - start_s
        if status != 200:
            raise SystemExit(f"GET {path}: {status} {body!r}")
        return seconds, body

    def lag(self) -> Counter[float]:
        """How many looks at the event loop found it no later than each bound, in seconds."""
        _, text = self.get("/metrics")
        found: Counter[float] = Counter()
        for line in text.decode().splitlines():
            if line.startswith("asapd_loop_lag_seconds_bucket"):
                found[float(line.split('"')[1])] = round(float(line.split()[1]))
        return found

    def resident_bytes(self) -> int:
        """Memory of the daemon, its writer not counted."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def lag_p99_ms(before: Counter[float], after: Counter[float]) -> float:
    """The bound that 99 of 100 looks between two readings stayed within; infinite above the last bound."""
    looks = after[inf] - before[inf]
    return next(bound * 1000 for bound in sorted(after) if after[bound] - before[bound] >= 0.99 * looks)


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(directory: Path) -> Iterator[Daemon]:
    """A daemon with durable commits in a directory of its own."""
    port, lane = free_port(), free_port()
    public = {agent: base64.b64encode(bytes(key.verify_key)).decode() for agent, key in KEYS.items()}
    (directory / "asapd.toml").write_text(
        f'[http]\nbind = ["127.0.0.1:{port}"]\n[ingest]\nbind = ["127.0.0.1:{lane}"]\n[store]\nsynchronous = "full"\n'
        f'[delegation]\nroots = ["{ROOT}"]\n'
        + "".join(
            f'[[agents]]\nid = "{agent}"\nurl = "http://127.0.0.1:9"\npublic_key = "{key}"\n'
            for agent, key in public.items()
        )
        + '[prober]\ninterval = "1h"\n',
        encoding="utf-8",
    )
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
        yield Daemon(
            port, lane, directory / "run" / "ingest.sock", (state / "admin.key").read_text().strip(), process.pid
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait_ready(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Return once the daemon serves; its log is in the directory."""
    for _ in range(600):
        if b"serving on" in (directory / "log").read_bytes():
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit(f"the daemon did not start: {(directory / 'log').read_text()}")


def load(directory: Path, **job: Any) -> dict[str, Any]:
    """Run a job in a load process, and return what it measured."""
    with loading(directory, **job) as measured:
        pass
    return measured


@contextmanager
def loading(directory: Path, **job: Any) -> Iterator[dict[str, Any]]:
    """Run a job in a load process beside what happens inside; at the end the value holds what it measured."""
    description = directory / f"job-{job['kind']}.json"
    description.write_text(json.dumps(job))
    os.sync()  # or it pays for what was written before it
    command = [sys.executable, "-m", "tests.bench.load", f"@{description}"]
    measured: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        yield measured
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the load ended with {process.returncode}")
    measured |= json.loads(out)
    if measured["failed"]:
        raise SystemExit(f"refused under load: {measured['failed']}")


def chain() -> str:
    """A token of depth two that allows much."""
    now_us = int(time.time()) * SECOND_US
    terms = (None, 10**12, now_us, now_us + DAY_US)
    parent = sign(Claims("bench-root", ROOT, MIDDLE, ("task.*",), *terms), KEYS[ROOT])
    return sign(Claims("bench-leaf", MIDDLE, LEAF, ("task.*",), *terms), KEYS[MIDDLE], parent=parent)
