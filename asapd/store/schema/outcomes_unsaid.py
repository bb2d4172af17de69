"""Ends of tasks that older builds took without an entry."""

from __future__ import annotations

SCRIPT = """
-- One row: how many rows of `task_outcome` were gone by now of which no entry says so, and from what time on none was:
-- of the oldest time that is left a step may have taken some. Zeros where all are there.
CREATE TABLE task_outcome_unsaid (count INTEGER NOT NULL, before_us INTEGER NOT NULL) STRICT;
INSERT INTO task_outcome_unsaid
SELECT max(gone, 0), iif(
  gone > 0, coalesce((SELECT min(timestamp_us) FROM task_outcome), (SELECT max(timestamp_us) FROM task), -1) + 1, 0
) FROM (
  -- The log is read only where rows are gone.
  SELECT iif(missing > 0, missing - coalesce(
    (
      SELECT sum(details ->> 'count') FROM audit
      WHERE event_type = 'retention.applied' AND subject = 'task_outcome' AND details IS NOT NULL
    ),
    0
  ), 0) AS gone FROM (
    SELECT coalesce((SELECT max(seq) FROM sqlite_sequence WHERE name = 'task_outcome'), 0)
           - (SELECT count(*) FROM task_outcome) AS missing
  )
);
"""
