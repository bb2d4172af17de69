"""A real daemon, and the programs run as their users run them."""

from __future__ import annotations

import shutil
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asapd.cli.asapctl import asapctl
from asapd.cli.asapd import asapd
from asapd.cli.outcome import run
from tests.cli.programs import Daemon, Program, Ran, daemon_in


@pytest.fixture
def ctl(capfd: pytest.CaptureFixture[str]) -> Program:
    """`asapctl` with these arguments, in this process."""
    return _program(asapctl, "asapctl", capfd)


@pytest.fixture
def host(capfd: pytest.CaptureFixture[str]) -> Program:
    """`asapd` with these arguments, in this process."""
    return _program(asapd, "asapd", capfd)


def _program(command: Any, name: str, capfd: pytest.CaptureFixture[str]) -> Program:
    def ran(*arguments: object) -> Ran:
        code = run(command, name, [str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return ran


@pytest.fixture(scope="package")
def shared_daemon() -> Iterator[Daemon]:
    directory = Path(tempfile.mkdtemp(prefix="asapd-cli-"))  # a socket's path has to be short
    yield from daemon_in(directory)
    shutil.rmtree(directory)


@pytest.fixture
def daemon(shared_daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """A daemon that all tests share, where `asapctl` finds it."""
    monkeypatch.setenv("ASAPD_SOCKET", str(shared_daemon.socket))
    return shared_daemon


@pytest.fixture
def own_daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon that a test has for itself, to damage."""
    directory = Path(tempfile.mkdtemp(prefix="asapd-cli-"))
    monkeypatch.setenv("ASAPD_SOCKET", str(directory / "admin.sock"))
    yield from daemon_in(directory)
    shutil.rmtree(directory)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A socket where something answers each request with the next of some bytes, and then with the last of them.

    It answers with silence when these are none.
    """
    directory = Path(tempfile.mkdtemp(prefix="asapd-cli-"))
    replies = [b""]
    over = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65_536)
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            if reply:
                self.request.sendall(reply)
                # What came after the first read is read as well: closing before that would reset the connection.
                self.request.shutdown(socket.SHUT_WR)
                while self.request.recv(65_536):
                    pass
            else:
                over.wait(10)

    def answer(*new: bytes) -> None:
        replies[:] = new

    with socketserver.ThreadingUnixStreamServer(str(directory / "admin.sock"), Handler) as server:
        monkeypatch.setenv("ASAPD_SOCKET", str(directory / "admin.sock"))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield answer
        over.set()
        server.shutdown()
        thread.join()
    shutil.rmtree(directory)
