"""What `asapctl doctor` makes of what it sees; a finding to be mended says why and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from asapd.cli import checkup
from asapd.cli.checkup import LARGE_WAL_BYTES, LOW_DISK_BYTES, NO_DISK_BYTES, SLOW_FSYNC_S, Finding, State

GIB = 1 << 30
PATH = Path("x")
GOOD: dict[str, Any] = {
    "ready": True,
    "uptime_seconds": 100.5,
    "pid": 1,
    "actors": {"meter": {"state": "running", "restarts": 0, "last_error": None}},
    "audit": {
        "seq": 9,
        "checkpoint": 9,
        "unsealed_seconds": None,
        "alarms": [],
        "verified": {"valid": True, "seq": 9, "at": "T", "reason": None},
        "without_verdict": None,
    },
    "agents": {"total": 1, "not_probed": [], "sla_errors": []},
    "keys": {"problems": [], "unconfirmed": []},
}
SHOWN: dict[str, Any] = {"errors": [], "waiting_for_restart": [], "without_effect": [], "path": None, "version": None}
TARGET = {"name": "hook", "state": "ok", "failing_since": None, "backlog": 0, "last_error": None, "dead_letters": 0}


def states(findings: Finding | Iterable[Finding] | None) -> list[str]:
    """The states, of which none but good ones lack a reason and a remedy."""
    found = [] if findings is None else [findings] if isinstance(findings, Finding) else list(findings)
    for finding in found:
        assert finding.what
        assert finding.state in {State.OK, State.SKIPPED} or (finding.why and finding.do), finding
    return [str(finding.state) for finding in found]


def audited(**more: Any) -> dict[str, Any]:
    return {**GOOD, "audit": {**GOOD["audit"], **more}}


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        (checkup.version("1", "1"), ["ok"]),
        (checkup.version("1", "2"), ["warning"]),
        (checkup.readiness(GOOD), ["ok"]),
        (checkup.readiness({**GOOD, "ready": False}), ["error"]),
        (checkup.socket_mode(PATH, 0o140660), ["ok"]),
        (checkup.socket_mode(PATH, 0o140666), ["warning"]),
        (checkup.private("files", PATH, 0o100600, 0o077, "chmod 600"), ["ok"]),
        (checkup.private("files", PATH, 0o100640, 0o077, "chmod 600"), ["error"]),
        (checkup.private("files", PATH, 0o040755, 0o022, "chmod go-w"), ["ok"]),
        (checkup.private("files", PATH, 0o040775, 0o022, "chmod go-w"), ["error"]),
        (checkup.clock(True), ["ok"]),
        (checkup.clock(False), ["warning"]),
        (checkup.clock(None), ["skipped"]),
        (checkup.disk(PATH, 10 * GIB, 100 * GIB), ["ok"]),
        (checkup.disk(PATH, 4 * GIB, 100 * GIB), ["warning"]),
        (checkup.disk(PATH, LOW_DISK_BYTES - 1, 2 * GIB), ["warning"]),
        (checkup.disk(PATH, NO_DISK_BYTES - 1, 2 * GIB), ["error"]),
        (checkup.wal(LARGE_WAL_BYTES), ["ok"]),
        (checkup.wal(LARGE_WAL_BYTES + 1), ["warning"]),
        (checkup.fsync(SLOW_FSYNC_S), ["ok"]),
        (checkup.fsync(SLOW_FSYNC_S * 2), ["warning"]),
        (checkup.configuration(SHOWN), ["ok"]),
        (checkup.configuration({**SHOWN, "path": "a.toml", "version": 3}), ["ok"]),
        (checkup.configuration({**SHOWN, "errors": ["a:1: b"], "waiting_for_restart": ["x"]}), ["error", "warning"]),
        (checkup.configuration({**SHOWN, "without_effect": ["audit.enabled"]}), ["warning"]),
        (checkup.unread_changes("a.toml", []), []),
        (checkup.unread_changes("a.toml", ["a", "b", "c", "d"]), ["warning"]),
        (checkup.audit(GOOD, 60.0), ["ok", "ok"]),
        (checkup.audit(audited(alarms=["it was cut off"]), 60.0), ["error", "ok", "ok"]),
        (checkup.audit(audited(verified=None), 60.0), ["skipped", "ok"]),
        (checkup.audit(audited(verified={"valid": False, "reason": "entry 3"}), 60.0), ["error", "ok"]),
        (checkup.audit(audited(without_verdict={"at": "T", "reason": "locked"}), 60.0), ["ok", "warning", "ok"]),
        (checkup.audit(audited(seq=10, unsealed_seconds=239.0), 60.0), ["ok", "ok"]),
        (checkup.audit(audited(seq=10, unsealed_seconds=241.0), 60.0), ["ok", "warning"]),
        (checkup.audit(audited(seq=10), 60.0), ["ok", "ok"]),
        (checkup.audit(audited(checkpoint=None, unsealed_seconds=300.0), 60.0), ["ok", "warning"]),
        (checkup.prices([], 0), ["ok"]),
        (checkup.prices(["a"] * 6, 9), ["warning"]),
        (checkup.alerts([TARGET]), ["ok"]),
        (checkup.alerts([{**TARGET, "state": "failing", "dead_letters": 2}]), ["error", "warning"]),
        (checkup.agents(GOOD), ["ok", "ok"]),
    ],
)  # fmt: skip
def test_a_finding_is_as_bad_as_it_is(findings: Finding | Iterable[Finding] | None, expected: list[str]) -> None:
    assert states(findings) == expected


def test_a_part_that_is_down_is_worse_than_one_that_came_back() -> None:
    actors = {
        "meter": {"state": "running", "restarts": 2, "last_error": "boom"},
        "prober": {"state": "waiting", "restarts": 3, "last_error": None},
    }
    found = list(checkup.readiness({**GOOD, "actors": actors}))
    assert states(found) == ["ok", "warning", "error"]
    assert "boom" in found[1].what


def test_agents_and_keys_that_something_is_wrong_with_are_named() -> None:
    standing = {"total": 2, "not_probed": ["urn:a"], "sla_errors": [{"agent": "urn:b", "error": "availability: -5%"}]}
    keys = {"problems": ["x.pem: its mode"], "unconfirmed": [{"agent": "urn:c", "kid": "k", "since": "T"}]}
    found = list(checkup.agents({**GOOD, "agents": standing, "keys": keys}))
    assert states(found) == ["warning", "warning", "error", "warning"]
    for word, finding in zip(("urn:a", "-5%", "x.pem", "urn:c"), found, strict=True):
        assert word in finding.what
