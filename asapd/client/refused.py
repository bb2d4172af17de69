"""Events and settlements that the daemon will never take, set aside with the reason, so that the others get through."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path

from asapd.client import directory
from asapd.client.event import encode, timestamp
from asapd.client.locked import close_file, open_file
from asapd.client.waiting import Record

MAX_BYTES = 64 * 2**20
LOCKED_S = 2.0
"""How long another process may write at most before a line has to wait."""
PASSING = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EINTR}
"""What the disk is no reason of, and will be over: another process has the file, or there are too many open."""


class RefusedFile:
    """An append-only file of lines `{"code", "reason", "refused_at", "event"}`; several processes may write it.

    `event` is a settlement's record where one is refused, and text where a line of the spool was damaged.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, record: Record, code: str, reason: str, *, is_patient: bool = True) -> bool:
        """Write one line, durably, all of it or nothing; False when the file is full or there is none.

        `is_patient` says whether to wait for another process that writes.

        Raises:
            OSError: the disk refuses.
        """
        if self.path is None:
            return False
        line = _line(record, code, reason)
        fd = open_file(self.path, os.O_RDWR | os.O_APPEND)
        try:
            # So that what is cut off again is never a line of another process.
            _lock(fd, LOCKED_S if is_patient else 0.0)
            size_bytes = os.fstat(fd).st_size
            if size_bytes >= MAX_BYTES:
                return False
            # What a power cut tore off, or someone wrote without an end, must not take this line with it.
            is_torn = size_bytes > 0 and os.pread(fd, 1, size_bytes - 1) != b"\n"
            try:
                _write(fd, b"\n" * is_torn + line + b"\n")
                os.fsync(fd)
                if not size_bytes:
                    directory.sync(self.path.parent)
            except OSError:
                os.ftruncate(fd, size_bytes)
                raise
        finally:
            try:
                # Not left to the last descriptor: a child that is forked just now has one too, for a moment.
                fcntl.flock(fd, fcntl.LOCK_UN)
            finally:
                close_file(fd)
        return True


def _line(record: Record, code: str, reason: str) -> bytes:
    why = {"code": code, "reason": reason, "refused_at": _now()}
    try:
        return encode({**why, "event": json.loads(record.body)})
    except (ValueError, RecursionError):  # also for 1e999, which can be read only, and what is nested too deeply
        return encode({**why, "event": record.body.decode("utf-8", "replace")})


def _now() -> str | None:
    """None by a clock that is so wrong that its time cannot be written."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return timestamp(time.time_ns())
    return None


def _lock(fd: int, patience_s: float) -> None:
    """Wait for the others' lines.

    Raises:
        BlockingIOError: one that writes does not come to its end; it may have been stopped.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(0.01)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
