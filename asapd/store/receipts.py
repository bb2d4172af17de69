"""The entries behind a task: of its usage, its steps, and the delegations it was done under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw
import msgspec

from asapd.store import seals
from asapd.store.audit import get_entry, reading_entries
from asapd.store.parties import HOLDER, OWNER, debited, paid
from asapd.store.rows import fetch
from asapd.store.seals import Proof
from asapd.store.usage_tasks import OF_TASK, of_task
from asapd.store.visibility import Visibility, visible_names

MOST = 1_000
"""Entries of one receipt: each has a proof of some twenty hashes, two kilobytes in all."""


class TooManyEntriesError(Exception):
    """A task has more entries than a receipt holds; its usage can be exported, and any entry proved by itself."""


def entries_of(
    connection: apsw.Connection, visible: Visibility, may_see_given: Callable[..., bool], task: str
) -> list[dict[str, Any]]:
    """The entries of a task in their order, as far as its rows are visible.

    `may_see_given` is asked with the tenants of both ends of each delegation, and the ends.

    Raises:
        TooManyEntriesError: there are more than `MOST`.
        UnreadableEntryError: one that may be of the task cannot be read.
    """
    where, values = visible_names(visible, ("agent", "consumer"))
    rows = fetch(
        connection,
        f"SELECT seq, committed_us FROM usage WHERE {' AND '.join([OF_TASK, *(f'+({its})' for its in where)])} LIMIT ?",
        (*of_task(task), *values, MOST + 1),
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
    commits: dict[int, set[int]] = {}
    for seq, committed_us in rows:
        commits.setdefault(committed_us, set()).add(seq)
    for committed_us, own in commits.items():
        with reading_entries():
            found = fetch(
                connection,
                "SELECT seq, details ->> 'row' FROM audit WHERE timestamp_us = ? "
                "AND event_type IN ('usage.recorded', 'usage.voided', 'usage.repriced') ORDER BY seq",
                (committed_us,),
            )
        seqs.update(seq for seq, row in found if row in wanted)
        if any(row is None for _, row in found):
            seqs.update(_without_content(connection, committed_us, [seq for seq, _ in found], own))
    for (committed_us,) in steps:
        found = fetch(
            connection,
            "SELECT seq FROM audit WHERE timestamp_us = ? AND event_type IN "
            "('task.started', 'task.completed', 'task.failed', 'task.abandoned') AND subject = ?",
            (committed_us, task),
        )
        seqs.update(seq for (seq,) in found)
    seqs.update(_delegated(connection, wanted, may_see_given))
    if len(seqs) > MOST:
        raise TooManyEntriesError
    entries = (get_entry(connection, str(seq)) for seq in sorted(seqs))
    return [entry for entry in entries if entry is not None]


def _without_content(connection: apsw.Connection, committed_us: int, entries: list[int], wanted: set[int]) -> set[int]:
    """The entries of some rows of a commit, though content was erased: rows and entries of it stand in one order.

    Without them a receipt would say less than was used, and not that it does. None, where retention took rows of it.
    """
    first, last = min(wanted) - len(entries), max(wanted) + len(entries)
    rows = fetch(
        connection,
        "SELECT seq FROM usage WHERE seq BETWEEN ? AND ? AND committed_us = ? ORDER BY seq",
        (first, last, committed_us),
    )
    if len(rows) != len(entries):
        return set()
    return {entry for entry, (row,) in zip(entries, rows, strict=True) if row in wanted}


def _delegated(connection: apsw.Connection, rows: set[int], may_see_given: Callable[..., bool]) -> set[int]:
    """The entries of delegations that rows of usage were debited to, and of all they were given under.

    A row may name a delegation that is another's: nothing is debited to it then, and nothing said of it.
    """
    found = fetch(
        connection,
        "WITH RECURSIVE path(account) AS ("
        "SELECT d.account FROM usage JOIN delegation d ON d.id = usage.delegation "
        "LEFT JOIN reservation r ON r.id = usage.reservation AND r.account = d.account "
        "WHERE usage.seq IN (SELECT value FROM json_each(?)) "
        "AND usage.agent = (SELECT id FROM name WHERE name = d.delegate) "
        f"AND ({debited()} OR (r.id IS NOT NULL AND {paid()})) "
        "UNION SELECT d.parent FROM delegation d JOIN path USING (account) WHERE d.parent IS NOT NULL) "
        f"SELECT audit.seq, {OWNER}, {HOLDER}, d.delegator, d.delegate FROM path JOIN delegation d USING (account) "
        "JOIN audit ON audit.timestamp_us = d.registered_us "
        "AND audit.event_type = 'delegation.created' AND audit.subject = d.id",
        (msgspec.json.encode(sorted(rows)).decode(),),
    )
    return {seq for seq, *given in found if may_see_given(*given)}


def proofs_of(connection: apsw.Connection, seqs: list[int], size: int) -> list[Proof] | None:
    """What proves each entry to be among the first `size`; None when a node is missing."""
    proofs = [seals.inclusion(connection, seq, size) for seq in seqs]
    found = [proof for proof in proofs if proof is not None]
    return found if len(found) == len(proofs) else None
