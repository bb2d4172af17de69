"""Which of an agent's last probes failed, so that who watches it anew goes on counting."""

from __future__ import annotations

import apsw

from asapd.store.rows import fetch

_CAME_UP = """
SELECT coalesce(max(ts_us), 0) FROM agent_event
WHERE agent = ? AND event = 'state' AND new_state IN ('healthy', 'degraded')
  AND old_state NOT IN ('healthy', 'degraded')
"""
_LAST = """
SELECT up FROM probe WHERE agent = (SELECT id FROM name WHERE name = ?) AND ts_us > max(?, (
  SELECT held_since_us FROM agent WHERE id = ?
)) ORDER BY ts_us DESC, seq DESC LIMIT ?
"""


def failed_probes(connection: apsw.Connection, agents: list[str], count: int) -> dict[str, int]:
    """For each agent a bit for each of its last `count` probes since it came up, the newest lowest: set, it failed."""
    found: dict[str, int] = {}
    for agent in agents:
        ((came_up_us,),) = fetch(connection, _CAME_UP, (agent,))
        results = fetch(connection, _LAST, (agent, came_up_us, agent, count))
        found[agent] = sum((not up) << place for place, (up,) in enumerate(results))
    return found
