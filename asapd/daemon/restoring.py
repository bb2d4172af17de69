"""`asapd restore`: a backup takes the place of the database of a daemon that is stopped, once it has been verified."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nacl.signing import SigningKey

from asapd.core.types import SECOND_US, format_us
from asapd.daemon.boot import LOCK_PATIENCE_S, WAIT_FOR_WRITER
from asapd.store import checkpoint_log, lock, restoring
from asapd.store.backup import CopyFailedError
from asapd.store.migrations import DatabaseTooNewError, NotOurDatabaseError
from asapd.store.restoring import Head
from asapd.store.verifying import CannotVerifyError, Progress, Report
from asapd.wire.checkpoint import Checkpoint, is_signed_by, origin_of
from asapd.wire.keys import KeyFormatError, load_private_pem


class CannotRestoreError(Exception):
    """Nothing was replaced, and the message says what to do: the directory is in use, or the file is something else."""


class BadBackupError(Exception):
    """Nothing was replaced, because the backup does not verify; the message names the first bad place."""


@dataclass(frozen=True)
class Restored:
    """What stands there now, what was given up for it and where that is kept, and what was not checked."""

    head: Head
    abandoned: Head | None
    kept: Path | None
    remarks: tuple[str, ...]


def restore(
    file: Path,
    state_dir: Path,
    *,
    actor: str,
    now_us: int,
    give_up_checkpoints: bool = False,
    former_keys: Sequence[bytes] = (),
    progress: Callable[[int, int], None] = lambda _verified, _entries: None,
) -> Restored:
    """Put a backup into the place of the database in a state directory, which is made if it is not there.

    In this order, so that an end at any step leaves a database that is whole: the copy, its verification, the entry
    `log.restored`, the checkpoints that it has not aside, another name for the database that was, and the copy in its
    place. `former_keys` are those that the daemon had before the one in the directory.

    Raises:
        CannotRestoreError, BadBackupError: nothing was replaced.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = lock.acquire(
            state_dir / "asapd.lock", patience_s=LOCK_PATIENCE_S, monotonic_s=time.monotonic, sleep=time.sleep
        )
    except lock.LeftLockedError as error:
        raise CannotRestoreError(f"{error}: {WAIT_FOR_WRITER}") from None
    except lock.LockedError as error:
        raise CannotRestoreError(f"{error}: stop the daemon first") from None
    except OSError as error:
        raise CannotRestoreError(f"{error.filename or state_dir}: {error.strerror}: nothing was replaced") from None
    fresh, current = state_dir / "asapd.db.restoring", state_dir / "asapd.db"
    locks = [descriptor]
    try:
        if current.exists():
            locks.append(lock.hold(current, time.sleep))
        _give_to_owner(state_dir / "asapd.lock", state_dir)
        return _restore(
            file, state_dir, fresh, actor, now_us, progress, former_keys, give_up_checkpoints=give_up_checkpoints
        )
    except lock.LockedError as error:
        raise CannotRestoreError(f"{error}: stop it first") from None
    except restoring.DamagedBackupError as error:
        raise BadBackupError(str(error)) from None
    except (NotOurDatabaseError, DatabaseTooNewError) as error:
        raise CannotRestoreError(str(error)) from None
    except CopyFailedError as error:
        raise CannotRestoreError(f"{file} cannot be copied: {error}; nothing was replaced") from None
    except CannotVerifyError as error:
        raise CannotRestoreError(f"{file}: {error}; nothing was replaced") from None
    except OSError as error:
        raise CannotRestoreError(f"{error.filename or state_dir}: {error.strerror}") from None
    finally:
        fresh.unlink(missing_ok=True)
        for descriptor in locks:
            os.close(descriptor)


def _restore(
    file: Path,
    state_dir: Path,
    fresh: Path,
    actor: str,
    now_us: int,
    progress: Callable[[int, int], None],
    former_keys: Sequence[bytes],
    *,
    give_up_checkpoints: bool,
) -> Restored:
    if not file.is_file():
        raise CannotRestoreError(f"{file}: there is no such file")
    key = _key(state_dir)
    found = restoring.head(fresh, restoring.take(file, fresh, key))
    if found is None:
        raise BadBackupError("it has no audit log")
    keys, remarks = _keys(state_dir, key, restoring.origin(fresh), former_keys)
    known = list(checkpoint_log.read(state_dir / "checkpoints.log"))
    own = [checkpoint for checkpoint in known if not keys or any(is_signed_by(checkpoint, key) for key in keys)]
    within = [checkpoint for checkpoint in own if checkpoint.size <= found.entries]
    _verify(fresh, keys, () if give_up_checkpoints else within, progress)
    current = state_dir / "asapd.db"
    before = restoring.head(current) if current.exists() else None
    beyond = [Head(checkpoint.size, checkpoint.root) for checkpoint in own if checkpoint.size > found.entries]
    abandoned = max([*([] if before is None else [before]), *beyond], key=lambda head: head.entries, default=None)
    restoring.mark(fresh, found, abandoned, actor, now_us)
    _give_to_owner(fresh, state_dir)
    _set_aside(state_dir, known, () if give_up_checkpoints else within)
    kept = _keep(current, now_us) if current.exists() else None
    fresh.rename(current)
    _sync(state_dir)
    return Restored(found, abandoned, kept, remarks)


def _key(state_dir: Path) -> SigningKey | None:
    """The daemon's key, if it is there."""
    path = state_dir / "identity.pem"
    try:
        return load_private_pem(path.read_bytes())
    except FileNotFoundError:
        return None
    except KeyFormatError as error:
        raise CannotRestoreError(f"{path} is not an Ed25519 key ({error}): restore it, or move it away") from None


def _keys(
    state_dir: Path, key: SigningKey | None, origin: str | None, former: Sequence[bytes]
) -> tuple[tuple[bytes, ...], tuple[str, ...]]:
    """The public keys that the log may be signed with, as far as they are known, else none and why not."""
    path = state_dir / "identity.pem"
    if key is None:
        return (), (
            f"signatures were not checked: {path} is not there; without it the daemon makes itself another key",
        )
    own = bytes(key.verify_key)
    keys = (own, *former)
    if origin is None or origin in map(origin_of, keys):
        return keys, ()
    remark = f"signatures were not checked: the log is {origin}, and {path} is of {origin_of(own)}; "
    return (), (remark + "put the key of that log there, or list it in audit.former_keys and give --config",)


def _verify(
    fresh: Path, keys: Sequence[bytes], held_to: Sequence[Checkpoint], progress: Callable[[int, int], None]
) -> None:
    report: Report | None = None
    for said in restoring.verify(fresh, keys, held_to):
        match said:
            case Progress(verified=verified, entries=entries):
                progress(verified, entries)
            case Report():
                report = said
    assert report is not None, "a walk ends with a report"
    fault = report.walk.fault
    if fault is not None:
        hint = ""
        if "a checkpoint that was remembered" in fault.reason:
            hint = "; if checkpoints.log is of another log, --give-up-checkpoints sets it aside"
        elif "audit.former_keys" in fault.reason:
            hint = ", and give --config"
        raise BadBackupError(f"{fault}{hint}")
    for tally in report.tallies or ():
        if tally.findings:
            raise BadBackupError(f"{tally.findings} records and entries do not agree: {tally.named[0]}")


def _set_aside(state_dir: Path, known: Sequence[Checkpoint], within: Sequence[Checkpoint]) -> None:
    """Keep checkpoints of what is restored in `checkpoints.log`, and put all others into a file beside it."""
    kept = [checkpoint.note.encode() for checkpoint in within]
    notes = set(kept)
    others = [note for checkpoint in known if (note := checkpoint.note.encode()) not in notes]
    if not others:
        return
    aside = state_dir / "checkpoints.abandoned.log"
    checkpoint_log.append(aside, "\n".join(others))
    fresh = state_dir / "checkpoints.log.new"
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write("\n".join(kept).encode())
        out.flush()
        os.fsync(descriptor)
    for path in (fresh, aside):
        _give_to_owner(path, state_dir)
    fresh.rename(state_dir / "checkpoints.log")


def _keep(current: Path, now_us: int) -> Path:
    """Give the database that was another name as well; a WAL or journal that could not be folded goes with it.

    Left behind, it would be played back into the database that takes the place.
    """
    stamp = format_us(now_us)[:19].replace("-", "").replace(":", "")
    kept = current.with_name(f"{current.name}.before-restore-{stamp}")
    if kept.exists() and not kept.samefile(current):  # of another restore in this second
        kept = kept.with_name(f"{kept.name}-{now_us % SECOND_US:06d}")
    kept.unlink(missing_ok=True)
    kept.hardlink_to(current)
    for suffix in ("-wal", "-shm", "-journal"):
        beside = current.with_name(current.name + suffix)
        if beside.exists():
            beside.rename(kept.with_name(kept.name + suffix))
    return kept


def _give_to_owner(path: Path, state_dir: Path) -> None:
    """Have a file belong to whom the directory belongs to: root may restore what a service's user runs on."""
    owner = state_dir.stat()
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
