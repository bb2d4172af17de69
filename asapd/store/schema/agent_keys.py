"""Public keys of agents, each with where it comes from."""

from __future__ import annotations

# `until_us` ends the overlap of a retired key. Private keys are never here.
SCRIPT = """
CREATE TABLE agent_key (
  agent TEXT NOT NULL,
  public_key BLOB NOT NULL,
  source TEXT NOT NULL,
  state TEXT NOT NULL,
  since_us INTEGER NOT NULL,
  retired_us INTEGER,
  until_us INTEGER,
  PRIMARY KEY (agent, public_key, source)
) STRICT, WITHOUT ROWID;
"""
