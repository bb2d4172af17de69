"""`asapd demo` from the outside: what a newcomer sees first."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

DEMO = (sys.executable, "-m", "asapd", "demo")
END_S = 90


class Room:
    """Where a demo puts its directory, and the demos started there. The path is short, since those of sockets are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*DEMO, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.path)},
        )
        self.started.append(process)
        return process


@pytest.fixture
def room() -> Iterator[Room]:
    found = Room(Path(tempfile.mkdtemp(prefix="d", dir="/tmp")))
    yield found
    for process in found.started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=END_S)
    found.path.rmdir()  # which fails when anything was left behind


def processes_of(room: Room) -> list[str]:
    """Command lines of processes that were started in a directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environ = (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(room.path) in line or f"TMPDIR={room.path}\0".encode() in environ:
            found.append(line)
    return found


def read_until(process: subprocess.Popen[str], *wanted: str) -> str:
    """What it says until all of that was in it, in whatever order."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if all(one in seen for one in wanted):
            return seen
    raise AssertionError(f"not all of {wanted!r} in {seen}")


def test_demo_shows_the_main_job_and_leaves_nothing_behind(room: Room) -> None:
    process = room.start()
    told = read_until(process, "BREACH", '"method":"sla.breach"', "may not start")
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=END_S)
    out = told + rest
    assert process.returncode == 0, err
    assert err == ""
    assert re.search(r"dashboard +http://127\.0\.0\.1:\d+/", out)
    breach = re.search(r"^ *([\d.]+)s  BREACH +summarizer broke its promise: p95 latency", out, re.MULTILINE)
    assert breach is not None, out
    assert float(breach[1]) < 60  # as the README says
    assert '"method":"sla.breach","params":{"event":"opened"' in out
    assert re.search(r"refused +analyst may not start .*: (insufficient_budget|budget_exhausted)", out)
    assert re.search(r"^delegation .* authorizations refused: \d+ x ", out, re.MULTILINE)
    assert re.search(r"audit +verified: \d+ entries intact", out)
    assert "BROKEN" not in out
    # In a pipe there is nothing but text.
    assert "\x1b" not in out
    assert processes_of(room) == []


def test_demo_ends_in_order_on_ctrl_c(room: Room) -> None:
    process = room.start()
    read_until(process, "delegation")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=END_S)
    assert process.returncode == 0, err
    assert err == ""
    assert "left behind   nothing" in out
    assert processes_of(room) == []


def test_demo_that_is_stopped_while_it_starts_leaves_nothing_behind(room: Room) -> None:
    process = room.start()
    read_until(process, "analyst at")
    process.terminate()
    _, err = process.communicate(timeout=END_S)
    assert process.returncode == 0, err
    assert processes_of(room) == []


def test_demo_whose_reader_leaves_ends_and_leaves_nothing_behind(room: Room) -> None:
    process = room.start()
    read_until(process, "dashboard")
    assert process.stdout is not None
    process.stdout.close()
    # As a shell counts SIGPIPE.
    assert process.wait(timeout=END_S) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert processes_of(room) == []


def test_demo_serves_where_it_is_told(room: Room) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = room.start("--http", f"127.0.0.1:{port}")
    read_until(process, f"http://127.0.0.1:{port}/")
    process.terminate()
    _, err = process.communicate(timeout=END_S)
    assert process.returncode == 0, err


def test_demo_on_a_taken_port_says_so_in_one_line(room: Room) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = room.start("--http", address, "--seconds", "5")
        _, err = process.communicate(timeout=END_S)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert address in err


@pytest.mark.parametrize("address", ["nonsense", "0.0.0.0:0", "unix:x.sock", "127.0.0.1:99999"])
def test_demo_refuses_an_address_that_is_not_a_port_of_the_loopback(room: Room, address: str) -> None:
    process = room.start("--http", address, "--seconds", "5")
    _, err = process.communicate(timeout=END_S)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert address in err


def test_demo_says_what_the_daemon_said_when_it_ends_by_itself(room: Room) -> None:
    process = room.start()
    seen = read_until(process, "asapd run is ready")
    found = re.search(r"pid (\d+)", seen)
    assert found is not None
    os.kill(int(found[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=END_S)
    assert process.returncode == 70
    assert len(err.splitlines()) == 1
    assert "the daemon ended with exit code -9" in err
    assert processes_of(room) == []
