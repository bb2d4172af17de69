"""`asapctl` against a daemon that runs."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import apsw
import msgspec
import pytest
from nacl.signing import SigningKey

from asapd.cli.door import Door
from asapd.cli.outcome import Exit
from asapd.wire.keys import public_base64
from tests.cli.programs import CONFIG, Daemon, Program

PATIENCE_S = 20.0


def urn() -> str:
    """An agent that no other test knows."""
    return f"urn:asap:agent:{uuid4().hex[:12]}"


def report(daemon: Daemon, agent: str, *, count: int = 1, duration_ms: int = 100, **fields: Any) -> None:
    """Usage of an agent, over the admin socket."""
    metrics = {"tokens_in": 1_000_000, "tokens_out": 0, "duration_ms": duration_ms, "api_calls": 1}
    event = {"agent": agent, "consumer": "urn:asap:agent:desk", "metrics": metrics, "model": "m", **fields}
    now = datetime.now(UTC).isoformat()
    events = [{**event, "task_id": uuid4().hex, "id": uuid4().hex, "timestamp": now} for _ in range(count)]
    Door(daemon.socket).post("/usage", {"events": events})


def until(found: Callable[[], Any]) -> Any:
    """What a condition of the daemon comes to, within some patience."""
    end = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


@pytest.fixture
def slow_agent(daemon: Daemon, ctl: Program) -> Iterator[str]:
    """An agent with an open latency breach."""
    agent = urn()
    assert ctl("agents", "add", agent, "http://127.0.0.1:1", "--max-latency-p95-ms", "500").code == 0
    report(daemon, agent, duration_ms=1500)
    until(lambda: ctl("sla", "breaches", agent, "--state", "open", "--json").json["data"])
    yield agent
    ctl("agents", "remove", agent)


# --- status, reload, actors


def test_status_shows_actors_store_and_configuration(daemon: Daemon, ctl: Program) -> None:
    shown = ctl("status", "--json").json
    assert shown["ready"] is True
    assert shown["config"]["state"] == "ok"
    assert {"state", "restarts", "mailbox", "last_error"} <= shown["actors"]["meter"].keys()
    assert ctl("--json", "status").json.keys() == shown.keys()
    text = ctl("status").out
    assert re.search(r"^ready: +yes$", text, re.MULTILINE)
    assert re.search(r"^meter +running +0 +\d+ +-$", text, re.MULTILINE)
    assert str(daemon.config) in text


def test_an_actor_is_restarted_by_name(daemon: Daemon, ctl: Program) -> None:
    assert ctl("actor", "restart", "prober").out == "restarted: prober\n"
    assert ctl("actor", "restart", "prober", "--json").json == {"restarted": "prober"}
    ran = ctl("actor", "restart", "nobody")
    assert (ran.code, ran.out) == (Exit.USAGE, "")


def test_reload_applies_reports_and_refuses(daemon: Daemon, ctl: Program) -> None:
    assert ctl("reload").out == "nothing changed in the configuration\n"
    agent = urn()
    daemon.config.write_text(
        CONFIG.replace('"1h"', '"2h"').replace("[http]", '[http]\nmax_body = "1MiB"')
        + f'[[agents]]\nid = "{agent}"\nurl = "http://127.0.0.1:1"\n'
    )
    ran = ctl("reload")
    assert (ran.code, ran.err) == (Exit.DONE, "")
    assert ran.out.splitlines() == [
        f"applied: agents_added: {agent}",
        "applied: prober",
        "restart required: http.max_body",
    ]
    assert ctl("agents", "remove", agent).code == Exit.USAGE  # it belongs to the configuration
    daemon.config.write_text('[http]\nbind = ["127.0.0.1:0"]\n[prober]\ninterval = 5\ntimeout = 6\n')
    for arguments in (("reload",), ("reload", "--json")):
        ran = ctl(*arguments)
        assert ran.code == Exit.USAGE
        assert [line[: len(f"{daemon.config}:4: ")] for line in ran.err.splitlines()] == [
            f"{daemon.config}:4: ",
            f"{daemon.config}:5: ",
        ]
    assert ran.json["code"] == "config_refused"
    status = ctl("status", "--json").json["config"]
    assert (status["state"], len(status["errors"])) == ("error", 2)
    assert "prober.interval" in ctl("status").out
    daemon.config.write_text(CONFIG)
    assert ctl("reload", "--json").json["state"] == "ok"
    assert ctl("status", "--json").json["config"]["state"] == "ok"


# --- agents


def test_agents_are_added_shown_listed_probed_and_removed(daemon: Daemon, ctl: Program) -> None:
    agent = urn()
    promise = ("--availability", "99.9%", "--max-latency-p95-ms", "500", "--max-error-rate", "1%")
    assert ctl("agents", "add", agent, "http://127.0.0.1:1", *promise).out == f"{agent} http://127.0.0.1:1\n"
    row = ctl("agents", "show", agent, "--json").json
    assert row["sla"] == {
        "availability": "99.9%",
        "max_latency_p95_ms": 500,
        "max_error_rate": "1.0%",
        "support_hours": None,
    }
    until(lambda: ctl("agents", "show", agent, "--json").json["last_probe"])
    health = ctl("agents", "health", agent, "--json").json
    assert [probe["up"] for probe in health["data"]] == [False]
    assert re.search(r"^\S+Z +no +- +- +refused", ctl("agents", "health", agent).out, re.MULTILINE)
    assert agent in [row["id"] for row in ctl("agents", "list", "--json").json["data"]]
    assert re.search(rf"^{agent} +\w+ ", ctl("agents", "list", "--sort", "sla_score").out, re.MULTILINE)
    assert ctl("agents", "add", agent, "http://127.0.0.1:2", "--json").json["url"] == "http://127.0.0.1:2"
    assert re.search(r"^url: +http://127.0.0.1:2$", ctl("agents", "show", agent).out, re.MULTILINE)
    assert ctl("agents", "remove", agent).out == f"removed: {agent}\n"
    for arguments in (("show", agent), ("health", agent), ("remove", agent), ("add", "x", "y")):
        ran = ctl("agents", *arguments)
        assert (ran.code, ran.out) == (Exit.USAGE, "")
        assert ran.err.startswith("asapctl: ")


def test_an_agent_that_may_not_be_probed_says_why(daemon: Daemon, ctl: Program) -> None:
    agent = urn()
    ctl("agents", "add", agent, "http://169.254.1.1:1")
    until(lambda: ctl("agents", "show", agent, "--json").json["not_probed"])
    assert ctl("agents", "health", agent, "--json").json["not_probed"]["reason"] == "not_allowed"
    shown = ctl("agents", "health", agent).out
    assert re.search(r"^state: +unknown$", shown, re.MULTILINE)
    assert re.search(
        r"^not probed: +not_allowed: .* is at 169\.254\.1\.1, outside the allowed networks", shown, re.MULTILINE
    )
    ctl("agents", "remove", agent)


def test_an_agent_that_reports_by_itself_is_added_paused_and_its_life_is_shown(daemon: Daemon, ctl: Program) -> None:
    agent = urn()
    assert ctl("agents", "add", agent, "--heartbeat").out == f"{agent} reports by itself\n"
    assert ctl("agents", "add", urn()).code == Exit.USAGE
    assert ctl("agents", "pause", agent, "--reason", "new disk").out == f"{agent}: paused\n"
    assert ctl("agents", "pause", agent).out == f"{agent}: paused, as before\n"
    assert agent in ctl("status", "--json").json["agents"]["paused"]
    assert re.search(rf"^ +paused: +.*{agent}", ctl("status").out, re.MULTILINE)
    assert ctl("agents", "resume", agent, "--json").json["state"] == "unknown"
    events = ctl("agents", "history", agent, "--json").json["data"]
    assert [(event["event"], event["reason"]) for event in events] == [
        ("resumed", "resumed"),
        ("paused", "new disk"),
        ("added", "added by hand"),
    ]
    shown = ctl("agents", "history", agent).out
    assert re.search(r"^\S+Z +paused +unknown +paused +uid:\d+ pid:\d+ +new disk$", shown, re.MULTILINE)
    assert ctl("agents", "manifests", agent, "--json").json["data"] == []
    assert ctl("agents", "manifests", agent).code == Exit.DONE
    assert ctl("agents", "manifests", agent, "0" * 64).code == Exit.USAGE
    for filters in (("--status", "ready"), ("--flapping",), ("--min-availability", "99%"), ("--state", "paused")):
        assert agent not in [row["id"] for row in ctl("agents", "list", *filters, "--json").json["data"]]
    ctl("agents", "remove", agent)
    for arguments in (("pause", agent), ("resume", agent), ("manifests", agent)):
        assert ctl("agents", *arguments).code == Exit.USAGE
    assert ctl("agents", "history", agent, "--json").json["data"][0]["event"] == "removed"


# --- usage


def test_usage_is_reported_as_table_json_and_csv_with_exact_money(daemon: Daemon, ctl: Program) -> None:
    agent = urn()
    report(daemon, agent, count=3)
    report(daemon, agent, model="free", cost_usd=0.000001)
    report(daemon, agent, model="odd")
    wanted = ("usage", "report", "--agent", agent, "--since", "1h")
    shown = ctl(*wanted, "--by", "model", "--period", "day", "--format", "json")
    costs = {row["model"]: row["total_cost_usd"] for row in shown.json["data"]}
    assert costs == {"m": 4.5, "free": 0.000001, "odd": None}
    assert '"total_cost_usd": 0.000001' in shown.out
    assert shown.json == ctl(*wanted, "--by", "model", "--period", "day", "--json").json
    rows = list(csv.DictReader(io.StringIO(ctl(*wanted, "--by", "agent", "--by", "model", "--format", "csv").out)))
    assert [(row["agent_id"], row["model"], row["total_tasks"], row["total_cost_usd"]) for row in rows] == [
        (agent, "free", "1", "0.000001"),
        (agent, "m", "3", "4.5"),
        (agent, "odd", "1", ""),
    ]
    # All that the daemon sums is in the file, so that a sum added there is missed here.
    assert rows[0].keys() == {*shown.json["data"][0], "agent_id"} - {
        "period",
        "avg_tokens_per_task",
        "avg_duration_ms_per_task",
    }
    table = ctl(*wanted)
    assert re.search(rf"^{agent} +5 +5000000 +0 +500 +5 +1 +4\.500001$", table.out, re.MULTILINE)
    assert "1 events have no known cost" in table.err
    assert ctl("usage", "report", "--until", "2020-01-01").out.startswith("AGENT")


# --- delegations


def test_a_token_issued_offline_is_inspected_and_passed_on_without_a_daemon(
    ctl: Program, host: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASAPD_SOCKET", "/nowhere")
    key = tmp_path / "root.pem"
    host("keygen", key)
    root, writer, helper = urn(), urn(), urn()
    issue = ("delegation", "issue", "--key", key, "--expires-in")
    limits = ("--max-cost-usd", "10.5", "--max-tasks", "3")
    ran = ctl(*issue, "7d", "--delegator", root, "--delegate", writer, "--scope", "task.*", "a.b", *limits)
    assert (ran.code, ran.err, ran.out.count("\n")) == (Exit.DONE, "", 1)
    (tmp_path / "token").write_text(ran.out)
    for names in (("--delegator", "root", "--delegate", writer), ("--delegator", root, "--delegate", "writer")):
        refused = ctl(*issue, "7d", *names, "--scope", "task.*")
        assert (refused.code, "must be a URN" in refused.err) == (Exit.USAGE, True)
    passed = ("--delegator", writer, "--delegate", helper, "--parent", f"@{tmp_path / 'token'}")
    ran = ctl(*issue, "6d", *passed, "--scope", "task.execute", "--json")
    assert (ran.code, ran.err) == (Exit.DONE, "")
    child = ran.json

    shown = ctl("delegation", "inspect", child["token"], "--json").json
    assert [link["delegate"] for link in shown["chain"]] == [writer, helper]
    assert shown["chain"][0]["scopes"] == ["task.*", "a.b"]
    assert (shown["chain"][0]["max_cost_usd"], shown["chain"][0]["max_tasks"]) == (10.5, 3)
    assert shown["id"] == child["id"]
    assert shown["signature_checked"] is False
    text = ctl("delegation", "inspect", child["token"])
    assert re.search(rf"^link 1\n.*\n  delegator: +{writer}$", text.out, re.MULTILINE)
    wide = ctl(*issue, "6d", *passed, "--scope", "*")
    assert (wide.code, wide.out.count(".")) == (Exit.DONE, 2)
    assert "scope_exceeded" in wide.err


def test_a_document_is_issued_inspected_and_passed_on_in_either_form(
    ctl: Program, host: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASAPD_SOCKET", "/nowhere")
    key = tmp_path / "root.pem"
    host("keygen", key)
    root, writer, helper = urn(), urn(), urn()
    issue = ("delegation", "issue", "--key", key, "--scope", "task.execute", "--expires-in")
    made = ctl(*issue, "7d", "--delegator", root, "--delegate", writer, "--form", "document", "--max-cost-usd", "1.5")
    assert (made.code, made.err) == (Exit.DONE, "")
    (tmp_path / "token").write_text(made.out)
    for form, parent in (("jws", f"@{tmp_path / 'token'}"), ("document", made.out.strip())):
        ran = ctl(*issue, "1d", "--delegator", writer, "--delegate", helper, "--form", form, "--parent", parent)
        assert (ran.code, ran.err) == (Exit.DONE, "")
        shown = ctl("delegation", "inspect", ran.out.strip(), "--json").json
        assert [link["form"] for link in shown["chain"]] == ["document", form]
        assert [link["delegate"] for link in shown["chain"]] == [writer, helper]
        assert shown["parent"] == shown["chain"][0]["id"]
    named = ctl(
        *issue, "1d", "--delegator", writer, "--delegate", helper, "--form", "document", "--parent", "del_1", "--json"
    ).json
    assert ctl("delegation", "inspect", named["token"], "--json").json["parent"] == "del_1"
    refused = ctl(
        "delegation", "issue", *issue[4:], "1d", "--delegator", root, "--delegate", writer, "--form", "document"
    )
    assert (refused.code, "give --key" in refused.err) == (Exit.USAGE, True)


def test_offline_issuing_refuses_what_cannot_be_signed(ctl: Program, host: Program, tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.pem", tmp_path / "good.pem"
    host("keygen", good)
    bad.write_text("x")
    terms = ("--delegator", urn(), "--delegate", urn(), "--expires-in", "1h", "--scope")
    for arguments in (
        ("--key", bad, *terms, "*"),
        ("--key", good, *terms, "not a scope"),
        ("--key", good, *terms, "*", "--parent", "nonsense"),
        ("--key", tmp_path / "none", *terms, "*"),
        (*terms, "*", "--expires-in", "7"),
        ("--key", good, *terms, "*", "--expires-in", "0s"),
        (*terms, "*", "--expires-in", "0s"),
    ):
        assert ctl("delegation", "issue", *arguments).code == Exit.USAGE
    for cost in ("-1", "0.0000001", "much"):
        assert ctl("delegation", "issue", *terms, "*", "--max-cost-usd", cost).code == Exit.USAGE


def test_a_text_that_is_no_token_is_a_no(ctl: Program) -> None:
    ran = ctl("delegation", "inspect", "nonsense")
    assert (ran.code, ran.out, ran.err.startswith("asapctl: malformed: ")) == (Exit.NO, "", True)


def test_delegations_are_validated_listed_and_revoked_with_their_descendants(
    own_daemon: Daemon, ctl: Program, host: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, writer, helper = urn(), urn(), urn()
    keys = own_daemon.directory / "keys"
    keys.mkdir()
    public = {}
    for agent in (root, writer):
        made = host("keygen", keys / f"{agent.removeprefix('urn:asap:agent:')}.pem").out
        public[agent] = made.splitlines()[0].split(": ")[1]
    own_daemon.config.write_text(CONFIG + f'[delegation]\nkeys_dir = "keys"\nroots = ["{root}"]\n')
    assert ctl("reload").code == Exit.DONE
    issue = ("delegation", "issue", "--max-cost-usd", "5", "--expires-in")
    parent = ctl(*issue, "1h", "--delegator", root, "--delegate", writer, "--scope", "task.*", "--json").json
    passed = ("--delegator", writer, "--delegate", helper, "--parent", parent["token"])
    child = ctl(*issue, "30m", *passed, "--scope", "task.execute").out.strip()
    ran = ctl(*issue, "30m", *passed, "--scope", "*")
    assert (ran.code, ran.out, ran.err.startswith("asapctl: scope_exceeded: ")) == (Exit.NO, "", True)
    ran = ctl(*issue, "30m", "--delegator", urn(), "--delegate", writer, "--scope", "*")
    assert (ran.code, ran.out) == (Exit.USAGE, "")

    monkeypatch.setattr("sys.stdin", io.StringIO(child + "\n"))
    assert ctl("delegation", "validate", "-", "--action", "task.execute", "--delegate", helper).code == Exit.DONE
    denied = ctl("delegation", "validate", child, "--action", "other.thing")
    assert (denied.code, denied.out.startswith("action_not_allowed: ")) == (Exit.NO, True)
    assert re.search(r"^remaining: +cost_usd 5, tasks -$", ctl("delegation", "validate", child).out, re.MULTILINE)

    rows = ctl("delegation", "list", "--json").json["data"]
    assert rows[0]["id"] == parent["id"]
    table = ctl("delegation", "list", "--delegator", root).out.splitlines()
    assert len(table) == 2
    tree = ctl("delegation", "tree").out.splitlines()
    assert [len(line) - len(line.lstrip()) for line in tree] == [0, 2]
    assert all(line.endswith("left 5 USD, - tasks") for line in tree)
    nested = ctl("delegation", "tree", parent["id"], "--json").json["data"]
    assert [branch["delegate"] for branch in nested[0]["children"]] == [helper]
    assert ctl("delegation", "tree", "del_none").code == Exit.USAGE

    revoked = ctl("delegation", "revoke", parent["id"], "--reason", "over")
    assert revoked.out.splitlines() == [f"revoked: {row['id']}" for row in rows]
    assert ctl("delegation", "revoke", parent["id"], "--json").json["newly"] in (0, [])
    verdict = ctl("delegation", "validate", child, "--json")
    assert (verdict.code, verdict.json["code"]) == (Exit.NO, "revoked")
    assert ctl("delegation", "revoke", "del_none").code == Exit.USAGE
    assert ctl("delegation", "list", "--state", "active").out.count("\n") == 1


# --- promises


def test_an_open_breach_is_shown_and_fails_when_asked_to(slow_agent: str, ctl: Program) -> None:
    for command in (("sla", "show", slow_agent), ("sla", "breaches", slow_agent), ("sla", "show"), ("sla", "breaches")):
        assert ctl(*command).code == Exit.DONE
        assert ctl(*command, "--fail").code == Exit.NO
    assert ctl("sla", "breaches", slow_agent, "--state", "resolved", "--fail").code == Exit.DONE
    assert ctl("sla", "breaches", slow_agent, "--severity", "warning", "--fail").code == Exit.DONE
    shown = ctl("sla", "show", slow_agent, "--window", "1h").out
    assert re.search(r"^latency +500ms +\S+ +broken +1$", shown, re.MULTILINE)
    assert re.search(rf"^brc_\S+ +open +critical +{slow_agent} +latency ", shown, re.MULTILINE)
    assert ctl("sla", "show", slow_agent, "--json").json["compliance"]["latency"]["met"] is False
    assert re.search(rf"^{slow_agent} .* latency$", ctl("sla", "show").out, re.MULTILINE)
    assert ctl("sla", "show", urn()).code == Exit.USAGE
    assert ctl("sla", "show", "--window", "2h").code == Exit.USAGE


def test_a_quiet_agent_does_not_fail(daemon: Daemon, ctl: Program) -> None:
    agent = urn()
    ctl("agents", "add", agent, "http://127.0.0.1:1")
    assert ctl("sla", "show", agent, "--fail").code == Exit.DONE
    assert ctl("sla", "breaches", agent, "--fail").code == Exit.DONE


def test_the_module_is_the_program() -> None:
    command = [sys.executable, "-m", "asapd.cli.asapctl"]
    assert b"Usage" in subprocess.run([*command, "--help"], capture_output=True, check=True).stdout
    assert subprocess.run([*command, "no-such-thing"], capture_output=True, check=False).returncode == Exit.USAGE


def asapctl_process(*arguments: str) -> subprocess.Popen[bytes]:
    script = "import sys; from asapd.cli.asapctl import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE)


def test_watched_breaches_are_printed_as_they_happen_until_interrupted(daemon: Daemon, slow_agent: str) -> None:
    with asapctl_process("sla", "breaches", slow_agent, "--watch", "--json") as watching:
        assert watching.stdout is not None
        first = msgspec.json.decode(watching.stdout.readline())
        assert (first["event"], first["breach"]["agent_id"]) == ("open", slow_agent)
        report(daemon, slow_agent, count=60)
        events = [msgspec.json.decode(watching.stdout.readline())]
        assert events[0]["event"] == "resolved"
        assert events[0]["seq"] > first["seq"]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_S) == Exit.DONE


def test_watching_with_fail_ends_at_the_first_open_breach(slow_agent: str, ctl: Program) -> None:
    ran = ctl("sla", "breaches", slow_agent, "--watch", "--fail")
    assert ran.code == Exit.NO
    assert re.search(rf"Z  open  critical  {slow_agent}  latency  promised 500ms, measured ", ran.out)


def test_figures_are_watched_until_interrupted(daemon: Daemon, ctl: Program) -> None:
    agent = urn()
    ctl("agents", "add", agent, "http://127.0.0.1:1")
    report(daemon, agent)
    with asapctl_process("sla", "show", agent, "--watch", "--json") as watching:
        assert watching.stdout is not None
        seen = msgspec.json.decode(watching.stdout.readline())["metrics"]["tasks_completed"]
        report(daemon, agent)
        while seen < 2:
            seen = msgspec.json.decode(watching.stdout.readline())["metrics"]["tasks_completed"]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_S) == Exit.DONE


def test_a_watch_whose_daemon_stops_ends_as_unreachable(own_daemon: Daemon, ctl: Program) -> None:
    agent = urn()
    ctl("agents", "add", agent, "http://127.0.0.1:1", "--max-latency-p95-ms", "500")
    report(own_daemon, agent, duration_ms=1500)
    until(lambda: ctl("sla", "breaches", "--state", "open", "--json").json["data"])
    with asapctl_process("sla", "breaches", "--watch") as watching:
        assert watching.stdout is not None
        watching.stdout.readline()
        own_daemon.process.terminate()
        assert watching.wait(PATIENCE_S) == Exit.UNREACHABLE


def test_what_can_be_no_agent_is_not_watched(daemon: Daemon, ctl: Program) -> None:
    ran = ctl("sla", "breaches", "nobody", "--watch")
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert "agent_id must be a URN" in ran.err


# --- audit


def test_the_log_is_filtered_and_shown_with_the_newest_last(daemon: Daemon, ctl: Program) -> None:
    agent = urn()
    report(daemon, agent, count=3)
    rows = ctl("audit", "log", "--agent", agent, "--event-type", "usage.recorded", "--limit", "2", "--json").json
    seqs = [row["seq"] for row in rows["data"]]
    assert (len(seqs), seqs, rows["count"]) == (2, sorted(seqs), 2)
    assert ctl("audit", "log", "--agent", agent, "--since", "1h", "--until", "30m", "--json").json["count"] == 0
    assert ctl("audit", "log", "--agent", agent).out.count("usage.recorded") == 3


def test_checkpoints_and_proofs_verify_offline_with_the_key_alone(
    daemon: Daemon, ctl: Program, host: Program, tmp_path: Path
) -> None:
    report(daemon, urn(), count=3)
    shown = ctl("audit", "checkpoint", "--json").json
    entry = ctl("audit", "log", "--limit", "1", "--json").json["data"][0]["id"]
    key = shown["public_key"]
    report(daemon, urn(), count=2)
    files = [tmp_path / name for name in ("note", "note.json", "proof", "proof.json", "consistency")]
    for file, command in zip(
        files,
        (
            ("checkpoint", files[0]),
            ("checkpoint", files[1], "--json"),
            ("proof", entry, files[2]),
            ("proof", entry, files[3], "--json"),
        ),
        strict=False,
    ):
        assert ctl("audit", *command).code == Exit.DONE, file
    files[4].write_text(ctl("audit", "proof", "--from", shown["size"]).out)
    for file in files:
        ran = host("verify", file, "--public-key", key)
        assert (ran.code, ran.out[:4]) == (Exit.DONE, "ok: "), (file, ran)
        ran = host("verify", file)
        assert (ran.code, "--public-key" in ran.err) == (Exit.USAGE, True)
        ran = host("verify", file, "--public-key", public_base64(bytes(SigningKey.generate().verify_key)))
        assert (ran.code, ran.out[:4]) == (Exit.NO, "bad:"), (file, ran)
    assert files[2].read_text().startswith("c2sp.org/tlog-proof@v1\nextra ")
    for wrong in ((), (entry, "--from", "1")):
        assert ctl("audit", "proof", *wrong).code == Exit.USAGE
    assert ctl("audit", "proof", "none").code == Exit.USAGE


def test_the_export_of_a_verified_log_verifies_offline(
    daemon: Daemon, ctl: Program, host: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.cli.door.PAGE", 2)
    report(daemon, urn(), count=5)
    verdict = ctl("audit", "verify")
    assert verdict.code == Exit.DONE
    for form in ("json", "ndjson"):
        file = tmp_path / form
        file.write_text("old")
        ran = ctl("audit", "export", file, "--format", form)
        assert (ran.code, ran.out) == (Exit.DONE, "")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert host("verify", file).out.split(" with ")[0].startswith("ok: ")
        assert ctl("audit", "export", "--format", form).out == file.read_text()
    assert msgspec.json.decode((tmp_path / "json").read_bytes())["count"] == (tmp_path / "ndjson").read_text().count(
        "\n"
    )
    assert ctl("audit", "export", "--json").json["next_cursor"] is None
    assert ctl("audit", "export", "/dev/null").code == Exit.DONE
    assert ctl("audit", "export", tmp_path / "no" / "file").code == Exit.USAGE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["json", "ndjson"]


def test_an_export_that_fails_leaves_the_file_as_it_was(
    daemon: Daemon, ctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "log"
    file.write_text("old")
    assert ctl("audit", "export", file, "--socket", "/nowhere").code == Exit.UNREACHABLE
    whole = Door.download

    def broken(door: Door, path: str, **parameters: Any) -> tuple[dict[str, str], Iterator[bytes]]:
        headers, parts = whole(door, path, **parameters)

        def broken_parts() -> Iterator[bytes]:
            yield from list(parts)[:1]
            raise OSError(28, "No space left on device")

        return headers, broken_parts()

    monkeypatch.setattr(Door, "download", broken)
    ran = ctl("audit", "export", file)
    assert (ran.code, "No space left" in ran.err) == (Exit.USAGE, True)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert file.read_text() == "old"


def test_a_changed_entry_is_found_and_named(own_daemon: Daemon, ctl: Program) -> None:
    report(own_daemon, urn(), count=5)
    victim = ctl("audit", "log", "--event-type", "usage.recorded", "--json").json["data"][2]
    database = apsw.Connection(str(own_daemon.directory / "asapd.db"))
    for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        database.execute(f"DROP TRIGGER {name}")
    database.execute("UPDATE audit SET actor = actor || '.' WHERE seq = ?", (victim["seq"],))
    database.close()
    ran = ctl("audit", "verify")
    assert ran.code == Exit.NO
    assert ran.out.startswith(f"bad: entry {victim['seq']} ({victim['id']}): ")
    ran = ctl("audit", "verify", "--json")
    assert (ran.code, ran.json["first_bad"]["seq"]) == (Exit.NO, victim["seq"])


# --- keys


def test_a_key_is_printed_once_alone_on_stdout_and_can_be_revoked(daemon: Daemon, ctl: Program) -> None:
    name = uuid4().hex
    made = ctl(
        "keys",
        "create",
        "--name",
        name,
        "--role",
        "ingest",
        "--agent",
        "urn:asap:agent:a",
        "--agent",
        "urn:asap:agent:b*",
        "--sign",
    )
    assert (made.code, made.out.count("\n")) == (Exit.DONE, 1)
    secret = made.out.strip()
    assert "not shown again" in made.err
    assert secret not in made.err
    listed = ctl("keys", "list", "--json")
    row = next(row for row in listed.json["data"] if row["name"] == name)
    assert (row["role"], row["agents"], row["sign"]) == ("ingest", ["urn:asap:agent:a", "urn:asap:agent:b*"], True)
    assert secret not in listed.out
    assert ctl("keys", "create", "--name", name, "--role", "reader").code == Exit.USAGE
    assert ctl("keys", "revoke", row["id"]).out == f"revoked: {row['id']} ({name})\n"
    assert re.search(rf"^{row['id']} .*Z$", ctl("keys", "list").out, re.MULTILINE)
    again = ctl("keys", "create", "--name", name, "--role", "reader", "--json").json
    assert again["agents"] == ["*"]
    assert ctl("keys", "revoke", name, "--json").json["id"] == again["id"]
    assert ctl("keys", "revoke", "nobody").code == Exit.USAGE
    assert ctl("keys", "create", "--name", name, "--role", "ingest", "--agent", "a").code == Exit.USAGE
    assert "a matches no agent" in ctl("keys", "create", "--name", name, "--role", "reader", "--agent", "a").err


# --- which socket


def test_the_socket_is_found_where_a_daemon_of_this_user_makes_it(
    daemon: Daemon, ctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASAPD_SOCKET")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(daemon.directory))
    assert ctl("status").code == Exit.DONE
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/nowhere")
    assert ctl("status").code == Exit.UNREACHABLE
    assert ctl("--socket", daemon.socket, "status").code == Exit.DONE
    assert ctl("--socket", "/nowhere", "status", "--socket", daemon.socket).code == Exit.DONE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_refused_at_the_socket(daemon: Daemon) -> None:
    # Imported first: somebody else may not be able to read where Python is installed.
    script = (
        "import http.client, os, sys, msgspec; from asapd.cli.asapctl import main; "
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(main())"
    )
    for option in ((), ("--socket", str(daemon.socket))):
        run = [sys.executable, "-c", script, "status", *option]
        ended = subprocess.run(run, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (Exit.FORBIDDEN, "")
        assert "ask for its group" in ended.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_the_mode_of_the_socket_makes_nobody_an_operator(own_daemon: Daemon) -> None:
    script = (
        "import encodings.idna, http.client, os, sys, msgspec, asapd.cli.config_check, asapd.cli.watch; "
        "from asapd.cli.asapctl import main; "
        "group = int(sys.argv.pop(1)); os.setgroups([group]); os.setgid(65534); os.setuid(65534); sys.exit(main())"
    )
    own_daemon.directory.chmod(0o755)
    own_daemon.socket.chmod(0o666)

    def codes(group: int) -> list[int]:
        asked: list[list[str]] = [["status"], ["silences", "list"], ["sla", "breaches", "--watch"], ["doctor"]]
        run = [sys.executable, "-c", script, str(group)]
        return [subprocess.run([*run, *one], capture_output=True, check=False, timeout=60).returncode for one in asked]

    assert codes(54321) == [Exit.FORBIDDEN] * 4
    os.chown(own_daemon.socket, -1, 54321)
    run = [sys.executable, "-c", script, "54321"]
    assert subprocess.run([*run, "silences", "list"], capture_output=True, check=False).returncode == Exit.DONE
