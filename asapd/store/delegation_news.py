"""What followers of delegations are told: what was revoked, and work that was done without permission. Numbered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from asapd.store.rows import fetch
from asapd.store.tx import Tx

# One notification is read whole by whoever follows: 500 tokens are some hundred kilobytes at most.
AT_ONCE = 500


class Party(msgspec.Struct, frozen=True, omit_defaults=True):
    """One revoked token, with the tenants of its issuer and its delegate.

    `delegate`, the tenants and `id` are None of one that was never seen here.
    """

    issuer: str
    delegate: str | None
    tenant: str | None
    id: str | None
    jti: str
    expires_at: str
    holder: str | None = None


class Unauthorised(msgspec.Struct, frozen=True):
    """One usage event that no delegation allowed."""

    id: str
    seq: int
    task_id: str
    agent: str
    consumer: str
    action: str
    delegation: str | None
    delegator: str | None
    code: str


class News(msgspec.Struct, frozen=True):
    """News of revoked tokens, or of unauthorised events of one tenant. `params` is what all of it shares.

    `cause` is the token whose revocation took the others along, where one is registered.
    """

    seq: int
    params: dict[str, Any]
    revoked: list[Party] = []
    unauthorised: list[Unauthorised] = []
    tenant: str | None = None
    cause: Party | None = None


class _Body(msgspec.Struct, frozen=True, omit_defaults=True):
    params: dict[str, Any]
    revoked: list[Party] = []
    unauthorised: list[Unauthorised] = []
    tenant: str | None = None
    cause: Party | None = None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Body)


def add_revoked(
    tx: Tx, params: dict[str, Any], tokens: Sequence[Party], now_us: int, cause: Party | None = None
) -> None:
    """Tell of revoked tokens, so many at once."""
    for start in range(0, len(tokens), AT_ONCE):
        _add(tx, _Body(params, revoked=list(tokens[start : start + AT_ONCE]), cause=cause), now_us)


def add_unauthorised(tx: Tx, params: dict[str, Any], events: Sequence[Unauthorised], tenant: str, now_us: int) -> None:
    """Tell of events that no delegation allowed, so many at once."""
    for start in range(0, len(events), AT_ONCE):
        _add(tx, _Body(params, unauthorised=list(events[start : start + AT_ONCE]), tenant=tenant), now_us)


def _add(tx: Tx, body: _Body, now_us: int) -> None:
    tx.execute("INSERT INTO delegation_news (ts_us, body) VALUES (?, ?)", (now_us, _encoder.encode(body)))


def forget_old(tx: Tx, before_us: int, limit: int) -> int:
    """Forget news from before a time. Returns how many."""
    tx.execute(
        "DELETE FROM delegation_news WHERE seq IN "
        "(SELECT seq FROM delegation_news WHERE ts_us < ? ORDER BY ts_us, seq LIMIT ?)",
        (before_us, limit),
    )
    return tx.connection.changes()


# Most do not have the name anywhere; where one has, it may be that of a tenant, a task or an agent.
_NAMING = """
SELECT seq FROM delegation_news WHERE seq > ? AND seq <= ? AND instr(body, ?) > 0
AND EXISTS (SELECT 1 FROM json_each(CASE WHEN json_valid(CAST(body AS TEXT)) THEN CAST(body AS TEXT) ELSE '{}' END,
'$.unauthorised') WHERE value ->> 'consumer' = ?) ORDER BY seq LIMIT ?
"""


def naming(connection: apsw.Connection, consumer: str, after: int, limit: int, through: int = 2**63 - 1) -> list[int]:
    """The numbers of news about usage of a consumer, from behind `after` up to `through`."""
    rows = fetch(connection, _NAMING, (after, through, _encoder.encode(consumer), consumer, limit))
    return [seq for (seq,) in rows]


def rename_consumer(tx: Tx, seqs: Sequence[int], consumer: str, to: str) -> None:
    """Have some news name a consumer otherwise."""
    for seq in seqs:
        row = tx.row("SELECT body FROM delegation_news WHERE seq = ?", (seq,))
        if row is None:
            continue  # it was forgotten meanwhile
        body = _decoder.decode(row[0])
        events = [
            msgspec.structs.replace(event, consumer=to) if event.consumer == consumer else event
            for event in body.unauthorised
        ]
        renamed = _encoder.encode(msgspec.structs.replace(body, unauthorised=events))
        tx.execute("UPDATE delegation_news SET body = ? WHERE seq = ?", (renamed, seq))


def news_after(connection: apsw.Connection, seq: int, limit: int) -> list[News]:
    """News behind a number, in order."""
    rows = fetch(connection, "SELECT seq, body FROM delegation_news WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))
    found = []
    for number, raw in rows:
        body = _decoder.decode(raw)
        found.append(News(number, body.params, body.revoked, body.unauthorised, body.tenant, body.cause))
    return found


def newest_news(connection: apsw.Connection) -> int:
    """The number of the newest piece, whether or not it is kept; 0 before the first."""
    rows = fetch(connection, "SELECT seq FROM sqlite_sequence WHERE name = 'delegation_news'")
    return int(rows[0][0]) if rows else 0
