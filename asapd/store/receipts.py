"""The entries behind a task: of its usage, its steps, and the delegations it was done under."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.store import seals
from asapd.store.audit import get_entry
from asapd.store.rows import fetch
from asapd.store.seals import Proof
from asapd.store.usage_queries import OF_TASK
from asapd.store.visibility import Visibility, visible_names

MOST = 1_000
"""Entries of one receipt: each has a proof of some twenty hashes, two kilobytes in all."""


class TooManyEntriesError(Exception):
    """A task has more entries than a receipt holds; its usage can be exported, and any entry proved by itself."""


def entries_of(connection: apsw.Connection, visible: Visibility, task: str) -> list[dict[str, Any]]:
    """The entries of a task in their order, as far as its rows are visible.

    Raises:
        TooManyEntriesError: there are more than `MOST`.
    """
    where, values = visible_names(visible, ("agent", "consumer"))
    rows = fetch(
        connection,
        f"SELECT seq, committed_us, delegation FROM usage WHERE {' AND '.join([OF_TASK, *where])} LIMIT ?",
        (task, task, *values, MOST + 1),
    )
    steps = fetch(
        connection,
        f"SELECT DISTINCT committed_us FROM task WHERE {' AND '.join(['task_id = ?', *where])} LIMIT ?",
        (task, *values, MOST),
    )
    if len(rows) > MOST:
        raise TooManyEntriesError
    wanted = {row[0] for row in rows}
    seqs: set[int] = set()
    # Entries have no index by what they are about, but one by the time of their commit, which rows share.
    for committed_us in {row[1] for row in rows}:
        found = fetch(
            connection,
            "SELECT seq, details ->> 'row' FROM audit WHERE timestamp_us = ? "
            "AND event_type IN ('usage.recorded', 'usage.voided', 'usage.repriced')",
            (committed_us,),
        )
        seqs.update(seq for seq, row in found if row in wanted)
    for (committed_us,) in steps:
        found = fetch(
            connection,
            "SELECT seq FROM audit WHERE timestamp_us = ? AND event_type IN "
            "('task.started', 'task.completed', 'task.failed', 'task.abandoned') AND subject = ?",
            (committed_us, task),
        )
        seqs.update(seq for (seq,) in found)
    seqs.update(_delegated(connection, {row[2] for row in rows if row[2] is not None}))
    if len(seqs) > MOST:
        raise TooManyEntriesError
    entries = (get_entry(connection, str(seq)) for seq in sorted(seqs))
    return [entry for entry in entries if entry is not None]


def _delegated(connection: apsw.Connection, delegations: set[str]) -> set[int]:
    """The entries of delegations and of all they were given under."""
    found = fetch(
        connection,
        "WITH RECURSIVE path(account, id, parent, registered_us) AS ("
        "SELECT account, id, parent, registered_us FROM delegation WHERE id IN (SELECT value FROM json_each(?)) UNION "
        "SELECT d.account, d.id, d.parent, d.registered_us FROM delegation d JOIN path ON d.account = path.parent) "
        "SELECT audit.seq FROM path JOIN audit ON audit.timestamp_us = path.registered_us "
        "AND audit.event_type = 'delegation.created' AND audit.subject = path.id",
        (msgspec.json.encode(sorted(delegations)).decode(),),
    )
    return {seq for (seq,) in found}


def proofs_of(connection: apsw.Connection, seqs: list[int], size: int) -> list[Proof] | None:
    """What proves each entry to be among the first `size`; None when a node is missing."""
    proofs = [seals.inclusion(connection, seq, size) for seq in seqs]
    found = [proof for proof in proofs if proof is not None]
    return found if len(found) == len(proofs) else None
