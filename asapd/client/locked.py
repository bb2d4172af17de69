"""Files whose lock says that a process uses them, of which a forked child keeps none.

The lock of `flock` belongs to what was opened, and goes with its last descriptor. A child that had one would hold the
lock for as long as it lives, however long its parent is gone.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

_opening = threading.RLock()
"""Held from before a file is opened until it is known, and while a process forks."""
_opening_pid = os.getpid()
_known: set[int] = set()


def open_file(path: Path, flags: int) -> int:
    """Open a file that is to be locked, made if it is missing.

    Raises:
        OSError: as `os.open` does.
    """
    with _opening:
        fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _known.add(fd)
        return fd


def close_file(fd: int) -> None:
    """Close it, unless this is a child, in which it was closed from the beginning."""
    with _opening:
        if fd in _known:
            _known.remove(fd)
            os.close(fd)


def forget_in_child() -> None:
    """Close all of them in a forked child; called by Python's hooks, or by whoever finds that a fork went past them."""
    while _known:
        os.close(_known.pop())
    _renew_lock()


def _renew_lock() -> None:
    global _opening, _opening_pid
    _opening, _opening_pid = threading.RLock(), os.getpid()


def _before_fork() -> None:
    if (
        _opening_pid != os.getpid()
    ):  # a fork went past Python's hooks, and this child forks before it does anything else
        _renew_lock()
    _opening.acquire()


def _after_in_parent() -> None:
    _opening.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=forget_in_child)
