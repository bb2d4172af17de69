"""Agents that left the directory, or their tenant: what they were for who had them last may be asked for still."""

from __future__ import annotations

import apsw

from asapd.store.agents import DirectoryAgent
from asapd.store.rows import fetch_one
from asapd.store.visibility import Visibility, visible_text


def last_held(connection: apsw.Connection, visible: Visibility, agent: str) -> DirectoryAgent | None:
    """An agent as a caller's tenant had it last, for as long as it had it; None when it never left that tenant.

    What it was held to is in the record of promises; of all else but the time nothing is known.
    """
    where, values = visible_text(visible, ("agent",))
    left = fetch_one(
        connection,
        f"SELECT seq, ts_us, tenant FROM agent_event WHERE {' AND '.join(['agent = ?', *where])} AND event = 'removed' "
        "ORDER BY seq DESC LIMIT 1",
        (agent, *values),
    )
    if left is None:
        return None
    seq, until_us, tenant = left
    (foreign,) = fetch_one(
        connection,
        "SELECT max(seq) FROM agent_event WHERE agent = ? AND tenant <> ? AND seq < ?",
        (agent, tenant, seq),
    ) or (None,)
    since_us = 0
    if foreign is not None:
        (since_us,) = fetch_one(
            connection,
            "SELECT ts_us FROM agent_event WHERE agent = ? AND seq > ? ORDER BY seq LIMIT 1",
            (agent, foreign),
        ) or (until_us,)
    return DirectoryAgent(
        agent,
        url="",
        tenant=tenant,
        origin="",
        public_key=None,
        tier=None,
        sla=None,
        added_us=since_us,
        state="unknown",
        since_us=until_us,
        ok_streak=0,
        fail_streak=0,
        manifest=None,
        last_probe=None,
        held_since_us=since_us,
        held_until_us=until_us,
    )
