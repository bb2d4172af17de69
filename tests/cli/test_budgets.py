"""`asapctl budgets` against a daemon whose budgets change under it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from asapd.cli.door import Door
from asapd.cli.outcome import Exit
from tests.cli.programs import CONFIG, Daemon, Program

WRITER = "urn:asap:agent:writer"


def report(daemon: Daemon, cost_usd: str) -> None:
    event: dict[str, Any] = {"task_id": uuid4().hex, "agent": WRITER, "consumer": "urn:asap:agent:desk", "metrics": {}}
    now = datetime.now(UTC).isoformat()
    Door(daemon.socket).post("/usage", {**event, "cost_usd": cost_usd, "timestamp": now})


def configure(daemon: Daemon, ctl: Program, **limits: str) -> None:
    limited = "".join(f'{name} = "{value}"\n' for name, value in limits.items())
    daemon.config.write_text(
        f'{CONFIG}[[budget]]\nname = "research"\nmatch = {{ agent = "{WRITER}" }}\nperiod = "month"\n{limited}'
    )
    assert ctl("reload").out == "applied: budgets\n"


def test_budgets_are_listed_and_shown_and_follow_the_configuration(own_daemon: Daemon, ctl: Program) -> None:
    assert ctl("budgets", "list", "--json").json == {"data": [], "count": 0, "next_cursor": None}
    report(own_daemon, "1.50")
    configure(own_daemon, ctl, soft_usd="2", hard_usd="4")
    heading, row = ctl("budgets", "list").out.splitlines()
    assert heading.split() == ["BUDGET", "UNIT", "SPENT", "RESERVED", "SOFT", "HARD", "REMAINING", "REACHED", "RENEWED"]
    assert row.split()[:8] == ["research", "usd", "1.5", "0", "2", "4", "2.5", "-"]
    shown = ctl("budgets", "show", "research").out
    assert re.search(rf"^match: +agent {WRITER}$", shown, re.MULTILINE)
    assert "alert" not in shown

    report(own_daemon, "0.75")
    shown = ctl("budgets", "show", "research").out
    assert re.search(r"^alert: +warning$", shown, re.MULTILINE)
    assert re.search(r"^  reached: +2\.0 USD$", shown, re.MULTILINE)
    assert ctl("budgets", "show", "research", "--json").json["open_breach"]["budget"] == "research"
    assert re.search(r"^brc_\S+ +open +warning +research +budget ", ctl("sla", "breaches").out, re.MULTILINE)

    report(own_daemon, "2")
    forecast = ctl("budgets", "show", "research", "--json").json["forecast"]["usd"]
    assert (forecast["exhausted_at"], forecast["within_period"]) == (None, True)
    assert re.search(r"^usd +4\.25 .* +reached +-$", ctl("budgets", "show", "research").out, re.MULTILINE)

    configure(own_daemon, ctl, hard_usd="5")
    listed = ctl("budgets", "list", "--json").json
    assert (listed["data"][0]["remaining"]["usd"], listed["data"][0]["open_breach"]) == (0.75, None)
    own_daemon.config.write_text(CONFIG)
    assert ctl("reload").code == Exit.DONE
    missing = ctl("budgets", "show", "research")
    assert (missing.code, missing.err) == (Exit.USAGE, "asapctl: there is no budget research: check the name\n")
