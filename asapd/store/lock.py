"""The lock of a state directory: one open file description, inherited by the writer, held until both are gone."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

_POLL_S = 0.05
_HOLD_TRIES = 40
_PROCESSES = Path("/proc")

_log = logging.getLogger("asapd.store.lock")


class LockedError(Exception):
    """Another daemon owns the state directory: stop it, or name another directory."""


class LeftLockedError(LockedError):
    """The daemon that owned the state directory is dead and its writer is not: it will end, or has to be ended."""


def acquire(path: Path, *, patience_s: float, monotonic_s: Callable[[], float], sleep: Callable[[float], None]) -> int:
    """Take the lock and write our pid into the file; returns the descriptor, which holds the lock while it is open.

    A lock whose owner is dead is waited for: its writer may still be finishing a commit.

    Raises:
        LockedError: a living daemon holds it, or for longer than `patience_s` somebody who wrote no pid.
        LeftLockedError: a dead one's writer holds it for longer than `patience_s`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline_s = monotonic_s() + patience_s
    is_told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = _owner(descriptor)
            is_over = monotonic_s() >= deadline_s
            # To look is worth it only where it is told, or where a zombie, or who has the number now, seems to live.
            holders = _holders(descriptor, path.name) if is_over or not is_told or _is_alive(owner) else []
            refusal = _refusal(path.parent, owner, holders, is_over=is_over)
            if refusal is not None:
                os.close(descriptor)
                raise refusal from None
            if not is_told:
                is_told = True
                _log.warning("%s is held by %s: waiting %g s for it to end", path.parent, _named(holders), patience_s)
        sleep(_POLL_S)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _refusal(directory: Path, owner: int | None, holders: Sequence[int], *, is_over: bool) -> LockedError | None:
    """Why a lock that others hold is not waited for, or not any longer."""
    if owner in holders if holders else _is_alive(owner):
        return LockedError(f"{directory} is in use by pid {owner}")
    if not is_over:
        return None
    if owner is None:
        return LockedError(f"{directory} is in use by {_named(holders)}")
    return LeftLockedError(
        f"{directory} is still held by {_named(holders)}, the writer of a daemon that died (pid {owner})"
    )


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


def _holders(descriptor: int, name: str) -> list[int]:
    """The processes that have the lock of a file of this name; those of other users are shown only to root.

    Whoever inherited it counts, which the lock's own record leaves out; who has the file open, but no lock, does not.
    """
    wanted = os.fstat(descriptor)
    found = []
    for process in _PROCESSES.glob("[0-9]*"):
        links: list[Path] = []
        with contextlib.suppress(OSError):  # it ended, or is of somebody else
            links = list((process / "fd").iterdir())
        if any(_is_lock(process, link, name, wanted) for link in links):
            found.append(int(process.name))
    return sorted(found)


def _is_lock(process: Path, link: Path, name: str, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):  # it was closed since: another one may be the lock
        # By its name first: to look at a file may take long where it is far away.
        if link.readlink().name == name and os.path.samestat(link.stat(), wanted):
            return "FLOCK" in (process / "fdinfo" / link.name).read_text()
    return False


def _named(holders: Sequence[int]) -> str:
    return " and ".join(f"pid {pid}" for pid in holders) or "another process"


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
