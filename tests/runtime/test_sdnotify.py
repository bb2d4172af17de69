from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from asapd.runtime.sdnotify import SystemdNotifier, listen_fds, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    if request.param == "path":
        address = str(tmp_path / "notify")
        bound = address
    else:
        address = f"@asapd-test-{os.getpid()}"
        bound = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind(bound)
        yield address, sock


def test_each_state_is_one_datagram(systemd: tuple[str, socket.socket]) -> None:
    address, sock = systemd
    notifier = SystemdNotifier(address)
    notifier.ready("serving")
    notifier.ready()
    notifier.reloading(123_456_789)
    notifier.watchdog()
    notifier.status("two\nlines\r\nand caf\u00e9 \udcff")
    notifier.stopping()
    assert [sock.recv(4096) for _ in range(6)] == [
        b"READY=1\nSTATUS=serving",
        b"READY=1",
        b"RELOADING=1\nMONOTONIC_USEC=123456789",
        b"WATCHDOG=1",
        "STATUS=two lines and café ?".encode(),
        b"STOPPING=1",
    ]
    with pytest.raises(BlockingIOError):
        sock.recv(4096)


@pytest.mark.parametrize("address", [None, ""])
def test_without_an_address_nothing_happens(address: str | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    SystemdNotifier(address).ready("serving")
    assert caplog.records == []


@pytest.mark.parametrize("address", ["/nonexistent/notify", "vsock:2:1234", "/" + "x" * 200])
def test_a_broken_socket_is_logged_once_and_never_raises(address: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    notifier = SystemdNotifier(address)
    notifier.ready("serving")
    notifier.watchdog()
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_a_systemd_that_does_not_read_does_not_block(
    systemd: tuple[str, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    notifier = SystemdNotifier(systemd[0])
    for _ in range(10_000):
        notifier.watchdog()
        if caplog.records:
            break
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
        ({"WATCHDOG_PID": "42"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_asked(environ: dict[str, str], interval_s: float | None) -> None:
    assert watchdog_interval_s(environ, 42) == interval_s


@pytest.mark.parametrize(
    ("environ", "fds"),
    [
        ({}, []),
        ({"LISTEN_FDS": "2"}, []),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "43"}, []),
        ({"LISTEN_PID": "42"}, []),
        ({"LISTEN_FDS": "-1", "LISTEN_PID": "42"}, []),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "42"}, [(3, "unknown"), (4, "unknown")]),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "42", "LISTEN_FDNAMES": "http:admin"}, [(3, "http"), (4, "admin")]),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "42", "LISTEN_FDNAMES": "http"}, [(3, "http"), (4, "unknown")]),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "42", "LISTEN_FDNAMES": ":x"}, [(3, "unknown")]),
    ],
)
def test_sockets_are_taken_only_when_meant_for_this_process(
    environ: dict[str, str], fds: list[tuple[int, str]]
) -> None:
    assert listen_fds(environ, 42) == fds
