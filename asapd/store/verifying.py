"""Walks over the whole log: hashes and chain, the tree, and every checkpoint there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import apsw
import msgspec

from asapd.core.audit import Fault, RawEntry, Walk, verify_raw
from asapd.core.merkle import MadeNode, Tree, edge, grow
from asapd.store import checkpoint_log, seals
from asapd.store.reconciling import Tally, reconcile
from asapd.store.rows import fetch, fetch_one
from asapd.wire.checkpoint import Checkpoint, is_signed_by, origin_of, read_checkpoint
from asapd.wire.signed_note import NoteMalformedError

STEP = 5_000
"""Entries of one step: some twenty milliseconds."""

# Text is read as bytes: a flipped byte may have made it anything but UTF-8.
_RAW = (
    "SELECT seq, CAST(id AS BLOB), timestamp_us, CAST(event_type AS BLOB), CAST(actor AS BLOB), CAST(subject AS BLOB), "
    "CAST(details AS BLOB), salt, payload_hash, previous_hash, hash FROM audit WHERE seq >= ? ORDER BY seq LIMIT ?"
)


class Request(msgspec.Struct, frozen=True):
    """What to verify: entries behind `since`, with what was sealed, and `remembered` (size, root) from elsewhere.

    `checkpoints` is the path of the file of checkpoints beside the database, of the log with this public key;
    `former_keys` are those that the daemon had before.
    """

    since: int = 0
    remembered: tuple[tuple[int, bytes], ...] = ()
    checkpoints: str | None = None
    public_key: bytes = b""
    reconcile: bool = True
    former_keys: tuple[bytes, ...] = ()


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


class _Stand(msgspec.Struct, frozen=True):
    """Where a walk stands. Up to `good` entries the tree is known to be the one that was sealed."""

    walk: Walk
    tree: Tree
    good: int
    held: int = 0


def verification(connection: apsw.Connection, request: Request) -> Iterator[Progress | Report]:
    """Verify the log up to the entry that is the newest when the walk gets there; the last that comes is the report."""
    try:
        yield from _verification(connection, request)
    except apsw.CorruptError as error:
        yield _unfinished(request, f"the database file is damaged: {error}")
    except Exception as error:  # noqa: BLE001 -- whoever has the file must not be able to stop who looks at it
        yield _unfinished(request, f"the log cannot be verified, {type(error).__name__}: {error}")


def _unfinished(request: Request, reason: str) -> Report:
    return Report(Walk(fault=Fault(request.since + 1, None, reason)), request.since, 0)


def report(connection: apsw.Connection, request: Request) -> Report:
    """What a verification comes to."""
    last: Progress | Report | None = None
    for last in verification(connection, request):  # noqa: B007 -- the last is what is wanted
        pass
    assert isinstance(last, Report)
    return last


def _verification(connection: apsw.Connection, request: Request) -> Iterator[Progress | Report]:
    stand = _start(connection, request.since)
    others = _others(connection, request)
    keys = (request.public_key, *request.former_keys) if request.public_key else ()
    while stand.walk.fault is None:
        before = stand.walk.seq
        stand = _step(connection, stand, others, keys)
        head = fetch_one(connection, "SELECT max(seq) FROM audit")
        yield Progress(stand.walk.verified, (head or (0,))[0] or 0)
        if stand.walk.seq < before + STEP:
            break
    if stand.walk.fault is None:
        stand = _beyond(connection, stand, others)
    tallies = None
    if request.reconcile and not request.since and stand.walk.fault is None:
        tallies = reconcile(connection)
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


def _others(connection: apsw.Connection, request: Request) -> dict[int, list[tuple[str, bytes]]]:
    """Checkpoints by size that are not in the database as they are: where each is from, and its root."""
    found: dict[int, list[tuple[str, bytes]]] = {}
    for size, root in request.remembered:
        found.setdefault(size, []).append(("a checkpoint that was remembered", root))
    if request.checkpoints is not None:
        for checkpoint in checkpoint_log.read(Path(request.checkpoints)):
            if is_signed_by(checkpoint, request.public_key):
                stored = seals.checkpoint_at(connection, checkpoint.size)
                if stored is None or stored.root != checkpoint.root:
                    found.setdefault(checkpoint.size, []).append(("a checkpoint in checkpoints.log", checkpoint.root))
    return found


def _step(
    connection: apsw.Connection, stand: _Stand, others: Mapping[int, list[tuple[str, bytes]]], keys: tuple[bytes, ...]
) -> _Stand:
    first = stand.walk.seq + 1 if stand.walk.seq else -(2**63)  # a forged entry may stand before the first
    rows: list[RawEntry] = fetch(connection, _RAW, (first, STEP))
    walk = verify_raw(rows, stand.walk)
    hashes = [row[10] for row in rows[: walk.verified - stand.walk.verified]]
    tree, good, held, taken = stand.tree, stand.good, stand.held, 0
    for size, known in _sealed_between(connection, tree.size, walk.seq, others, keys):
        part = hashes[taken : size - stand.tree.size]
        tree, made = grow(tree, part)
        taken += len(part)
        wrong = _strange_node(connection, made)
        if wrong is not None:
            return _altered(stand, walk, good, wrong[0], wrong[1])
        for origin, root in known:
            if isinstance(root, str):
                return _faulty(stand, walk, Fault(size, None, root))
            if tree.root() != root:
                return _altered(stand, walk, good, size, f"{origin} of {size} entries")
        good, held = size, held + len(known)
    tree, made = grow(tree, hashes[taken:])
    wrong = _strange_node(connection, made)
    if wrong is not None:
        return _altered(stand, walk, good, *wrong)
    return _Stand(walk, tree, good, held)


Known = list[tuple[str, "bytes | str"]]


def _sealed_between(
    connection: apsw.Connection,
    after: int,
    through: int,
    others: Mapping[int, list[tuple[str, bytes]]],
    keys: tuple[bytes, ...],
) -> list[tuple[int, Known]]:
    """Checkpoints by size: where each is from with its root, or with what is wrong with itself."""
    rows = fetch(
        connection,
        "SELECT size, root, CAST(note AS BLOB) FROM audit_checkpoint WHERE size > ? AND size <= ? ORDER BY size",
        (after, through),
    )
    found: dict[int, Known] = {}
    for size, root, note in rows:
        found[size] = [("the checkpoint", misfit(size, root, note.decode(errors="replace"), keys) or root)]
    for size, known in others.items():
        if after < size <= through:
            found.setdefault(size, []).extend(known)
    return sorted(found.items())


def misfit(size: int, root: bytes, note: str, keys: tuple[bytes, ...]) -> str | None:
    """What is wrong with a stored checkpoint in itself."""
    try:
        checkpoint: Checkpoint = read_checkpoint(note)
    except NoteMalformedError as error:
        return f"the stored checkpoint of {size} entries {error}"
    if (checkpoint.size, checkpoint.root) != (size, root):
        return f"the stored checkpoint of {size} entries says another size or root than its signed note"
    if not keys or any(is_signed_by(checkpoint, key) for key in keys):
        return None
    if checkpoint.origin not in map(origin_of, keys):
        return (
            f"the stored checkpoint of {size} entries is of {checkpoint.origin}, which is not this log: if the daemon "
            "had another key before, list it in audit.former_keys"
        )
    return f"the stored checkpoint of {size} entries was not signed by this daemon's key"


def _strange_node(connection: apsw.Connection, made: list[MadeNode]) -> tuple[int, str] | None:
    """The first node that is kept with another hash: the number of the last entry below it, and what it is."""
    for level, index, digest in made:
        row = fetch_one(connection, "SELECT hash FROM audit_node WHERE level = ? AND idx = ?", (level, index))
        if row is not None and row[0] != digest:
            return (index + 1) << level, f"the kept node {level}/{index} of the tree"
    return None


def _altered(stand: _Stand, walk: Walk, good: int, last: int, against: str) -> _Stand:
    reason = f"entries {good + 1} to {last} are not those that were sealed: their root is not that of {against}"
    return _faulty(stand, walk, Fault(good + 1, None, reason))


def _faulty(stand: _Stand, walk: Walk, fault: Fault) -> _Stand:
    """A walk with a fault of the tree, unless the chain was found bad in an entry before that."""
    known = walk.fault
    first = known if known is not None and known.seq < fault.seq else fault
    return msgspec.structs.replace(stand, walk=msgspec.structs.replace(walk, fault=first))


def _beyond(connection: apsw.Connection, stand: _Stand, others: Mapping[int, list[tuple[str, bytes]]]) -> _Stand:
    """Checkpoints of more entries than there are."""
    head = stand.walk.seq
    newest = seals.newest(connection)
    size = max([0 if newest is None else newest.size, *others])
    if size <= head:
        return stand
    reason = (
        f"the log ends at entry {head}, and a checkpoint of {size} entries was signed: {size - head} were cut off, "
        "or an older copy of the database was put in its place"
    )
    return _faulty(stand, stand.walk, Fault(head + 1, None, reason))


def length(connection: apsw.Connection, request: Request) -> int:
    """How much there is to walk, roughly: entries, and rows that are held to them, each as it is numbered."""
    try:
        entries, rows = fetch(connection, "SELECT (SELECT max(seq) FROM audit), (SELECT max(seq) FROM usage)")[0]
    except apsw.Error:  # the walk meets it too, and says what is damaged
        return 0
    return max((entries or 0) - request.since, (rows or 0) if request.reconcile and not request.since else 0)


def entry_at(connection: apsw.Connection, time_us: int) -> int:
    """The number of the last entry before a time; 0 when there is none."""
    row: Any = fetch_one(connection, "SELECT min(seq) - 1 FROM audit WHERE timestamp_us >= ?", (time_us,))
    if row is not None and row[0] is not None:
        return int(row[0])
    newest = fetch_one(connection, "SELECT max(seq) FROM audit")
    return 0 if newest is None or newest[0] is None else int(newest[0])
