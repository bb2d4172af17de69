"""Breaches that the watcher found are recomputed from their evidence alone, and every change of it is told."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from nacl.signing import SigningKey
from trio.testing import MockClock

from asapd import config
from asapd.cli.verify_evidence import verify_evidence
from asapd.core.canonical import canonical
from asapd.core.evidence import EvidenceError, arithmetic, differences
from asapd.core.types import HOUR_US, MINUTE_US
from asapd.store.breaches import public
from asapd.store.units import BreachRow
from asapd.wire.keys import KeyFormatError, public_base64
from asapd.wire.statement import StatementMalformed, decode_statement, is_statement, sign_evidence
from asapd.wire.strict_json import parse_strict_json
from tests.actors.test_promises_day import declare
from tests.actors.test_watcher import T0, A, Host, event, hosted, watching
from tests.actors.test_watcher import make_template as make_template

KEY = SigningKey(b"k" * 32)
SLA = {"availability": "99.5%", "max_latency_p95_ms": 500, "max_error_rate": "1%"}


@pytest.fixture(name="host")
async def host_fixture(template: Path) -> AsyncIterator[Host]:
    with hosted(template, config.Sla()) as host:
        yield host


async def broken(host: Host) -> dict[str, BreachRow]:
    """One breach of each type, with maintenance in the window and a probe for every half minute."""
    await host.agent(sla=SLA)
    now_us = host.clock.now_us()
    await host.events(
        *(event(now_us - minute * MINUTE_US, 100 * minute, failed=minute % 4 == 0) for minute in range(6, 59))
    )
    async with watching(host) as watcher:
        await declare(watcher, now_us - 50 * MINUTE_US, now_us - 49 * MINUTE_US)
        for number in range(25):
            await host.probe(up=number < 10)
            await trio.sleep(30)
        await host.tasks(5, failed=True)
        await trio.sleep(12)
    rows = {row.breach_type: row for row in await host.breaches()}
    assert set(rows) == {"availability", "latency", "error_rate", "burn_rate"}
    return rows


def shown(row: BreachRow) -> dict[str, Any]:
    return {**public(row), "seq": 1}


async def test_each_breach_is_what_its_evidence_makes_of_it(autojump_clock: MockClock, host: Host) -> None:
    for kind, row in (await broken(host)).items():
        raw = sign_evidence(shown(row), row.evidence, KEY, T0)
        assert is_statement(parse_strict_json(raw))
        verdict = verify_evidence(raw, None)
        assert verdict.faults == [], kind
        assert f"{kind} breach {row.id} of {A}" in verdict.summary
        # Whoever prints it otherwise has changed nothing.
        assert (
            verify_evidence(json.dumps(json.loads(raw), indent=2).encode(), public_base64(bytes(KEY.verify_key))).faults
            == []
        )
        worked_out = json.loads(raw)["arithmetic"]
        assert worked_out["rule"]
        if kind != "burn_rate":
            assert float(worked_out["left"]) > float(worked_out["right"])


async def test_every_change_of_a_count_or_of_the_verdict_is_told(autojump_clock: MockClock, host: Host) -> None:
    rows = await broken(host)
    for kind, names in (
        ("availability", ("up_us", "down_us", "unknown_us", "excluded_us", "blind_us", "probes", "period_start_us")),
        ("latency", ("samples", "over_promise")),
        ("error_rate", ("tasks_failed", "tasks_completed")),
    ):
        row = rows[kind]
        for name in names:
            for by in (10**6, -(10**6)):
                changed = {**row.evidence, name: row.evidence[name] + by}
                assert differences(shown(row), changed), (kind, name)
        for name, value in (
            ("severity", "info"),
            ("threshold", "1%"),
            ("threshold_value", 1.5),
            ("actual", "2%"),
            ("actual_value", None),
            ("samples", 1),
            ("agent_id", "urn:asap:agent:b"),
            ("window", "30d"),
            ("detected_at", "2020-01-01T00:00:00.000000Z"),
            ("state", "resolved"),
            ("state", "over"),
            ("resolved_at", shown(row)["detected_at"]),
        ):
            found = differences({**shown(row), name: value}, row.evidence)
            assert found, name
            assert found[0].startswith(f"breach.{'state' if name == 'resolved_at' else name}")
        ended = {"state": "resolved", "resolve_reason": "recovered"}
        assert differences({**shown(row), **ended, "resolved_at": shown(row)["detected_at"]}, row.evidence) == []
        early = differences({**shown(row), **ended, "resolved_at": "2020-01-01T00:00:00Z"}, row.evidence)
        assert "before it was detected" in early[0]
        late = {**row.evidence, "window_us": 24 * HOUR_US}
        assert any("period: is" in one for one in differences({**shown(row), "window": "24h"}, late))
        end_us = row.evidence["period_end_us"]
        for part in ([end_us, end_us + 5, True], [end_us - 5, end_us - 9, True]):
            beyond = {**row.evidence, "segments": [*row.evidence["segments"], part]}
            assert any(one.startswith("segments: ") for one in differences(shown(row), beyond))
        assert any("min_samples" in one for one in differences(shown(row), {**row.evidence, "min_samples": -1}))
    row = rows["burn_rate"]
    for part in (row.evidence, row.evidence["burn"]["short"]):
        assert part["tasks_failed"] > 0
    fewer = copy.deepcopy(row.evidence)
    fewer["burn"]["short"].update(tasks_failed=0, down_us=0, up_us=fewer["burn"]["short"]["up_us"])
    assert differences(shown(row), fewer)
    other = copy.deepcopy(row.evidence)
    other["burn"]["factor"] = "2"
    assert any("no rule of factor 2" in one for one in differences(shown(row), other))


async def test_evidence_of_a_kept_promise_or_of_too_little_is_no_breach(autojump_clock: MockClock, host: Host) -> None:
    row = (await broken(host))["error_rate"]
    lenient = copy.deepcopy(row.evidence)
    lenient["promise"]["max_error_rate_percent"] = "90"
    assert any("promise is kept" in one for one in differences(shown(row), lenient))
    withdrawn = copy.deepcopy(row.evidence)
    withdrawn["promise"]["max_error_rate_percent"] = None
    assert any("has no term" in one for one in differences(shown(row), withdrawn))
    assert any("are needed" in one for one in differences(shown(row), {**row.evidence, "min_samples": 1000}))
    without = {**row.evidence, "segments": [], "segments_left_out": 5}
    assert differences(shown(row), without) == []
    negative = {**row.evidence, "tasks_completed": -1}
    assert any("negative" in one for one in differences(shown(row), negative))
    unpromised = copy.deepcopy(row.evidence)
    unpromised["promise"]["max_latency_p95_ms"] = None
    assert differences(shown(row), unpromised) == []


async def test_what_is_no_evidence_is_said_to_be_none(autojump_clock: MockClock, host: Host) -> None:
    rows = await broken(host)
    row = rows["latency"]
    for changed in (
        {},
        {**row.evidence, "segments": 5},
        {**row.evidence, "latency_buckets": [[-1, 1]]},
        {**row.evidence, "latency_buckets": [[1, 0]]},
        {**row.evidence, "promise": {**row.evidence["promise"], "availability_percent": "many"}},
    ):
        with pytest.raises(EvidenceError):
            differences(shown(row), changed)
    with pytest.raises(EvidenceError):
        arithmetic({"breach_type": "latency"})
    assert arithmetic({**row.evidence, "breach_type": "budget"}) == {}
    old = verify_evidence(sign_evidence(shown(row), {"samples": 20}, KEY, T0), None)
    assert [fault.split(":")[0] for fault in old.faults] == ["evidence"]


async def test_a_signature_is_by_the_key_that_is_named(autojump_clock: MockClock, host: Host) -> None:
    row = (await broken(host))["error_rate"]
    raw = sign_evidence(shown(row), row.evidence, KEY, T0)
    other = public_base64(bytes(SigningKey(b"o" * 32).verify_key))
    assert verify_evidence(raw, other).faults[0].startswith("signature: is not of the key given")
    changed = json.loads(raw)
    changed["breach"]["detected_at"] = "2020-01-01T00:00:00.000000Z"
    assert verify_evidence(canonical(changed), None).faults[0].startswith("signature: ")
    for name, value in (("issuer", "asapd/x"), ("key_id", "x"), ("arithmetic", {})):
        forged = {key: value for key, value in json.loads(raw).items() if key != "signature"} | {name: value}
        forged["signature"] = base64.b64encode(KEY.sign(canonical(forged)).signature).decode()
        assert [fault.split(":")[0] for fault in verify_evidence(canonical(forged), None).faults] == [name]
    with pytest.raises(KeyFormatError):
        verify_evidence(raw, "no key")
    for name, value in (("signature", "x"), ("public_key", "x"), ("breach", []), ("version", 2), ("signature", None)):
        document = {**json.loads(raw), name: value}
        with pytest.raises(StatementMalformed):
            decode_statement(canonical(document))
        assert verify_evidence(canonical(document), None).faults
    with pytest.raises(StatementMalformed):
        decode_statement(b"{")
    with pytest.raises(StatementMalformed):
        decode_statement(raw.replace(b'"version":1', b'"version":1,"x":"\\ud800"'))
    assert not is_statement([])


def test_evidence_of_a_budget_is_signed_and_counted() -> None:
    breach = {"id": "brc_1", "agent_id": None, "budget": "b", "breach_type": "budget", "samples": 3}
    evidence = {"limit": 5, "unit": "usd", "balance": {"events": 3}}
    assert verify_evidence(sign_evidence(breach, evidence, KEY, HOUR_US), None).faults == []
    assert verify_evidence(sign_evidence({**breach, "samples": 4}, evidence, KEY, HOUR_US), None).faults
    assert verify_evidence(sign_evidence(breach, {}, KEY, HOUR_US), None).faults
