"""`asapctl audit erase`: what it says went, of however many requests, and what it says stays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from asapd.cli.door import Door
from asapd.cli.outcome import Exit
from tests.cli.programs import CONFIG, Daemon, Program

MAX = "mailto:max"
ERASE = ("audit", "erase", MAX, "--reason", "request 17")
BUDGET = f'[[budget]]\nname = "b"\nperiod = "day"\nmatch = {{consumer = "{MAX}"}}\nsoft_usd = 1\n'


def test_what_went_and_what_stays_is_said(ctl: Program, own_daemon: Daemon) -> None:
    own_daemon.config.write_text(CONFIG + BUDGET)
    assert ctl("reload").code == Exit.DONE
    key = ctl("keys", "create", "--name", "desk", "--role", "reader", "--agent", MAX, "--json").json["id"]
    who = {"agent": "urn:asap:agent:a", "consumer": MAX, "timestamp": time.time()}
    Door(own_daemon.socket).post("/usage", {"events": [{**who, "id": f"e{at}", "task_id": "t"} for at in range(3)]})
    kept = "config/2.toml in the state directory"
    stays = [
        f"the configuration names {MAX} in budget b: take it out there as well",
        f"version 2 of the configuration has {MAX}: delete {kept} when it is not in force",
        f"API key {key} names {MAX} among its agents, and stays in the log",
    ]
    dry = ctl(*ERASE, "--dry-run")
    assert (dry.code, dry.out) == (Exit.DONE, f"{MAX}: 3 entries, 3 events, 0 steps of tasks would be erased\n")
    assert dry.err.splitlines() == stays
    done = ctl(*ERASE)
    assert (done.code, done.err.splitlines()) == (Exit.DONE, stays)
    assert done.out.startswith(f"{MAX}: 3 entries, 3 events, 0 steps of tasks erased, now ers_")

    own_daemon.config.write_text(CONFIG)
    assert ctl("reload").code == Exit.DONE
    assert (own_daemon.directory / "config" / "2.toml").is_file()
    (own_daemon.directory / "config" / "2.toml").unlink()
    again = ctl(*ERASE, "--json").json
    assert (again["entries"], again["usage"], again["budgets"], again["versions"]) == (0, 0, [], [])
    (own_daemon.directory / "config" / "9.toml").symlink_to("9.toml")  # which nobody can read
    assert ctl(*ERASE, "--json").json["versions"] is None


def test_what_several_requests_erased_is_added_up(ctl: Program, answers: Callable[..., None]) -> None:
    def say(*replies: dict[str, Any]) -> None:
        found = {"dry_run": False, "usage": 9, "task": 2, "breach": 0, "budgets": [], "keys": [], "versions": []}
        bodies = [json.dumps({**found, **reply}).encode() for reply in replies]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        answers(*(head % len(body) + body for body in bodies))

    steps = [
        {"entries": 5, "pseudonym": "ers_1", "more": True},
        {"entries": 4, "usage": 8, "pseudonym": "ers_1", "more": True},
        {"entries": 2, "usage": 1, "task": 0, "pseudonym": "ers_1_", "more": False},
    ]
    say(*steps)
    assert ctl(*ERASE).out == f"{MAX}: 11 entries, 9 events, 2 steps of tasks erased, now ers_1_\n"
    say(*steps)
    told = ctl(*ERASE, "--json").json
    assert (told["entries"], told["usage"], told["pseudonym"], told["more"]) == (11, 9, "ers_1_", False)
    say({"entries": 0, "pseudonym": "ers_1", "more": False, "versions": None})
    assert "versions of the configuration cannot be read" in ctl(*ERASE).err
