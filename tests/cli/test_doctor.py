"""`asapctl doctor` and `asapctl top` against a real daemon."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asapd.cli.door import Door
from tests.cli.programs import CONFIG, Daemon, Program, Ran


def findings(ran: Ran) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in ran.json["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return found


def report(daemon: Daemon, **more: Any) -> None:
    event = {
        "task_id": f"t-{time.time_ns()}",
        "agent": "urn:asap:agent:writer",
        "consumer": "urn:asap:agent:desk",
        "timestamp": time.time(),
        "metrics": {"tokens_in": 1_000_000, "tokens_out": 0, "duration_ms": 5, "api_calls": 1},
        **more,
    }
    Door(daemon.socket).post("/usage", event)


def test_a_good_host_has_nothing_to_mend(ctl: Program, own_daemon: Daemon) -> None:
    ran = ctl("doctor", "--json")
    assert (ran.code, ran.json["ok"]) == (0, True)
    found = findings(ran)
    assert {
        *("daemon", "version", "socket", "ready", "config", "prices", "alerts", "agents", "keys"),
        *("verify", "checkpoint", "disk", "files", "fsync", "clock"),
    } <= set(found)
    assert not [one for ones in found.values() for one in ones if one["state"] == "error"]
    assert set(found["disk"][0]) == {"check", "state", "what", "why", "do"}
    printed = ctl("doctor")
    assert printed.code == 0
    assert "ok       daemon     answers at" in printed.out
    assert "0 to mend" in printed.err
    assert sorted(path.name for path in own_daemon.directory.glob("tmp*")) == [], "it leaves nothing behind"


def test_what_has_to_be_mended_is_named_and_ends_it_with_1(ctl: Program, own_daemon: Daemon) -> None:
    (own_daemon.directory / "identity.pem").chmod(0o644)
    own_daemon.socket.chmod(0o666)
    keys = own_daemon.directory / "keys"
    keys.mkdir(exist_ok=True)
    (keys / "a.pem").write_text("x")
    (keys / "a.pem").chmod(0o640)
    report(own_daemon, model="nobody-knows")
    own_daemon.config.write_text(CONFIG.replace("min_samples = 1", "min_samples = 2"))
    ran = ctl("doctor", "--json")
    assert ran.code == 1
    bad = {(check, one["state"]): one for check, ones in findings(ran).items() for one in ones if one["state"] != "ok"}
    assert bad["files", "error"]["do"] == f"chmod 600 {own_daemon.directory / 'identity.pem'}"
    assert "every user may connect" in bad["socket", "warning"]["what"]
    assert "a.pem has mode 0640" in bad["keys", "error"]["what"]
    assert "nobody-knows" in bad["prices", "warning"]["what"]
    assert "sla.min_samples" in bad["config", "warning"]["what"]
    own_daemon.config.write_text("[sla]\nhold = 5\n")
    assert "sla.hold" in findings(ctl("doctor", "--json"))["config"][-1]["what"]
    assert ctl("reload").code == 2
    assert "the file was refused" in findings(ctl("doctor", "--json"))["config"][0]["what"]


def test_links_that_lead_nowhere_are_named(ctl: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASAPD_SOCKET", str(tmp_path / "admin.sock"))
    (tmp_path / "keys").mkdir()
    for name in ("identity.pem", "asapd.db-wal", "keys/a.pem"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    (tmp_path / "keys/b.pem").touch(0o644)
    ran = ctl("doctor", "--state-dir", tmp_path, "--json")
    assert ran.code == 3
    found = findings(ran)
    assert [one["what"] for one in found["files"] if one["state"] == "error"] == [
        f"{tmp_path}/identity.pem is there and cannot be looked at: No such file or directory"
    ]
    assert [one["state"] for one in found["keys"]] == ["ok", "error", "error"]


def test_without_a_daemon_the_rest_is_looked_at(ctl: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASAPD_SOCKET", str(tmp_path / "admin.sock"))
    tmp_path.chmod(0o777)
    file = tmp_path / "asapd.toml"
    file.write_text("[sla]\nhold = 5\n")
    ran = ctl("doctor", "--json", "--state-dir", tmp_path, "--config", file)
    assert (ran.code, ran.json["ok"]) == (3, False)
    found = findings(ran)
    assert found["daemon"][0]["state"] == found["files"][0]["state"] == found["config"][0]["state"] == "error"
    assert found["disk"][0]["state"] in {"ok", "warning", "error"}
    file.write_text("")
    printed = ctl("doctor", "--state-dir", tmp_path / "none", "--config", file)
    assert printed.code == 3
    assert "is valid" in printed.out
    assert "cannot be looked into" in printed.out


def test_top_shows_rates_and_spend_of_every_agent(ctl: Program, own_daemon: Daemon) -> None:
    assert "0 of 0 agents up" in ctl("top").out
    assert ctl("agents", "add", "urn:asap:agent:idle", "http://127.0.0.1:9").code == 0
    report(own_daemon, model="m")
    report(own_daemon, agent="urn:asap:agent:stranger", model="nobody-knows")
    look = ctl("top", "--json", "--window", "6m")
    assert look.code == 0
    rows = msgspec.json.Decoder(float_hook=Decimal).decode(look.out)["agents"]
    assert [row["agent"].rpartition(":")[2] for row in rows] == ["writer", "stranger", "idle"]
    writer = rows[0]
    assert writer["usd_per_hour"] == 15
    assert writer["tokens_per_minute"].quantize(1) == 166_667
    by_name = {row["agent"].rpartition(":")[2]: row for row in rows}
    assert by_name["stranger"]["usd_per_hour"] is None, "what nobody knows is not nothing"
    assert by_name["stranger"]["state"] is None
    assert (by_name["idle"]["usd_per_hour"], by_name["idle"]["error_rate_percent"]) == (0, None)
    printed = ctl("top", "--once", "--sort", "agent", "--window", "6m")
    assert ": 0 of 1 agents up and 2 that only report, " in printed.out
    lines = [line.split() for line in printed.out.splitlines()]
    assert "USD 15.00+? an hour" in printed.out
    assert [line[0] for line in lines[3:]] == ["idle", "stranger", "writer"]
    assert ctl("top", "--window", "nonsense").code == 2
