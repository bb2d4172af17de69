"""What else the directory knows of an agent: how its health is learned, whether it flaps, and its history."""

from __future__ import annotations

from asapd.store.schema.guards import append_only

# `health` is `probe`, or `heartbeat` for an agent that reports by itself; `changed`, `verdict` and `flapping_since_us`
# are what `asapd.core.flapping` remembers. Every change of state is one of the events, so the table of its own for
# those goes; what it holds is kept, of the tenant that the agent has now.
SCRIPT = """
ALTER TABLE agent ADD COLUMN health TEXT NOT NULL DEFAULT 'probe';
ALTER TABLE agent ADD COLUMN changed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE agent ADD COLUMN verdict TEXT;
ALTER TABLE agent ADD COLUMN flapping_since_us INTEGER;
ALTER TABLE probe ADD COLUMN pushed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE probe ADD COLUMN agent_status TEXT;

CREATE TABLE agent_event (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  agent TEXT NOT NULL,
  tenant TEXT NOT NULL,
  ts_us INTEGER NOT NULL,
  event TEXT NOT NULL,
  actor TEXT NOT NULL,
  old_state TEXT,
  new_state TEXT,
  reason TEXT,
  details TEXT
) STRICT;
CREATE INDEX agent_event_agent ON agent_event (agent, seq);
INSERT INTO agent_event (agent, tenant, ts_us, event, actor, old_state, new_state, reason)
SELECT t.agent, coalesce(a.tenant, 'default'), t.ts_us, 'state', 'asapd', t.old_state, t.new_state, t.reason
FROM agent_transition t LEFT JOIN agent a ON a.id = t.agent ORDER BY t.seq;
DROP TABLE agent_transition;
""" + append_only("agent_event")
