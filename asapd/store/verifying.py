"""Walks over the whole log: hashes and chain, the tree, and every checkpoint there is."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import apsw
import msgspec

from asapd.core.audit import Fault, Walk, verify_raw
from asapd.core.merkle import KEPT_LEVEL, MadeNode, Tree, edge, grow, root_of
from asapd.store import checkpoint_log, seals, witnessing
from asapd.store.findings import Tally
from asapd.store.reconciling import reconcile
from asapd.store.rows import fetch, fetch_one
from asapd.wire.attestation import sealing
from asapd.wire.checkpoint import Checkpoint, is_signed_by, origin_of, read_checkpoint
from asapd.wire.receipt import verifies
from asapd.wire.signed_note import NoteMalformedError

Known = list[tuple[str, bytes | str]]
"""Checkpoints of one size in the order they are judged: where each is from with its root, or what is wrong with it."""

STEP = 5_000
"""Entries of one step: some twenty milliseconds."""

_SCARCE = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}
"""Of the errors of the system those that say nothing of the file they were met at."""

_NOTE_BYTES = 200
"""Of a checkpoint as text, roughly."""

# Text is read as bytes: a flipped byte may have made it anything but UTF-8.
_RAW = (
    "SELECT seq, CAST(id AS BLOB), timestamp_us, CAST(event_type AS BLOB), CAST(actor AS BLOB), CAST(subject AS BLOB), "
    "CAST(details AS BLOB), salt, payload_hash, previous_hash, hash FROM audit WHERE seq >= ? ORDER BY seq LIMIT ?"
)


class CannotVerifyError(Exception):
    """The log could not be read to its end, which says nothing of what is in it; the message says what to do."""


class Request(msgspec.Struct, frozen=True):
    """What to verify: entries behind `since`, and whether they agree with what was sealed and with what they record.

    `remembered` are notes of checkpoints from elsewhere.
    `checkpoints` is the path of the file of checkpoints beside the database, of the log with this public key;
    `former_keys` are those that the daemon had before. Without a public key no signature of it is verified, and none of
    witnesses whose keys are not among `witness_keys`. One that `gives_way` rests while much is reported, if it has a
    process of its own.
    """

    since: int = 0
    remembered: tuple[str, ...] = ()
    checkpoints: str | None = None
    public_key: bytes = b""
    reconcile: bool = True
    former_keys: tuple[bytes, ...] = ()
    witness_keys: tuple[bytes, ...] = ()
    gives_way: bool = False


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far a walk got: `verified` of `entries`."""

    verified: int
    entries: int


class Report(msgspec.Struct, frozen=True, tag=True):
    """What a walk found. `held` checkpoints agree with the log; `tallies` is None where nothing was reconciled."""

    walk: Walk
    since: int
    held: int
    tallies: tuple[Tally, ...] | None = None

    @property
    def is_valid(self) -> bool:
        """Whether nothing at all is wrong."""
        return self.walk.fault is None and not any(tally.findings for tally in self.tallies or ())


class _Keys(msgspec.Struct, frozen=True):
    """The daemon's own keys, and those of witnesses by what they are called."""

    own: tuple[bytes, ...]
    witnesses: dict[str, bytes]


class _Stand(msgspec.Struct, frozen=True):
    """Where a walk stands. Up to `good` entries the tree is known to be the one that was sealed."""

    walk: Walk
    tree: Tree
    good: int
    held: int = 0


def verification(connection: apsw.Connection, request: Request) -> Iterator[Progress | Report]:
    """Verify the log up to the entry that is the newest when the walk gets there; the last that comes is the report.

    Raises:
        CannotVerifyError: there is no verdict, for want of what it takes to read the database.
        apsw.InterruptError: whoever has the connection would not wait any longer.
    """
    try:
        with reading():
            yield from _verification(connection, request)
    except (CannotVerifyError, apsw.InterruptError):
        raise
    except (apsw.CorruptError, apsw.NotADBError) as error:
        yield _unfinished(request, f"the database file is damaged: {error}")
    except Exception as error:  # noqa: BLE001 -- whoever has the file must not be able to stop who looks at it
        yield _unfinished(request, f"the log cannot be verified, {type(error).__name__}: {error}")


@contextmanager
def reading() -> Iterator[None]:
    """Tell what keeps a database from being read from what is wrong with it.

    Raises:
        CannotVerifyError: in the place of what the host, or who else uses the file, is the reason of.
    """
    try:
        yield
    except Exception as error:
        hindrance = _hindrance(error)
        if hindrance is None:
            raise
        raise CannotVerifyError(
            f"the log was not verified to its end, which says nothing of what is in it: {hindrance} "
            f"({type(error).__name__}: {error})"
        ) from error


def _hindrance(error: Exception) -> str | None:
    """What kept a database from being read, and what to do about that; None of an error that says something of it."""
    match error:
        case apsw.BusyError() | apsw.LockedError() | apsw.ProtocolError():
            return "another program keeps the database locked, so end that one and verify again"
        case apsw.CantOpenError() | apsw.PermissionsError() | apsw.ReadOnlyError():
            return "the database cannot be opened, so see to its permissions and the limit of open files"
        case apsw.NoMemError() | MemoryError():
            return "memory ran out, so leave asapd more of it and verify again"
        case apsw.FullError():
            return "there is no room for temporary files, so make some and verify again"
        case apsw.IOError():
            return "the disk failed, so look into the log of the kernel and verify again, or restore a backup"
        case OSError() if error.errno in _SCARCE:
            return "the host failed to read a file, so look into its log and verify again"
        case _:
            return None


def _unfinished(request: Request, reason: str) -> Report:
    return Report(Walk(fault=Fault(request.since + 1, None, reason)), request.since, 0)


def report(connection: apsw.Connection, request: Request) -> Report:
    """What a verification comes to; raises what that raises."""
    last: Progress | Report | None = None
    for last in verification(connection, request):  # noqa: B007 -- the last is what is wanted
        pass
    assert isinstance(last, Report)
    return last


def _verification(connection: apsw.Connection, request: Request) -> Iterator[Progress | Report]:
    own = (request.public_key, *request.former_keys) if request.public_key else ()
    keys = _Keys(own, {origin_of(key): key for key in request.witness_keys})
    # Before anything is read from the database: what is sealed from here on is in the file, and not in a snapshot.
    path = None if request.checkpoints is None else Path(request.checkpoints)
    kept_bytes = 0 if path is None else checkpoint_log.length(path)
    others = _remembered(request, own)
    if path is not None:
        kept = checkpoint_log.read(path, behind=request.since - 1, most_bytes=kept_bytes)
        _add_kept(others, connection, kept, own)
    stand = _before(connection, _start(connection, request.since), others, keys)
    while stand.walk.fault is None:
        before = stand.walk.seq
        stand = _step(connection, stand, others, keys)
        head = fetch_one(connection, "SELECT max(seq) FROM audit")
        yield Progress(stand.walk.verified, (head or (0,))[0] or 0)
        if stand.walk.seq < before + STEP:
            break
    if stand.walk.fault is None:
        stand = _beyond(connection, stand, others, keys)
    tallies = None
    if request.reconcile and not request.since and stand.walk.fault is None:
        tallies = reconcile(connection, own)
    yield Report(stand.walk, request.since, stand.held, tallies)


def _start(connection: apsw.Connection, since: int) -> _Stand:
    if since <= 0:
        return _Stand(Walk(), Tree(), 0)
    row = fetch_one(connection, "SELECT hash FROM audit WHERE seq = ?", (since,))
    if row is None:
        return _Stand(Walk(since, fault=Fault(since, None, f"entry {since} is missing")), Tree(), since)
    try:
        tree = edge(since, seals.node_of(connection))
    except KeyError:
        fault = Fault(since, None, f"a node of the tree over the first {since} entries is missing")
        return _Stand(Walk(since, fault=fault), Tree(), since)
    return _Stand(Walk(since, bytes(row[0])), tree, since)


def _remembered(request: Request, keys: tuple[bytes, ...]) -> dict[int, Known]:
    """Checkpoints from elsewhere by size."""
    found: dict[int, Known] = {}
    for note in request.remembered:
        checkpoint, origin = read_checkpoint(note), "a checkpoint that was remembered"
        wrong = _unsigned(f"{origin}, of {checkpoint.size} entries,", checkpoint, keys)
        found.setdefault(checkpoint.size, []).append((origin, wrong or checkpoint.root))
    return found


def _add_kept(
    found: dict[int, Known], connection: apsw.Connection, kept: Iterator[Checkpoint], keys: tuple[bytes, ...]
) -> None:
    """Add those of the file beside the database that are not in the database as they are."""
    origin = "a checkpoint in checkpoints.log"
    for checkpoint in kept:
        size = checkpoint.size
        stored = seals.checkpoint_at(connection, size)
        if stored is not None and stored.root == checkpoint.root:
            continue
        wrong = _unsigned(f"{origin}, of {size} entries,", checkpoint, keys)
        known = found.setdefault(size, [])
        known.append((origin, wrong or checkpoint.root))
        if stored is None:
            known.append((origin, f"the checkpoint of {size} entries is in checkpoints.log and not in the database"))


def _before(connection: apsw.Connection, stand: _Stand, others: Mapping[int, Known], keys: _Keys) -> _Stand:
    """Hold what a walk does not pass to checkpoints: the empty log, and by the nodes as kept what is before it."""
    passed = _sealed_between(connection, -(2**63), 0, {}, keys)
    passed += [(size, known) for size, known in others.items() if size <= max(stand.walk.seq, 0)]
    for size, known in sorted(passed, key=itemgetter(0)):
        if stand.walk.fault is not None:
            break
        try:
            root = root_of(max(size, 0), seals.node_of(connection))
        except KeyError:
            fault: Fault | None = Fault(size, None, f"a node of the tree over the first {size} entries is missing")
        else:
            fault = _misheld(known, size, root, 0)
        stand = (
            msgspec.structs.replace(stand, held=stand.held + len(known))
            if fault is None
            else _faulty(stand, stand.walk, fault)
        )
    return stand


def _step(connection: apsw.Connection, stand: _Stand, others: Mapping[int, Known], keys: _Keys) -> _Stand:
    first = stand.walk.seq + 1 if stand.walk.seq else -(2**63)  # a forged entry may stand before the first
    hashes: list[bytes] = []
    with closing(connection.execute(_RAW, (first, STEP))) as rows:
        walk = verify_raw(rows, stand.walk, hashes)
    # One that was put in says more than there is: it is judged by itself, and seals nothing.
    newest = "SELECT max(size) FROM audit_checkpoint WHERE size <= (SELECT max(seq) FROM audit)"
    sealed = fetch(connection, newest)[0][0] or 0
    tree, good, held, taken = stand.tree, stand.good, stand.held, 0
    for size, known in _sealed_between(connection, tree.size, walk.seq, others, keys):
        part = hashes[taken : size - stand.tree.size]
        tree, made = grow(tree, part)
        taken += len(part)
        fault = _strange_node(connection, made, sealed, good) or _misheld(known, size, tree.root(), good)
        if fault is not None:
            return _faulty(stand, walk, fault)
        good, held = size, held + len(known)
    tree, made = grow(tree, hashes[taken:])
    fault = _strange_node(connection, made, sealed, good)
    return _Stand(walk, tree, good, held) if fault is None else _faulty(stand, walk, fault)


def _sealed_between(
    connection: apsw.Connection, after: int, through: int, others: Mapping[int, Known], keys: _Keys
) -> list[tuple[int, Known]]:
    """Checkpoints by size, those of the database first."""
    rows = fetch(
        connection,
        "SELECT size, root, CAST(note AS BLOB), sealed_us, CAST(time_signature AS BLOB) FROM audit_checkpoint "
        "WHERE size > ? AND size <= ? ORDER BY size",
        (after, through),
    )
    # From the first on that has one every checkpoint has a signature of its time.
    timed = fetch_one(
        connection,
        "SELECT size, sealed_us FROM audit_checkpoint WHERE time_signature IS NOT NULL ORDER BY size LIMIT 1",
    )
    timed_size, timed_us = timed or (2**63, 0)
    found: dict[int, Known] = {}
    for size, root, note, sealed_us, signature in rows:
        wrong = misfit(size, root, note.decode(errors="replace"), keys.own)
        # An earlier one that was put back from the file is of a later time than those that were there.
        if wrong is None and (signature is not None or (size > timed_size and sealed_us >= timed_us)):
            wrong = _mistimed(size, root, sealed_us, signature, keys.own)
        found[size] = [("the checkpoint", wrong or root)]
    for size, wrong in witnessing.miscosigned(connection, after, through, keys.witnesses):
        found.setdefault(size, []).append(("the checkpoint", wrong))
    for size, known in others.items():
        if after < size <= through:
            found.setdefault(size, []).extend(known)
    return sorted(found.items())


def _mistimed(size: int, root: bytes, sealed_us: int, signature: bytes | None, keys: tuple[bytes, ...]) -> str | None:
    """Why a stored checkpoint was not made when it says; None when it was, or without keys."""
    encoded = None if signature is None else signature.decode(errors="replace")
    try:
        said = sealing(size, root, sealed_us)
    except (OverflowError, ValueError):
        said = b""
    if not keys or any(verifies(encoded, said, key) for key in keys):
        return None
    return f"the time of the stored checkpoint of {size} entries is not the one that this daemon signed"


def misfit(size: int, root: bytes, note: str, keys: tuple[bytes, ...]) -> str | None:
    """What is wrong with a stored checkpoint in itself."""
    which = f"the stored checkpoint of {size} entries"
    try:
        checkpoint: Checkpoint = read_checkpoint(note)
    except NoteMalformedError as error:
        return f"{which} {error}"
    if (checkpoint.size, checkpoint.root) != (size, root):
        return f"{which} says another size or root than its signed note"
    return _unsigned(which, checkpoint, keys)


def _unsigned(which: str, checkpoint: Checkpoint, keys: tuple[bytes, ...]) -> str | None:
    """Why a checkpoint is none that this daemon signed, with one of its keys; None when it is, or without keys."""
    if not keys or any(is_signed_by(checkpoint, key) for key in keys):
        return None
    if checkpoint.origin not in map(origin_of, keys):
        return (
            f"{which} is of {checkpoint.origin}, which is not this log: if the daemon had another key before, list it "
            "in audit.former_keys"
        )
    return f"{which} was not signed by this daemon's key"


def _strange_node(connection: apsw.Connection, made: list[MadeNode], sealed: int, good: int) -> Fault | None:
    """The first node that is kept with another hash, or below what was sealed not at all."""
    for level, index, digest in made:
        last = (index + 1) << level
        row = fetch_one(connection, "SELECT hash FROM audit_node WHERE level = ? AND idx = ?", (level, index))
        if row is None and last <= sealed:
            return Fault(good + 1, None, f"the node {level}/{index} of the tree, over entries to {last}, is missing")
        if row is not None and row[0] != digest:
            return _altered(good, last, f"the kept node {level}/{index} of the tree")
    return None


def _misheld(known: Known, size: int, root: bytes, good: int) -> Fault | None:
    """The first checkpoint of a size that the log does not agree with, or that is wrong in itself."""
    for origin, said in known:
        if isinstance(said, str):
            return Fault(size, None, said)
        if said != root and not size:
            return Fault(0, None, f"{origin} of 0 entries has another root than an empty log")
        if said != root:
            return _altered(good, size, f"{origin} of {size} entries")
    return None


def _altered(good: int, last: int, against: str) -> Fault:
    reason = f"entries {good + 1} to {last} are not those that were sealed: their root is not that of {against}"
    return Fault(good + 1, None, reason)


def _faulty(stand: _Stand, walk: Walk, fault: Fault) -> _Stand:
    """A walk with a fault of the tree, unless the chain was found bad in an entry before that."""
    known = walk.fault
    first = known if known is not None and known.seq < fault.seq else fault
    return msgspec.structs.replace(stand, walk=msgspec.structs.replace(walk, fault=first))


def _beyond(connection: apsw.Connection, stand: _Stand, others: Mapping[int, Known], keys: _Keys) -> _Stand:
    """Checkpoints, and nodes of the tree, of more entries than there are."""
    head = stand.walk.seq
    beyond = _sealed_between(connection, head, 2**63 - 1, others, keys)
    signed = [size for size, known in beyond if any(isinstance(said, bytes) for _, said in known)]
    if signed:
        # What was sealed while this walked is not beyond the log: only what is so now.
        now = (fetch_one(connection, "SELECT max(seq) FROM audit") or (0,))[0] or 0
        if signed[-1] > now:
            reason = (
                f"the log ends at entry {now}, and a checkpoint of {signed[-1]} entries was signed: "
                f"{signed[-1] - now} were cut off, or an older copy of the database was put in its place"
            )
            return _faulty(stand, stand.walk, Fault(now + 1, None, reason))
    for _, known in beyond:
        for _, said in known:
            if isinstance(said, str):
                return _faulty(stand, stand.walk, Fault(head + 1, None, said))
    stray = fetch_one(
        connection,
        "SELECT level, idx FROM audit_node WHERE level < ?1 OR level > 62 OR idx < 0 "
        "OR idx >= (SELECT coalesce(max(seq), 0) FROM audit) >> level LIMIT 1",
        (KEPT_LEVEL,),
    )
    if stray is None:
        return stand
    reason = f"a node {stray[0]}/{stray[1]} of the tree is kept, and there are no entries for it"
    return _faulty(stand, stand.walk, Fault(head + 1, None, reason))


def length(connection: apsw.Connection, request: Request) -> int:
    """How much there is to walk, roughly: entries, and rows that are held to them, each as it is numbered.

    A checkpoint whose signature is verified takes as long as twenty entries, one that is only compared as long as ten.
    """
    try:
        entries, rows = fetch(connection, "SELECT (SELECT max(seq) FROM audit), (SELECT max(seq) FROM usage)")[0]
        kept = 0 if request.checkpoints is None else checkpoint_log.length(Path(request.checkpoints)) // _NOTE_BYTES
    except (apsw.Error, OSError):  # the walk meets it too, and says what is damaged
        return 0
    walked = max((entries or 0) - request.since, (rows or 0) if request.reconcile and not request.since else 0)
    return walked + 20 * len(request.remembered) + (0 if request.since else 10 * kept)


def entry_at(connection: apsw.Connection, time_us: int) -> int:
    """The number of the last entry before a time; 0 when there is none."""
    row: Any = fetch_one(connection, "SELECT min(seq) - 1 FROM audit WHERE timestamp_us >= ?", (time_us,))
    if row is not None and row[0] is not None:
        return int(row[0])
    newest = fetch_one(connection, "SELECT max(seq) FROM audit")
    return 0 if newest is None or newest[0] is None else int(newest[0])
