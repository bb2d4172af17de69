"""What each agent was held to, from when on, and the holds that run: what a restart and the past have to go by."""

from __future__ import annotations

from asapd.store.schema.guards import append_only

SCRIPT = """
-- `source` NULL: nothing was promised. `sla` has the form of a manifest's block. `error` is what was wrong with a
-- source that therefore did not count.
CREATE TABLE promise (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  agent TEXT NOT NULL,
  tenant TEXT NOT NULL,
  since_us INTEGER NOT NULL,
  source TEXT,
  sla TEXT,
  manifest_digest TEXT,
  error TEXT
) STRICT;
CREATE INDEX promise_agent ON promise (agent, tenant, seq);
CREATE INDEX manifest_good ON manifest (agent, seq) WHERE sla_error IS NULL;

-- Since when a term is about to be breached (`pending`) or an open breach of it to resolve (`resolving`).
CREATE TABLE breach_hold (
  agent TEXT NOT NULL,
  breach_type TEXT NOT NULL,
  phase TEXT NOT NULL,
  since_us INTEGER NOT NULL,
  threshold TEXT,
  PRIMARY KEY (agent, breach_type)
) STRICT, WITHOUT ROWID;

-- What is certain of the time before: agents that never had another source than their manifest, nor another tenant.
INSERT INTO promise (agent, tenant, since_us, source, sla, manifest_digest)
SELECT m.agent, a.tenant, m.fetched_us, 'manifest', m.sla, m.digest
FROM manifest m JOIN agent a ON a.id = m.agent
WHERE m.sla_error IS NULL AND a.sla IS NULL
  AND NOT EXISTS (
    SELECT 1 FROM manifest o WHERE o.agent = m.agent AND o.sla_error IS NULL AND coalesce(o.sla, '{}') = '{}'
  )
  AND NOT EXISTS (
    SELECT 1 FROM agent_event e WHERE e.agent = m.agent AND (
      e.tenant <> a.tenant OR e.event IN ('added', 'changed') AND json_extract(e.details, '$.sla') IS NOT NULL
    )
  )
ORDER BY m.seq;
""" + append_only("promise")
