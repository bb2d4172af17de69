"""The lock of a state directory: one open file description, inherited by the writer, held until both are gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.05
_HOLD_TRIES = 40


class LockedError(Exception):
    """Another daemon owns the state directory: stop it, or name another directory."""


def acquire(path: Path, *, patience_s: float, monotonic_s: Callable[[], float], sleep: Callable[[float], None]) -> int:
    """Take the lock and write our pid into the file; returns the descriptor, which holds the lock while it is open.

    A lock whose owner is dead is waited for: its writer may still be finishing a commit.

    Raises:
        LockedError: a living daemon holds it, or a dead one's writer for longer than `patience_s`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline_s = monotonic_s() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = _owner(descriptor)
            if _is_alive(owner) or monotonic_s() >= deadline_s:
                os.close(descriptor)
                who = f"pid {owner}" if owner is not None else "another process"
                raise LockedError(f"{path.parent} is in use by {who}") from None
        sleep(_POLL_S)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def hold(database: Path, sleep: Callable[[float], None]) -> int:
    """Lock a database by the file itself, which is made when it is not there; returns the descriptor that holds it.

    A process that ends gives up its descriptors one after the other, this one after that of the lock file: it is waited
    for a moment. It holds whatever becomes of the lock file, and by whatever other name the database is reached.
    To close it takes the locks of SQLite's own connections in this process away as well: only when there are none
    any more.

    Raises:
        LockedError: another process has it.
    """
    descriptor = os.open(database, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for left in range(_HOLD_TRIES, 0, -1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if left == 1:
                os.close(descriptor)
                raise LockedError(f"{database} is in use by another process, which holds no lock file here") from None
        sleep(_POLL_S)
    return descriptor


def _owner(descriptor: int) -> int | None:
    with contextlib.suppress(ValueError):
        return int(os.pread(descriptor, 20, 0).decode("ascii", "replace").strip())
    return None


def _is_alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
