"""What is not to be pushed: breaches that somebody acknowledged, and silences."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.errors import Refusal
from asapd.core.types import format_us, pattern_matches
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.alerts import AckBreach, AddSilence, BreachAcked, BreachRow, RemoveSilence, Silence

MOST_SILENCES = 1_000
"""In force at once: each is looked at for every transition."""

_COLUMNS = "id, agent, breach_type, severity, tenant, created_us, ends_us, author, comment"


class Mark(msgspec.Struct, frozen=True):
    """What a transition is marked with: the silence that fits it, who acknowledged the breach, why it is held back."""

    silence: str | None
    acknowledged: dict[str, Any] | None
    held: str | None


def mark(tx: Tx, breach: BreachRow, event: str, now_us: int) -> Mark:
    """How a transition of this moment is marked. Whoever was told of a breach is told of its end as well."""
    acknowledged = acknowledgement(tx.connection, breach.id)
    fitting = (one for one in _in_force(tx.connection, now_us) if _fits(one, breach))
    silence = next(fitting, None)
    if event == "resolved":
        held = None if _was_told(tx, breach.id) else "silenced"
    elif silence is not None:
        held = "silenced"
    else:
        held = None if acknowledged is None else "acknowledged"
    return Mark(None if silence is None else silence.id, acknowledged, held)


def _was_told(tx: Tx, breach: str) -> bool:
    """Whether a transition of a breach was not held back, of those that are kept or of those that retention took."""
    if any(_told.decode(body).held is None for (body,) in _alerts_of(tx.connection, breach)):
        return True
    return tx.row("SELECT 1 FROM breach_told WHERE breach = ?", (breach,)) is not None


class _Told(msgspec.Struct):
    held: str | None = None


_told = msgspec.json.Decoder(_Told)


def _alerts_of(connection: apsw.Connection, breach: str) -> list[Row]:
    return fetch(connection, "SELECT body FROM alert WHERE breach = ?", (breach,))


def _fits(silence: Silence, breach: BreachRow) -> bool:
    return (
        (silence.agent is None or (breach.agent_id is not None and pattern_matches(silence.agent, breach.agent_id)))
        and silence.breach_type in {None, breach.breach_type}
        and silence.severity in {None, breach.severity}
        and silence.tenant in {None, breach.tenant}
    )


def _in_force(connection: apsw.Connection, now_us: int) -> list[Silence]:
    rows = fetch(connection, f"SELECT {_COLUMNS} FROM silence WHERE ends_us > ? ORDER BY ends_us DESC, id", (now_us,))
    return [Silence(*row) for row in rows]


def list_silences(connection: apsw.Connection, now_us: int, *, expired: bool) -> list[Silence]:
    """Silences in force, the last to end first; with `expired` those that are over and still kept too."""
    return _in_force(connection, -1 if expired else now_us)


def get_silence(connection: apsw.Connection, silence: str) -> Silence | None:
    """One silence by its id."""
    row = fetch_one(connection, f"SELECT {_COLUMNS} FROM silence WHERE id = ?", (silence,))
    return None if row is None else Silence(*row)


def acknowledgement(connection: apsw.Connection, breach: str) -> dict[str, Any] | None:
    """Who acknowledged a breach, when and with what comment, as users see it."""
    row = fetch_one(connection, "SELECT at_us, actor, comment FROM breach_ack WHERE breach = ?", (breach,))
    return None if row is None else {"at": format_us(row[0]), "by": row[1], "comment": row[2]}


def acknowledgements(connection: apsw.Connection, breaches: list[str]) -> dict[str, dict[str, Any]]:
    """The same for many breaches at once; one that nobody acknowledged is not among them."""
    rows = fetch(
        connection,
        "SELECT breach, at_us, actor, comment FROM breach_ack WHERE breach IN (SELECT value FROM json_each(?))",
        (msgspec.json.encode(breaches).decode(),),
    )
    return {row[0]: {"at": format_us(row[1]), "by": row[2], "comment": row[3]} for row in rows}


def acknowledge(tx: Tx, unit: AckBreach) -> BreachAcked:
    """Acknowledge an open breach; a second time changes nothing and answers the first."""
    row = tx.row("SELECT state, agent_id, budget FROM breach WHERE id = ?", (unit.breach,))
    if row is None:
        raise RefuseError(Refusal("breach_not_found", f"there is no breach {unit.breach}: check the id"))
    known = acknowledgement(tx.connection, unit.breach)
    if known is not None:
        return BreachAcked(known, created=False)
    if row[0] != "open":
        detail = f"breach {unit.breach} is {row[0]}: only what is open can be acknowledged"
        raise RefuseError(Refusal("breach_closed", detail))
    tx.execute("INSERT INTO breach_ack VALUES (?,?,?,?)", (unit.breach, unit.now_us, unit.actor, unit.comment))
    details = {"agent": row[1], "budget": row[2], "comment": unit.comment, "id": unit.breach}
    tx.audit("breach.acknowledged", unit.actor, unit.breach, details, unit.now_us)
    made = {"at": format_us(unit.now_us), "by": unit.actor, "comment": unit.comment}
    return BreachAcked(made, created=True)


def add(tx: Tx, unit: AddSilence) -> Silence:
    """Put a silence in force; those that ended a month ago are forgotten."""
    tx.execute("DELETE FROM silence WHERE ends_us < ?", (unit.forget_before_us,))
    if len(_in_force(tx.connection, unit.now_us)) >= MOST_SILENCES:
        detail = f"{MOST_SILENCES} silences are in force: remove some, or make one that fits more"
        raise RefuseError(Refusal("too_many_silences", detail))
    wanted = unit.silence
    made = msgspec.structs.replace(wanted, id=tx.new_id("sil", unit.now_us), created_us=unit.now_us)
    tx.execute("INSERT INTO silence VALUES (?,?,?,?,?,?,?,?,?)", msgspec.structs.astuple(made))
    tx.audit("silence.added", unit.actor, made.id, _details(made), unit.now_us)
    return made


def remove(tx: Tx, unit: RemoveSilence) -> Silence:
    """End a silence now; one that is over stays as it is."""
    known = get_silence(tx.connection, unit.id)
    if known is None:
        raise RefuseError(Refusal("silence_not_found", f"there is no silence {unit.id}: see the list of silences"))
    if known.ends_us <= unit.now_us:
        return known
    tx.execute("UPDATE silence SET ends_us = ? WHERE id = ?", (unit.now_us, unit.id))
    tx.audit("silence.removed", unit.actor, unit.id, _details(known), unit.now_us)
    return msgspec.structs.replace(known, ends_us=unit.now_us)


def _details(silence: Silence) -> dict[str, Any]:
    return {
        "agent": silence.agent,
        "author": silence.author,
        "breach_type": silence.breach_type,
        "comment": silence.comment,
        "ends_us": silence.ends_us,
        "id": silence.id,
        "severity": silence.severity,
        "tenant": silence.tenant,
    }
