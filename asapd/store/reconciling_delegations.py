"""Whether every delegation, and every revocation of one, has its entry in the log, which says the same."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.masking import is_masked_form
from asapd.core.row_digest import row_digest
from asapd.core.types import format_us
from asapd.store.erasures import Erasures
from asapd.store.findings import Findings, Tally, takes
from asapd.store.rows import fetch, fetch_one


def reconcile_delegations(connection: apsw.Connection, erasures: Erasures) -> Tally:
    """Compare every delegation, and its revocation, with the log, and the reverse."""
    findings = Findings()
    made_at, revoked_at = erasures.times("delegation.created"), erasures.times("delegation.revoked")
    created: dict[str, tuple[int, int, dict[str, Any]]] = {}
    revoked: dict[str, list[tuple[int, str, str | None]]] = {}
    entries = erased = rows = 0
    delegations = fetch(
        connection,
        "SELECT id, delegator, delegate, scopes, max_cost_microusd, max_tasks, expires_us, digest, revoked_us, "
        "registered_us, revoked_by, revoke_reason, CASE WHEN parent IS NOT NULL "
        "THEN coalesce((SELECT id FROM delegation above WHERE above.account = d.parent), '') END, "
        "tenant, jti, issued_us, not_before_us, token "
        "FROM delegation d ORDER BY account",
    )
    for seq, kind, subject, details, at_us, actor in fetch(
        connection,
        "SELECT seq, event_type, subject, details, timestamp_us, actor FROM audit "
        "WHERE event_type IN ('delegation.created', 'delegation.revoked') ORDER BY seq",
    ):
        if details is None:
            erased += 1
        elif kind == "delegation.created":
            entries += 1
            created[subject] = (seq, at_us, msgspec.json.decode(details))
        elif (told := msgspec.json.decode(details))["id"] is not None:  # None: of a token that nobody had shown here
            revoked.setdefault(subject, []).append((at_us, actor, told["reason"]))
    for (
        public_id,
        delegator,
        delegate,
        scopes,
        cost,
        tasks,
        expires_us,
        digest,
        revoked_us,
        made_us,
        *more,
    ) in delegations:
        rows += 1
        revoked_by, why, parent, *unsaid = more
        was_revoked = public_id in revoked or takes(revoked_at, revoked_us)
        if (revoked_us is not None) != was_revoked:
            state = "revoked" if revoked_us is not None else "not revoked"
            findings.add(f"delegation {public_id} is {state}, and the log says otherwise")
        elif public_id in revoked and not any(
            (at_us, actor) == (revoked_us, revoked_by) and is_masked_form(reason, why)
            for at_us, actor, reason in revoked[public_id]
        ):
            findings.add(f"delegation {public_id}: when, by whom and why it was revoked is not what the log says")
        elif revoked_us is None and (revoked_by, why) != (None, None):
            findings.add(f"delegation {public_id} says who revoked it, and nobody did")
        found = created.pop(public_id, None)
        if found is None:
            if not takes(made_at, made_us):
                findings.add(f"delegation {public_id} has no entry in the log")
            continue
        seq, at_us, told = found
        if made_us != at_us:
            findings.add(f"delegation {public_id}: registered_us is {made_us}, and entry {seq} is of {at_us}")
        if "row_digest" in told and told["row_digest"] != row_digest(unsaid):
            findings.add(
                f"delegation {public_id}: is not what was registered, by the digest that entry {seq} has of it"
            )
        is_row = {
            "delegator": delegator,
            "delegate": delegate,
            "scopes": msgspec.json.decode(scopes),
            "max_cost_microusd": cost,
            "max_tasks": tasks,
            "parent": parent,
            "expires_at": format_us(expires_us),
            "digest": digest.hex(),
        }
        if "tenant" in told:  # which entries of older versions do not say
            is_row["tenant"] = unsaid[0]
        for field, value in is_row.items():
            if told.get(field) != value:
                findings.add(f"delegation {public_id}: {field} is {value!r}, and entry {seq} says {told.get(field)!r}")
    for public_id, (seq, _, _) in created.items():
        # Written while this ran, or gone: which of them, a second look says.
        if fetch_one(connection, "SELECT 1 FROM delegation WHERE id = ?", (public_id,)) is None:
            findings.add(f"entry {seq} (delegation.created {public_id}): there is no such delegation")
    return Tally("delegation", rows, entries, 0, erased, findings.count, tuple(findings.named))
