"""Revoking: a subtree by its parent links, and tokens that were never seen, by their own names (issuer, jti)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import apsw
import msgspec

from asapd.core.denial import revoked
from asapd.core.errors import Refusal
from asapd.core.types import format_us
from asapd.store import delegation_news
from asapd.store.parties import HOLDER, OWNER
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.delegations import ImportRevocations, Revocation, RevocationsImported, Revoke, Revoked

_TREE = f"""
WITH RECURSIVE tree (account, depth) AS (
  SELECT ?, 0 UNION ALL
  SELECT d.account, depth + 1 FROM delegation d JOIN tree ON d.parent = tree.account
)
SELECT account, id, delegator, jti, delegate, {OWNER}, {HOLDER}, expires_us, revoked_us
FROM tree JOIN delegation d USING (account) ORDER BY depth, account
"""
_REVOKE = """
UPDATE delegation SET revoked_us = ?, revoked_by = ?, revoke_reason = ?
WHERE account IN (SELECT value FROM json_each(?))
"""
# A row that was there is replaced, which gives it a new number.
_PUT = """
INSERT OR REPLACE INTO revocation (issuer, jti, revoked_us, expires_us, recorded_us)
SELECT value->>0, value->>1, value->>2, value->>3, ? FROM json_each(?)
"""


class _Branch(msgspec.Struct, frozen=True):
    """One delegation of a subtree."""

    account: int
    id: str
    delegator: str
    jti: str
    delegate: str
    owner: str
    holder: str
    expires_us: int
    revoked_us: int | None


class _Registered(NamedTuple):
    """A token of a list that is registered here: account, public id, and when it expires by its own word."""

    account: int
    id: str
    expires_us: int


class _Act(msgspec.Struct, frozen=True):
    """What is the same for all that one request revokes; `source` is who signed the list that said so."""

    actor: str
    reason: str
    now_us: int
    source: str | None = None


def refuse_revoked(tx: Tx, delegator: str, jti: str, position: int) -> None:
    """Refuse a token that was revoked before it was seen; in its chain 0 is the last.

    Raises:
        RefuseError: with the denial.
    """
    if tx.row("SELECT 1 FROM revocation WHERE issuer = ? AND jti = ?", (delegator, jti)) is not None:
        raise RefuseError(revoked(jti, delegator, position=position))


def revoke(tx: Tx, unit: Revoke) -> Revoked:
    """Revoke the subtree under a delegation; what was revoked before stays as it was."""
    row = tx.row("SELECT account FROM delegation WHERE id = ?", (unit.id,))
    if row is None:
        raise RefuseError(Refusal("delegation_not_found", f"there is no delegation {unit.id}: check the id"))
    subtree = _subtree(tx, row[0])
    fresh = [branch for branch in subtree if branch.revoked_us is None]
    _revoke(tx, fresh, unit.id, _Act(unit.actor, unit.reason, unit.now_us))
    return Revoked([branch.id for branch in subtree], len(fresh))


def import_list(tx: Tx, unit: ImportRevocations) -> RevocationsImported:
    """Merge a list: of each token the earliest revocation and the latest expiry count, so order and repeats do not.

    Of a registered token the expiry is known: a list that says an earlier one must not have it forgotten before.
    """
    known = _known(tx, unit.entries)
    registered = _accounts(tx, unit.entries)
    fresh: list[Revocation] = []
    merged: list[Revocation] = []
    expired = 0
    for said in unit.entries:
        ours = registered.get((said.issuer, said.jti))
        entry = (
            said if ours is None else msgspec.structs.replace(said, expires_us=max(said.expires_us, ours.expires_us))
        )
        if entry.expires_us <= unit.lapsed_us:
            expired += 1
            continue
        before = known.get((entry.issuer, entry.jti))
        after = entry if before is None else _merge(before, entry)
        if after == before:
            continue
        known[entry.issuer, entry.jti] = after
        merged.append(after)
        if before is None:
            fresh.append(entry)
    act = _Act(unit.actor, f"revoked by {unit.signer}", unit.now_us, unit.signer)
    roots = {name: registered[name] for one in fresh if (name := (one.issuer, one.jti)) in registered}
    ids: list[str] = []
    for cause, branches in _by_root(tx, roots):
        ids += [branch.id for branch in branches]
        _revoke(tx, branches, cause, act)
    _put(tx, merged, unit.now_us)
    unseen = {(one.issuer, one.jti): one for one in fresh if (one.issuer, one.jti) not in roots}
    _record_unseen(tx, list(unseen.values()), act)
    # Of one that a list names twice, the last that was merged is the one that stands.
    last = {(one.issuer, one.jti): one for one in merged}
    changed = [one for name, one in last.items() if one != unseen.get(name)]
    for one in changed:
        moved = {"expires_us": one.expires_us, "issuer": one.issuer, "jti": one.jti, "revoked_us": one.revoked_us}
        tx.audit("revocation.changed", act.actor, one.jti, moved, act.now_us)
    details = {
        "added": len(fresh),
        "changed": len(changed),
        "digest": unit.digest.hex(),
        "entries": len(unit.entries) - expired,
        "expired": expired,
        "key_id": unit.key_id,
        "not_allowed": unit.not_allowed,
        "number": unit.number,
        "revoked": len(ids),
        "signer": unit.signer,
    }
    tx.audit("revocations.imported", unit.actor, unit.signer, details, unit.now_us)
    return RevocationsImported(len(fresh), len(unit.entries) - expired - len(fresh), ids, expired)


def _merge(one: Revocation, other: Revocation) -> Revocation:
    return Revocation(one.issuer, one.jti, min(one.revoked_us, other.revoked_us), max(one.expires_us, other.expires_us))


def _subtree(tx: Tx, account: int) -> list[_Branch]:
    """A delegation and everything below it, whatever depth, parents first."""
    return [_Branch(*row) for row in fetch(tx.connection, _TREE, (account,))]


def _by_root(tx: Tx, roots: dict[tuple[str, str], _Registered]) -> Iterable[tuple[str, list[_Branch]]]:
    """What is newly revoked below each root, each branch under the first root that reaches it."""
    taken: set[int] = set()
    for account, cause, _ in roots.values():
        if account in taken:
            continue
        subtree = _subtree(tx, account)
        fresh = [one for one in subtree if one.revoked_us is None and one.account not in taken]
        taken.update(one.account for one in subtree)
        if fresh:
            yield cause, fresh


def _revoke(tx: Tx, branches: Sequence[_Branch], cause: str, act: _Act) -> None:
    if not branches:
        return
    accounts = msgspec.json.encode([branch.account for branch in branches]).decode()
    tx.execute(_REVOKE, (act.now_us, act.actor, act.reason, accounts))
    named = [Revocation(one.delegator, one.jti, act.now_us, one.expires_us) for one in branches]
    known = _known(tx, named)
    _put(tx, [one for one in named if (one.issuer, one.jti) not in known], act.now_us)
    for branch in branches:
        details = {"cause": cause, "id": branch.id, "reason": act.reason}
        if act.source is not None:
            details["source"] = act.source
        tx.audit("delegation.revoked", act.actor, branch.id, details, act.now_us)
    told = [
        delegation_news.Party(
            one.delegator, one.delegate, one.owner, one.id, one.jti, format_us(one.expires_us), one.holder
        )
        for one in branches
    ]
    params = {"cause": cause, "reason": act.reason, "revoked_at": format_us(act.now_us), "source": act.source}
    delegation_news.add_revoked(tx, params, told, act.now_us, next((one for one in told if one.id == cause), None))


def _record_unseen(tx: Tx, entries: Sequence[Revocation], act: _Act) -> None:
    """Tell of tokens that are revoked before anybody showed them here."""
    for entry in entries:
        details = {
            "cause": entry.jti,
            "expires_at": format_us(entry.expires_us),
            "id": None,
            "issuer": entry.issuer,
            "jti": entry.jti,
            "reason": act.reason,
            "revoked_us": entry.revoked_us,
            "source": act.source,
        }
        tx.audit("delegation.revoked", act.actor, entry.jti, details, act.now_us)
    delegation_news.add_revoked(
        tx,
        {"cause": None, "reason": act.reason, "revoked_at": format_us(act.now_us), "source": act.source},
        [delegation_news.Party(one.issuer, None, None, None, one.jti, format_us(one.expires_us)) for one in entries],
        act.now_us,
    )


def _put(tx: Tx, entries: Sequence[Revocation], now_us: int) -> None:
    if entries:
        tx.execute(_PUT, (now_us, _json(entries)))


def _known(tx: Tx, entries: Sequence[Revocation]) -> dict[tuple[str, str], Revocation]:
    rows = fetch(
        tx.connection,
        "SELECT issuer, jti, revoked_us, expires_us FROM json_each(?) "
        "JOIN revocation ON issuer = value->>0 AND jti = value->>1",
        (_json(entries),),
    )
    return {(row[0], row[1]): Revocation(*row) for row in rows}


def _accounts(tx: Tx, entries: Sequence[Revocation]) -> dict[tuple[str, str], _Registered]:
    """Which of the tokens are registered."""
    rows = fetch(
        tx.connection,
        "SELECT d.delegator, d.jti, d.account, d.id, d.expires_us FROM json_each(?) "
        "JOIN delegation d ON d.delegator = value->>0 AND d.jti = value->>1 ORDER BY d.account",
        (_json(entries),),
    )
    return {(row[0], row[1]): _Registered(*row[2:]) for row in rows}


def _json(entries: Sequence[Revocation]) -> str:
    return msgspec.json.encode([msgspec.structs.astuple(entry) for entry in entries]).decode()


def forget_lapsed(tx: Tx, before_us: int, limit: int) -> int:
    """Forget revocations of tokens that expired before then: nobody can use those anyway. Returns how many."""
    tx.execute(
        "DELETE FROM revocation WHERE number IN (SELECT number FROM revocation "
        "WHERE expires_us < min(?, coalesce((SELECT max(timestamp_us) FROM audit), 0)) LIMIT ?)",
        (before_us, limit),
    )
    return tx.connection.changes()


# --- reading


def revoked_after(connection: apsw.Connection, number: int) -> list[Row]:
    """(number, issuer, jti, expires_us) of every revocation recorded behind a number."""
    return fetch(
        connection, "SELECT number, issuer, jti, expires_us FROM revocation WHERE number > ? ORDER BY number", (number,)
    )


class Standing(msgspec.Struct, frozen=True):
    """All revocations in force: the highest number ever given, when the newest of them came, and they, by name."""

    number: int
    updated_us: int | None
    entries: list[Revocation]


def standing(connection: apsw.Connection, after_us: int) -> Standing:
    """The revocations of tokens that expire after a time."""
    rows = fetch(
        connection,
        "SELECT issuer, jti, revoked_us, expires_us, recorded_us FROM revocation WHERE expires_us > ? "
        "ORDER BY issuer, jti",
        (after_us,),
    )
    entries = [Revocation(*row[:4]) for row in rows]
    return Standing(newest_number(connection), max((row[4] for row in rows), default=None), entries)


def recorded_since(connection: apsw.Connection, number: int, after_us: int, limit: int) -> Standing:
    """The first revocations behind a number of tokens that expire after a time, in the order in which they came.

    Its own number is where the next part begins: the last one's, or where no more stand behind them the highest given.
    """
    newest = newest_number(connection)
    rows = fetch(
        connection,
        "SELECT issuer, jti, revoked_us, expires_us, recorded_us, number FROM revocation "
        "WHERE number > ? AND expires_us > ? ORDER BY number LIMIT ?",
        (number, after_us, limit),
    )
    through = rows[-1][5] if len(rows) == limit else newest
    return Standing(through, max((row[4] for row in rows), default=None), [Revocation(*row[:4]) for row in rows])


def newest_number(connection: apsw.Connection) -> int:
    """The highest number ever given."""
    row = fetch_one(connection, "SELECT seq FROM sqlite_sequence WHERE name = 'revocation'")
    return 0 if row is None else int(row[0])
