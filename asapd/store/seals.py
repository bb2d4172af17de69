"""The tree over the audit log and its checkpoints: kept apart from the writer's work, made from what is committed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import apsw
import msgspec

from asapd.core import merkle
from asapd.core.merkle import KEPT_LEVEL, MadeNode, Node, Tree
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units.audit import Seal, Sealed
from asapd.wire.attestation import sealing
from asapd.wire.checkpoint import Checkpoint

BLOCK = 1 << KEPT_LEVEL
"""Entries below one kept node."""


class SealedAt(msgspec.Struct, frozen=True):
    """A checkpoint as stored: the signed note of a size and root."""

    size: int
    root: bytes
    note: str
    sealed_us: int


def seal(tx: Tx, unit: Seal) -> Sealed:
    """Keep nodes of the tree, and the checkpoint that was signed over them, if any.

    What is there already stays: nodes never change, and of two checkpoints of one size the first counts.
    """
    tx.insert_many("INSERT INTO audit_node VALUES (?,?,?) ON CONFLICT DO NOTHING", unit.nodes)
    if unit.note is not None:
        signature = tx.signature_of(sealing(unit.size, unit.root, unit.now_us))
        tx.execute(
            "INSERT INTO audit_checkpoint VALUES (?,?,?,?,?) ON CONFLICT DO NOTHING",
            (unit.size, unit.root, unit.note, unit.now_us, signature),
        )
    return Sealed(unit.size)


def sealed(row: Row) -> SealedAt:
    """A checkpoint from its row; a note that is no text any more is still shown, and verifies no longer."""
    size, root, note, sealed_us = row
    return SealedAt(size, root, note.decode(errors="replace"), sealed_us)


def newest(connection: apsw.Connection) -> SealedAt | None:
    """The checkpoint of the largest size."""
    row = fetch_one(
        connection, "SELECT size, root, CAST(note AS BLOB), sealed_us FROM audit_checkpoint ORDER BY size DESC LIMIT 1"
    )
    return None if row is None else sealed(row)


ECHOES = 256
"""So many entries of witnessing are worth a checkpoint; it makes two for each witness, one here and one there.

Each takes in more than it makes, so daemons that witness each other come to rest, as long as none has 128 witnesses.
"""


def waiting_since_us(connection: apsw.Connection, size: int) -> int | None:
    """When the first was entered of what a log has behind its checkpoint of a size; None for the echo of that alone.

    Where the checkpoint is of more than there is, 0.
    """
    head = (fetch_one(connection, "SELECT max(seq) FROM audit") or (0,))[0] or 0
    if head < size:
        return 0
    sql = "SELECT timestamp_us FROM audit WHERE seq > ?"
    if head - size < ECHOES:
        sql += " AND event_type NOT IN ('checkpoint.cosigned', 'log.witnessed')"
    row = fetch_one(connection, f"{sql} ORDER BY seq LIMIT 1", (size,))
    return None if row is None else row[0]


def covering(connection: apsw.Connection, size: int) -> SealedAt | None:
    """The smallest checkpoint of at least a size."""
    row = fetch_one(
        connection,
        "SELECT size, root, CAST(note AS BLOB), sealed_us FROM audit_checkpoint WHERE size >= ? ORDER BY size LIMIT 1",
        (size,),
    )
    return None if row is None else sealed(row)


def checkpoint_at(connection: apsw.Connection, size: int) -> SealedAt | None:
    """The checkpoint of exactly a size."""
    found = covering(connection, size)
    return found if found is not None and found.size == size else None


def not_stored(connection: apsw.Connection, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that are not in the database with their size and root."""
    sql = "SELECT 1 FROM audit_checkpoint WHERE size = ? AND root = ?"
    return [found for found in checkpoints if fetch_one(connection, sql, (found.size, found.root)) is None]


def node_of(connection: apsw.Connection) -> Node:
    """The nodes of the tree: kept ones as kept, the others from the entries, each block of which is read once."""
    blocks: dict[int, list[bytes]] = {}

    def node(level: int, index: int) -> bytes:
        if level >= KEPT_LEVEL:
            row = fetch_one(connection, "SELECT hash FROM audit_node WHERE level = ? AND idx = ?", (level, index))
            if row is None:
                raise KeyError((level, index))
            return bytes(row[0])
        first = index << level
        number, offset = divmod(first, BLOCK)
        if number not in blocks:
            blocks[number] = block_leaves(connection, number)
        return merkle.subtree(blocks[number][offset:], level, index)

    return node


def block_leaves(connection: apsw.Connection, number: int) -> list[bytes]:
    """The leaves of one block of entries, as far as they follow each other."""
    rows = fetch(
        connection,
        "SELECT seq, hash FROM audit WHERE seq > ? AND seq <= ? ORDER BY seq",
        (number * BLOCK, (number + 1) * BLOCK),
    )
    return [merkle.leaf_hash(digest) for place, (seq, digest) in enumerate(rows, number * BLOCK + 1) if seq == place]


def grown(connection: apsw.Connection) -> Tree:
    """The tree as far as its nodes are kept; what came later has to be grown on to it.

    Raises:
        HoleInLogError: a node is missing.
    """
    row = fetch_one(
        connection,
        "SELECT max(idx) FROM audit_node WHERE level = ?1 AND idx < (SELECT max(seq) FROM audit) >> ?1",
        (KEPT_LEVEL,),
    )
    blocks = 0 if row is None or row[0] is None else row[0] + 1
    try:
        return merkle.edge(blocks * BLOCK, node_of(connection))
    except KeyError as error:
        level, index = error.args[0]
        raise HoleInLogError(f"the node {level}/{index} of its tree is missing") from None


def grow_step(connection: apsw.Connection, tree: Tree, limit: int) -> tuple[Tree, list[MadeNode]]:
    """The tree with up to `limit` more entries.

    Raises:
        HoleInLogError: an entry is missing.
    """
    rows = fetch(connection, "SELECT seq, hash FROM audit WHERE seq > ? ORDER BY seq LIMIT ?", (tree.size, limit))
    return merkle.grow(tree, _hashes(tree.size, rows))


class HoleInLogError(Exception):
    """An entry or a node is missing in the file: someone took it out. `asapctl audit verify` says which."""


def _hashes(size: int, rows: list[tuple[int, bytes]]) -> Iterator[bytes]:
    for place, (seq, digest) in enumerate(rows, size + 1):
        if seq != place:
            raise HoleInLogError(f"entry {place} is missing")
        yield digest


def differs(connection: apsw.Connection, size: int, root: bytes) -> str | None:
    """Why the log is not the one that had this root at this size; None when it is, as far as a quick look can tell.

    Besides the nodes it reads the last whole block of entries: who chains a log again from anywhere changes those too.
    """
    row = fetch_one(connection, "SELECT max(seq) FROM audit")
    head = 0 if row is None or row[0] is None else int(row[0])
    if head < size:
        return (
            f"the log ends at entry {head}, and a checkpoint of {size} entries was signed: {size - head} were cut off, "
            "or an older copy of the database was put in its place"
        )
    node = node_of(connection)
    try:
        blocks = size // BLOCK
        if blocks and _remade(connection, blocks - 1) != node(KEPT_LEVEL, blocks - 1):
            first = _first_changed(connection, blocks)
            return (
                f"entries {first * BLOCK + 1} and on are not those that were sealed (the first that differs is not "
                f"after {(first + 1) * BLOCK}): the log was rewritten"
            )
        found = merkle.root_of(size, node)
    except KeyError:
        return f"an entry or a node of the first {size} is missing: the log was altered"
    if found != root:
        return f"the first {size} entries are not those that a checkpoint was signed over: the log was rewritten"
    return None


def _remade(connection: apsw.Connection, block: int) -> bytes:
    return merkle.subtree(block_leaves(connection, block), KEPT_LEVEL, block)


def is_block_as_kept(connection: apsw.Connection, block: int) -> bool:
    """Whether a block of entries makes the node that is kept over it; so does one over which none is kept."""
    row = fetch_one(connection, "SELECT hash FROM audit_node WHERE level = ? AND idx = ?", (KEPT_LEVEL, block))
    try:
        return row is None or _remade(connection, block) == row[0]
    except KeyError:
        return False


def _first_changed(connection: apsw.Connection, blocks: int) -> int:
    """The first block that differs from its node, of blocks the last of which does: all from there on, if rewritten."""
    node = node_of(connection)
    good, bad = -1, blocks - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            is_good = _remade(connection, middle) == node(KEPT_LEVEL, middle)
        except KeyError:
            is_good = False
        good, bad = (middle, bad) if is_good else (good, middle)
    return bad


class Proof(msgspec.Struct, frozen=True):
    """Hashes that lead to the root over the first `size` entries."""

    size: int
    root: bytes
    hashes: list[bytes]


def inclusion(connection: apsw.Connection, seq: int, size: int) -> Proof | None:
    """What proves an entry to be among the first `size`, by the nodes as they are; None when one is missing."""
    node = node_of(connection)
    try:
        return Proof(size, merkle.root_of(size, node), merkle.inclusion_proof(seq - 1, size, node))
    except KeyError:
        return None


def consistency(connection: apsw.Connection, first: int, second: int) -> tuple[bytes, Proof] | None:
    """The root over the first entries, and what proves that the log went on from there; None when a node is missing."""
    node = node_of(connection)
    try:
        hashes = merkle.consistency_proof(first, second, node) if first else []
        return merkle.root_of(first, node), Proof(second, merkle.root_of(second, node), hashes)
    except KeyError:
        return None
