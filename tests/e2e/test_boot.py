"""How the daemon refuses to start, how it stops, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import trio

from tests.e2e.daemon import PATIENCE_S, QUICK, Daemon, command, running


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """One that was not started."""
    made = Daemon()
    try:
        yield made
    finally:
        made.close()


def refused(daemon: Daemon, **environ: str) -> list[str]:
    """Start it, expect exit 2, and return the lines on stderr that are not log lines."""
    ended = subprocess.run(
        command(daemon.config, daemon.state_dir),
        env={**os.environ, "RUNTIME_DIRECTORY": str(daemon.runtime_dir), **environ},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    return [line for line in ended.stderr.splitlines() if not line.startswith("{")]


def test_a_taken_port_is_named(daemon: Daemon) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        daemon.config.write_text(QUICK.replace(":0", f":{port}"))
        (line,) = refused(daemon)
        assert f"127.0.0.1:{port}" in line


def test_a_database_of_a_newer_program_is_left_alone(daemon: Daemon) -> None:
    daemon.start()
    daemon.stop()
    database = daemon.state_dir / "asapd.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA user_version = 999")
        connection.commit()
    before = database.read_bytes()
    (line,) = refused(daemon)
    assert "999" in line
    assert "newer" in line
    assert database.read_bytes() == before


def test_a_database_of_another_program_is_left_alone(daemon: Daemon) -> None:
    daemon.state_dir.mkdir()
    database = daemon.state_dir / "asapd.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
        connection.commit()
    before = database.read_bytes()
    (line,) = refused(daemon)
    assert str(database) in line
    assert database.read_bytes() == before


def test_a_file_that_is_no_database_is_left_alone(daemon: Daemon) -> None:
    content = b"this is no database, only text"
    daemon.state_dir.mkdir()
    database = daemon.state_dir / "asapd.db"
    database.write_bytes(content)
    (line,) = refused(daemon)
    assert str(database) in line
    assert database.read_bytes() == content


def test_every_problem_of_a_configuration_has_a_line(daemon: Daemon) -> None:
    daemon.config.write_text('[http]\nbind = ["nowhere"]\nsurprise = 1\n[sla]\nhold = 5\n')
    lines = refused(daemon)
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{daemon.config}:2", "http.bind[0]"],
        [f"{daemon.config}:3", "http.surprise"],
        [f"{daemon.config}:5", "sla.hold"],
    ]


def test_a_configuration_that_is_not_there_is_named(daemon: Daemon) -> None:
    daemon.config.unlink()
    (line,) = refused(daemon)
    assert str(daemon.config) in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_configuration_that_cannot_be_read_is_named(daemon: Daemon) -> None:
    daemon.config.chmod(0)
    (line,) = refused(daemon)
    assert str(daemon.config) in line


def test_no_auth_is_for_loopback_only(daemon: Daemon) -> None:
    daemon.config.write_text('[http]\nbind = ["0.0.0.0:0"]\nauth = "none"\n')
    lines = refused(daemon)
    assert any('auth = "none"' in line for line in lines)


def test_plain_http_is_for_loopback_only(daemon: Daemon) -> None:
    daemon.config.write_text('[http]\nbind = ["0.0.0.0:0"]\n')
    (line,) = refused(daemon)
    assert "http.tls" in line


def test_a_state_directory_that_is_a_file_is_named(daemon: Daemon) -> None:
    daemon.state_dir.write_text("")
    assert str(daemon.state_dir) in refused(daemon)[-1]


def test_an_identity_key_that_is_none_is_named(daemon: Daemon) -> None:
    daemon.state_dir.mkdir()
    (daemon.state_dir / "identity.pem").write_text("nonsense")
    (line,) = refused(daemon)
    assert "identity.pem" in line
    assert (daemon.state_dir / "identity.pem").read_text() == "nonsense"


def test_a_second_daemon_on_the_same_state_names_the_first() -> None:
    with running() as first:
        lines = refused(first, RUNTIME_DIRECTORY=str(first.home / "other"))
        assert len(lines) == 1
        assert f"pid {first.pid}" in lines[0]
        assert first.status()["ready"] is True


def test_a_second_daemon_with_the_same_sockets_does_not_take_them() -> None:
    with running() as first:
        second = Daemon()
        try:
            (line,) = refused(second, RUNTIME_DIRECTORY=str(first.runtime_dir))
            assert "admin.sock" in line
            assert first.status()["pid"] == first.pid
        finally:
            second.close()


def test_it_runs_without_any_configuration(daemon: Daemon) -> None:
    """On the default port, so only where nobody has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if probe.connect_ex(("127.0.0.1", 8727)) == 0:
            pytest.skip("somebody serves port 8727")
    process = subprocess.Popen(
        command(None, daemon.state_dir),
        env={**os.environ, "RUNTIME_DIRECTORY": str(daemon.runtime_dir)},
        stderr=subprocess.DEVNULL,
    )
    daemon.process = process
    deadline_s = time.monotonic() + PATIENCE_S
    while not (daemon.runtime_dir / "ingest.sock").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    status: dict[str, Any] = daemon.status()
    assert "http://127.0.0.1:8727" in status["listening"]
    assert status["config"]["path"] is None
    daemon.stop()


def test_the_first_start_makes_a_key_for_the_operator_alone_and_never_logs_it() -> None:
    with running() as daemon:
        for name in ("admin.key", "identity.pem", "asapd.db", "asapd.lock"):
            assert stat.S_IMODE((daemon.state_dir / name).stat().st_mode) == 0o600, name
        assert stat.S_IMODE(daemon.state_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((daemon.runtime_dir / "admin.sock").stat().st_mode) == 0o660
        key = daemon.admin_key
        messages = [line["message"] for line in daemon.log()]
        assert any(str(daemon.state_dir / "admin.key") in message for message in messages)
        identity = (daemon.state_dir / "identity.pem").read_bytes()
        daemon.stop()
        daemon.start()
        assert daemon.admin_key == key
        assert (daemon.state_dir / "identity.pem").read_bytes() == identity
        log = daemon.stderr.read_text()
        assert key not in log
        assert key.rpartition("_")[2] not in log
        for line in daemon.log():
            assert {"time", "level", "logger", "message"} <= line.keys()


def test_sockets_are_gone_after_a_stop_and_stale_ones_are_replaced(daemon: Daemon) -> None:
    daemon.start()
    daemon.kill()
    assert (daemon.runtime_dir / "admin.sock").exists()
    daemon.start()
    daemon.stop()
    assert list(daemon.runtime_dir.iterdir()) == []


def test_a_file_in_the_place_of_a_socket_is_left_alone(daemon: Daemon) -> None:
    daemon.runtime_dir.mkdir()
    (daemon.runtime_dir / "admin.sock").write_text("precious")
    (line,) = refused(daemon)
    assert "admin.sock" in line
    assert (daemon.runtime_dir / "admin.sock").read_text() == "precious"


async def read_all(stream: trio.SocketStream) -> bytes:
    received = b""
    async for chunk in stream:
        received += chunk
    return received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_answers_what_is_in_flight(number: signal.Signals) -> None:
    """The body's second half is sent after the signal."""
    with running() as daemon:
        body = f'[{{"id":"e","task_id":"t","agent":"urn:asap:agent:a","consumer":"c","timestamp":{time.time()}}}]'
        head = (
            f"POST /usage HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {daemon.admin_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        async with await trio.open_tcp_stream("127.0.0.1", daemon.port) as stream:
            await stream.send_all((head + body[:20]).encode())
            await trio.sleep(0.1)
            process = daemon.process
            assert process is not None
            process.send_signal(number)
            with trio.fail_after(30):
                while daemon.listens():  # noqa: ASYNC110 -- another process's socket
                    await trio.sleep(0.02)
            await stream.send_all(body[20:].encode())
            with trio.fail_after(30):
                answer = await read_all(stream)
            assert answer.startswith(b"HTTP/1.1 201 ")
            assert b'"recorded":1' in answer
        assert await trio.to_thread.run_sync(process.wait, 10) == 0
        await trio.to_thread.run_sync(daemon.start)
        assert daemon.admin_get("/usage/summary").json()["total_events"] == 1


async def test_a_second_signal_ends_it_at_once() -> None:
    with running() as daemon:
        async with await trio.open_tcp_stream("127.0.0.1", daemon.port) as stream:
            await stream.send_all(b"POST /usage HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n[")
            await trio.sleep(0.1)
            process = daemon.process
            assert process is not None
            process.terminate()
            await trio.sleep(0.3)
            assert process.poll() is None
            begun_s = time.monotonic()
            process.terminate()
            assert await trio.to_thread.run_sync(process.wait, 10) == 128 + signal.SIGTERM
            assert time.monotonic() - begun_s < 4  # well inside the grace that a first signal gives
        daemon.process = None
        await trio.to_thread.run_sync(daemon.start)


def test_after_a_stop_the_one_file_holds_everything(daemon: Daemon) -> None:
    daemon.start()
    daemon.stop()
    assert sorted(path.name for path in daemon.state_dir.iterdir()) == [
        "admin.key",
        "asapd.db",
        "asapd.lock",
        "checkpoints.log",
        "config",
        "identity.pem",
    ]
