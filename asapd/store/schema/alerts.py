"""What is kept of alerts that retention took; since when an agent is of its tenant."""

from __future__ import annotations

SCRIPT = """
-- Open breaches of which a transition that is gone was not held back: whoever heard of it hears of the end as well.
CREATE TABLE breach_told (breach TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;

-- Since when an agent is of the tenant that it has, 0 where no other had it: what was served before is not this one's.
ALTER TABLE agent ADD COLUMN held_since_us INTEGER NOT NULL DEFAULT 0;
UPDATE agent SET held_since_us = coalesce(
  (
    SELECT min(e.ts_us) FROM agent_event e WHERE e.agent = agent.id AND e.seq > (
      SELECT max(f.seq) FROM agent_event f WHERE f.agent = agent.id AND f.tenant <> agent.tenant
    )
  ),
  0
);
"""
