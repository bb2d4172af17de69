"""What a service tells systemd and is handed by it: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

_LOG = logging.getLogger(__name__)

_FIRST_LISTEN_FD = 3  # SD_LISTEN_FDS_START


class SystemdNotifier:
    """Tells systemd about the service's state; without an address (not run by systemd) every call does nothing.

    `address` is the value of $NOTIFY_SOCKET: a path, or `@name` in the abstract namespace. No call raises or blocks: a
    service must not fail over its own status line. The first failure is logged at debug, later ones are silent.
    """

    __slots__ = ("_address", "_broken")

    def __init__(self, address: str | None) -> None:
        encoded = os.fsencode(address or "")
        self._address = b"\0" + encoded[1:] if encoded.startswith(b"@") else encoded
        self._broken = False

    def ready(self, status: str = "") -> None:
        """The service is up, or has finished reloading."""
        self._send("READY=1", *([_status(status)] if status else []))

    def reloading(self, monotonic_us: int) -> None:
        """The service began to reload at `monotonic_us` of CLOCK_MONOTONIC; `ready` ends it.

        One datagram: systemd ignores RELOADING=1 that comes without its time, and the reload then hangs.
        """
        self._send("RELOADING=1", f"MONOTONIC_USEC={monotonic_us}")

    def stopping(self) -> None:
        """The service has begun to shut down."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The service is alive; due every `watchdog_interval_s`."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Show `text` in `systemctl status`; line breaks become spaces."""
        self._send(_status(text))

    def _send(self, *fields: str) -> None:
        if not self._address:
            return
        payload = "\n".join(fields).encode(errors="replace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(payload, self._address)
        except OSError as error:
            if not self._broken:
                self._broken = True
                _LOG.debug("cannot notify systemd at %r: %s", self._address, error)


def _status(text: str) -> str:
    # A line break would start a field of its own.
    return "STATUS=" + " ".join(text.splitlines())


def watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """How often to call `watchdog`: half of what systemd allows, or None when it does not watch the process `pid`."""
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    allowed_us = _number(environ.get("WATCHDOG_USEC"))
    return allowed_us / 2_000_000 if allowed_us else None


def listen_fds(environ: Mapping[str, str], pid: int) -> list[tuple[int, str]]:
    """The sockets that systemd opened for the process `pid`, as (file descriptor, FileDescriptorName=).

    A socket without a name is called "unknown", as in sd_listen_fds_with_names(3). The descriptors are inheritable as
    systemd left them.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    count = _number(environ.get("LISTEN_FDS"))
    return [
        (_FIRST_LISTEN_FD + index, (names[index] if index < len(names) else "") or "unknown") for index in range(count)
    ]


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0
