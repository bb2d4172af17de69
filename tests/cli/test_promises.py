"""`asapctl maintenance`, the history and the evidence of promises, and `asapd verify` of that evidence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from asapd.cli import sla
from asapd.cli.door import Door
from asapd.cli.outcome import Exit
from tests.cli.programs import Daemon, Program

AGENT = f"urn:asap:agent:{uuid4().hex}"


def report(daemon: Daemon, failed: int, completed: int) -> None:
    door = Door(daemon.socket)
    door.post("/agents", {"id": AGENT, "url": "http://127.0.0.1:9", "sla": {"max_error_rate": "10%"}})
    at = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
    events = []
    for number in range(failed + completed):
        outcome = "failed" if number < failed else "completed"
        event = {
            "task_id": uuid4().hex,
            "agent": AGENT,
            "consumer": "c",
            "metrics": {"duration_ms": 5},
            "timestamp": at,
        }
        events.append({**event, "outcome": outcome, "cost_usd": "0.5"})
    # At once, so that the breach is of all of them.
    door.post("/usage", {"events": events})


def test_promises_are_followed_from_the_breach_to_its_evidence_and_the_credit(
    own_daemon: Daemon, ctl: Program, host: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(own_daemon, 10, 15)
    shown = ctl("sla", "show", AGENT, "--window", "1h").out
    assert "reputation: " in shown
    assert "(provisional)" in shown
    assert "error rate budget: " in shown
    hours = ctl("sla", "history", AGENT, "--json").json
    assert sum(row["tasks_failed"] for row in hours["data"]) == 10
    assert ctl("sla", "history", AGENT, "--resolution", "minute", "--since", "3m").out.count(AGENT) in {3, 4}
    assert ctl("sla", "breaches", AGENT, "--watch", "--fail").code == Exit.NO
    (breach,) = ctl("sla", "breaches", AGENT, "--json").json["data"]
    file = tmp_path / "breach.json"
    file.write_text(ctl("sla", "evidence", breach["id"]).out)
    verified = host("verify", file)
    assert (verified.code, verified.out.split(" breach ")[0]) == (Exit.DONE, "ok: error_rate")
    assert "--public-key" in verified.err
    assert host("verify", file, "--public-key", "nonsense").code == Exit.USAGE
    file.write_text(file.read_text().replace('"tasks_failed": 10', '"tasks_failed": 2'))
    changed = host("verify", file)
    assert changed.code == Exit.NO
    assert "bad: breach.actual: is 40.0%" in changed.out
    assert ctl("sla", "evidence", "brc_0").code == Exit.USAGE
    for what in ("show", "breaches", "history"):
        assert ctl("sla", what, "urn:asap:agent:nobody").code == Exit.USAGE

    assert "cost usd:" in ctl("sla", "penalty", AGENT).out
    assert ctl("sla", "penalty", AGENT, "--json").json["cost_usd"] == 12.5

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sla, "time", SimpleNamespace(sleep=stop))
    watched = ctl("sla", "history", AGENT, "--watch")
    assert (watched.code, AGENT in watched.out) == (Exit.DONE, True)


def test_maintenance_is_declared_listed_and_ended(own_daemon: Daemon, ctl: Program) -> None:
    report(own_daemon, 0, 1)
    made = ctl("maintenance", "add", AGENT, "--for", "1h", "--reason", "new model", "--json").json
    assert (made["agent_id"], made["state"]) == (AGENT, "running")
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    planned = ctl("maintenance", "add", "--all", "--start", tomorrow, "--for", "1h", "--reason", "move").out
    assert "planned" in planned
    assert ctl("maintenance", "end", planned.split()[1], "--json").json["state"] == "over"
    listed = ctl("maintenance", "list", "--state", "running").out
    assert "new model" in listed
    assert ctl("maintenance", "list", AGENT, "--json").json["count"] >= 1
    assert ctl("maintenance", "end", made["id"]).out == f"ended: {made['id']}\n"
    over = ctl("maintenance", "end", made["id"])
    assert (over.code, "is over" in over.err) == (Exit.USAGE, True)
    for wrong in (
        ("--for", "1h"),
        (AGENT, "--all", "--for", "1h"),
        (AGENT,),
        (AGENT, "--for", "1h", "--end", "x"),
        ("", "--for", "1h"),
    ):
        assert ctl("maintenance", "add", *wrong, "--reason", "x").code == Exit.USAGE
