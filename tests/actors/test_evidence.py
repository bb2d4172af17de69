"""Breaches that the watcher found are recomputed from their evidence alone, and every change of it is told."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trio
from nacl.signing import SigningKey
from trio.testing import MockClock

from asapd import config
from asapd.actors.agent_book import AgentBook
from asapd.actors.promises import HeldTo
from asapd.cli.verify_evidence import verify_evidence
from asapd.core import evidence
from asapd.core.canonical import canonical
from asapd.core.evidence import EvidenceError, arithmetic
from asapd.core.sla import Promise, evaluate
from asapd.core.types import HOUR_US, MINUTE_US, SECOND_US
from asapd.store.agents import ProbeFact
from asapd.store.breaches import public
from asapd.store.units.alerts import BreachRow
from asapd.wire.hours import read_support_hours
from asapd.wire.keys import KeyFormatError, public_base64
from asapd.wire.statement import StatementMalformed, decode_statement, is_statement, sign_evidence
from asapd.wire.strict_json import parse_strict_json
from tests.actors.test_promises_day import declare
from tests.actors.test_watcher import T0, A, Host, event, hosted, listed, watching
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


def differences(breach: dict[str, Any], held: dict[str, Any]) -> list[str]:
    return evidence.differences(breach, held, read_support_hours)


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
        ended = {"state": "resolved", "resolve_reason": "recovered", "duration_seconds": 0}
        over = {**shown(row), **ended, "resolved_at": shown(row)["detected_at"]}
        assert differences(over, row.evidence) == []
        early = differences({**over, "resolved_at": "2020-01-01T00:00:00Z"}, row.evidence)
        assert "before it was detected" in early[0]
        for name, value in (("duration_seconds", 1), ("duration_seconds", None), ("resolve_reason", "luck")):
            assert differences({**over, name: value}, row.evidence), name
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
    apart = copy.deepcopy(row.evidence)
    apart["burn"]["short"]["blind"] = [[row.evidence["period_end_us"] - 5, row.evidence["period_end_us"]]]
    assert any("burn.short.blind: are not those" in one for one in differences(shown(row), apart))
    other = copy.deepcopy(row.evidence)
    other["burn"]["factor"] = "2"
    assert any("no rule of factor 2" in one for one in differences(shown(row), other))


# Whose word they are, whatever is computed; and a promise that another type of breach would be of.
ON_TRUST = {"min_samples", "hold_us", "usage_seq", "probe_seq", "task_outcome_seq", "max_latency_p95_ms"}


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*at, key))
    elif type(value) is int:
        yield at


async def test_no_number_of_evidence_can_be_another(autojump_clock: MockClock, host: Host) -> None:
    """Nor can an element of a list be left out: of segments, steps, buckets, exclusions."""
    for kind, row in (await broken(host)).items():
        assert differences(shown(row), row.evidence) == []
        for at in leaves(row.evidence):
            if at[-1] in ON_TRUST:
                continue
            changed = copy.deepcopy(row.evidence)
            place: Any = changed
            for key in at[:-1]:
                place = place[key]
            place[at[-1]] += 1
            told = refused(row, changed)
            # A latency in the bucket next to its own makes the same verdict.
            assert told or (at[-3:-2] == ("latency_buckets",) and at[-1] == 0), (kind, at)
        for name in ("segments", "steps", "latency_buckets", "excluded", "maintenance", "support_hours"):
            for number in range(len(row.evidence[name])):
                fewer = copy.deepcopy(row.evidence)
                del fewer[name][number]
                assert refused(row, fewer), (kind, name, number)


# What may as well be so: nobody acknowledged it, or somebody else; hours that nobody understands are all; no such term.
AS_GOOD = (
    ("acknowledged", None),
    ("by", "x"),
    ("comment", "x"),
    ("manifest_digest", None),
    ("support_hours.0.1", "x"),
    ("availability_percent", None),
    ("max_error_rate_percent", None),
    ("max_latency_p95_ms", None),
)
OTHERS = (None, "x", True, 1.5, [], {}, [1], -1)


def members(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a document, of lists the first."""
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else (0,):
            yield (*at, key)
            yield from members(value[key], (*at, key))


def signed_again(document: dict[str, Any]) -> bytes:
    document = {name: member for name, member in document.items() if name != "signature"}
    return canonical({**document, "signature": base64.b64encode(KEY.sign(canonical(document)).signature).decode()})


async def test_nothing_of_a_statement_can_be_of_another_kind_left_out_or_added(
    autojump_clock: MockClock, host: Host
) -> None:
    rows = await broken(host)
    for kind, row in (("availability", rows["availability"]), ("burn_rate", rows["burn_rate"])):
        acknowledged = {"at": "2027-01-15T08:00:00.000000Z", "by": "olga", "comment": None}
        told = {**shown(row), "acknowledged": acknowledged}
        whole = json.loads(sign_evidence(told, row.evidence, KEY, T0))
        assert verify_evidence(canonical(whole), None).faults == []
        for at in members(whole):
            if at[0] == "signature":
                continue
            dotted, changed = ".".join(map(str, at[1:])), copy.deepcopy(whole)
            place: Any = changed
            for key in at[:-1]:
                place = place[key]
            was = place[at[-1]]
            for other in OTHERS:
                if type(other) is type(was) and other == was:
                    continue
                place[at[-1]] = other
                if not any(dotted.endswith(name) and other == value for name, value in AS_GOOD):
                    assert verify_evidence(signed_again(changed), None).faults, (kind, at, other)
            if isinstance(place, dict):
                del place[at[-1]]
                if at[-1] != "acknowledged":
                    assert verify_evidence(signed_again(changed), None).faults, (kind, at)
                place |= {at[-1]: was, "extra": 1}
                assert verify_evidence(signed_again(changed), None).faults, (kind, at, "extra")


def refused(row: BreachRow, held: dict[str, Any]) -> bool:
    try:
        return bool(differences(shown(row), held))
    except EvidenceError:
        return True


async def test_what_escalated_was_a_warning_before_by_the_evidence_of_then(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(sla={"max_error_rate": "10%", "support_hours": "Mon-Sun 00:00-24:00"})
    async with watching(host):
        await host.tasks(17)
        await host.tasks(3, failed=True)
        await trio.sleep(5)
        await host.tasks(10, failed=True)
        await trio.sleep(5)
    (row,) = await host.breaches()
    assert row.severity == "critical"
    assert differences(shown(row), row.evidence) == []
    for name, value in (("tasks_failed", 4), ("judged_us", 0), ("agent_id", "x"), ("steps", []), ("min_samples", 21)):
        changed = copy.deepcopy(row.evidence)
        changed["opened_with"][name] = value
        assert differences(shown(row), changed), name
    changed = copy.deepcopy(row.evidence)
    changed["opened_with"]["promise"]["max_error_rate_percent"] = "5"
    assert any("critical" in one or "warning" in one for one in differences(shown(row), changed))
    changed["opened_with"]["promise"]["max_error_rate_percent"] = None
    assert any("opened_with: promise" in one for one in differences(shown(row), changed))
    later = copy.deepcopy(row.evidence)
    later["opened_with"]["period_end_us"] += 2 * HOUR_US
    assert any("after that of the escalation" in one for one in differences(shown(row), later))


async def test_evidence_says_what_is_not_computed_from_it(autojump_clock: MockClock, host: Host) -> None:
    row = (await broken(host))["availability"]
    said = verify_evidence(sign_evidence(shown(row), row.evidence, KEY, T0), None).on_trust
    assert len(said) == 1
    assert f"{row.evidence['probes']} probes were counted is asapd's word" in said[0]
    later = {"form", "steps", "maintenance", "untimed", "judged_us", "segments_before"}
    old = {name: part for name, part in row.evidence.items() if name not in later}
    old |= {"hold_us": 60_000_000, "segments_left_out": 3}
    assert differences(shown(row), old) != []
    full = [[at, at + 1, bool(at % 2)] for at in range(old["period_end_us"] - 1000, old["period_end_us"])]
    left_out = {**old, "segments": full, "excluded_us": 0, "excluded": [], "blind": [], "blind_us": 0}
    left_out["unknown_us"] = left_out["period_end_us"] - left_out["period_start_us"] - old["up_us"] - old["down_us"]
    assert differences(shown(row), left_out) == []
    said = verify_evidence(sign_evidence(shown(row), left_out, KEY, T0), None).on_trust
    assert [word in one for word, one in zip(("counted", "earlier asapd", "left out", "60 s"), said, strict=True)] == [
        True
    ] * 4


AFTERWARDS = {"form", "steps", "maintenance", "support_hours", "untimed", "judged_us", "segments_before", "opened_with"}
NOTHING: dict[str, Any] = {"excluded_us": 0, "blind_us": 0, "excluded": [], "blind": []}


def aged(held: dict[str, Any]) -> dict[str, Any]:
    """Evidence as it was before time could be excluded or blind."""
    assert (held["excluded_us"], held["blind_us"]) == (0, 0)
    return {name: part for name, part in held.items() if name not in {*AFTERWARDS, *NOTHING}}


async def test_evidence_from_before_time_could_be_excluded_is_computed_without_any(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(sla={"max_error_rate": "10%"})
    async with watching(host):
        await host.tasks(17)
        await host.tasks(3, failed=True)
        await trio.sleep(5)
        (opened,) = await host.breaches()
        await host.tasks(10, failed=True)
        await trio.sleep(5)
    old = aged(opened.evidence)
    verdict = verify_evidence(sign_evidence(shown(opened), old, KEY, T0), None)
    assert verdict.faults == []
    assert verdict.on_trust[-1] == "time that does not count was not known to the asapd of then: none was left out"
    assert differences(shown(opened), {**old, "unknown_us": old["unknown_us"] + 1})
    assert differences(shown(opened), {**old, "tasks_failed": 2})
    # Nobody gets rid of one of them alone, nor of evidence of today.
    for name in NOTHING:
        assert refused(opened, {**old, name: opened.evidence[name]})
        assert refused(opened, {part: held for part, held in opened.evidence.items() if part != name})
    assert refused(opened, {name: part for name, part in opened.evidence.items() if name not in NOTHING})
    (row,) = await host.breaches()
    assert row.severity == "critical"
    assert differences(shown(row), {**row.evidence, "opened_with": old}) == []
    assert differences(shown(row), {**row.evidence, "opened_with": {**old, "unknown_us": 4}})
    # What escalated then kept what it opened with.
    (told,) = differences(shown(row), old)
    assert "an earlier asapd" in told
    assert "this one cannot compute it" in told
    told, *others = differences(shown(row), {**old, "over_promise": 1})
    assert "an earlier asapd" in told
    assert [one.partition(":")[0] for one in others] == ["over_promise"]


async def test_windows_that_had_other_steps_are_said_to_be_of_an_earlier_asapd(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(sla={"max_error_rate": "10%"})
    async with watching(host):
        await host.tasks(17)
        await host.tasks(3, failed=True)
        await trio.sleep(5)
    (row,) = await host.breaches()
    window_us, end_us = 5 * MINUTE_US, row.evidence["period_end_us"]
    old = {**aged(row.evidence), "window_us": window_us, "unknown_us": window_us - SECOND_US // 2}
    old["period_start_us"] = end_us - old["unknown_us"]
    (told,) = differences({**shown(row), "window": "5m"}, old)
    assert told.startswith("period: is as an earlier asapd made it")
    assert "this one cannot compute it" in told
    assert differences({**shown(row), "window": "5m"}, {**old, **NOTHING})[0].startswith("period: is 2")


def test_stretches_that_are_left_out_are_bound_by_their_sums_and_a_digest() -> None:
    book = AgentBook(listed(), HeldTo(Promise(Decimal(99))), [HOUR_US], T0)
    for number in range(1500):
        book.add_probe(ProbeFact(number, A, T0 + number * SECOND_US, number % 2 == 0, 90 * SECOND_US))
    book.advance(T0 + 1500 * SECOND_US)
    held = {**book.evidence(HOUR_US), "breach_type": "availability", "min_samples": 20, "hold_us": 0}
    held |= {"usage_seq": 0, "task_outcome_seq": 0, "probe_seq": 1500}
    (verdict,) = evaluate(book.metrics(HOUR_US), book.held_to.promise)
    assert (verdict.met, len(held["segments"]), held["segments_left_out"]) == (False, 1000, 500)
    row = BreachRow(
        id="b",
        agent_id=A,
        breach_type="availability",
        window_us=HOUR_US,
        threshold=verdict.threshold_text,
        threshold_value=99.0,
        actual=verdict.actual_text,
        actual_value=float(verdict.actual or 0),
        severity="critical",
        state="open",
        detected_at_us=T0 + 1500 * SECOND_US,
        samples=verdict.samples,
        tenant="default",
        evidence=held,
    )
    assert differences(shown(row), held) == []
    before = held["segments_before"]
    assert before["up_us"] == before["down_us"] == 250 * SECOND_US
    for part in (
        None,
        {**before, "up_us": before["up_us"] + 1},
        {**before, "down_us": -1},
        {**before, "until_us": before["until_us"] - 1},
    ):
        assert differences(shown(row), {**held, "segments_before": part})
    over = 10 * HOUR_US
    more = {**held, "segments_before": {**before, "up_us": before["up_us"] + over}, "up_us": held["up_us"] + over}
    assert any(
        "can lie before" in one for one in differences(shown(row), {**more, "unknown_us": held["unknown_us"] - over})
    )
    assert differences(shown(row), {**held, "segments": held["segments"][1:], "segments_left_out": 501})


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
    assert any(one.startswith("segments: 5 are left out") for one in differences(shown(row), without))
    negative = {**row.evidence, "tasks_completed": -1}
    assert any("negative" in one for one in differences(shown(row), negative))
    negative_step = copy.deepcopy(row.evidence)
    negative_step["steps"][0][1] = -1
    assert any("steps: a count is negative" in one for one in differences(shown(row), negative_step))
    unpromised = copy.deepcopy(row.evidence)
    unpromised["promise"]["max_latency_p95_ms"] = None
    assert any(one.startswith("over_promise") for one in differences(shown(row), unpromised))


async def test_what_was_counted_has_its_rows_and_what_was_promised_its_manifest(
    autojump_clock: MockClock, host: Host
) -> None:
    row = (await broken(host))["availability"]
    hours = row.evidence["support_hours"]
    for change, said in (
        ({"usage_seq": 0, "task_outcome_seq": 0}, "usage_seq: there are 0 rows"),
        ({"probe_seq": 0}, "probe_seq: there are 0 rows"),
        ({"promise_source": "manifest", "manifest_digest": None}, "manifest_digest: is of none"),
        ({"support_hours": [[row.evidence["period_end_us"], None]]}, "support_hours: do not follow"),
        ({"support_hours": [[row.evidence["period_start_us"], None], *hours]}, "support_hours: do not follow"),
        ({"support_hours": [[None, None], *hours]}, "support_hours: do not follow"),
    ):
        told = differences(shown(row), {**row.evidence, **change})
        assert any(one.startswith(said) for one in told), (change, told)


async def test_what_is_no_evidence_is_said_to_be_none(autojump_clock: MockClock, host: Host) -> None:
    rows = await broken(host)
    row = rows["latency"]
    for changed in (
        {},
        {**row.evidence, "segments": 5},
        {**row.evidence, "segments": [[row.evidence["period_start_us"], row.evidence["period_end_us"], 2]]},
        {**row.evidence, "window_us": 31 * 24 * HOUR_US},
        {**row.evidence, "window_us": 0},
        {**row.evidence, "period_end_us": 10**40, "period_start_us": "x"},
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


async def test_a_period_that_is_made_up_keeps_nobody_busy(autojump_clock: MockClock, host: Host) -> None:
    row = (await broken(host))["latency"]
    far = {**row.evidence, "period_start_us": 0, "support_hours": [[None, "business Europe/Berlin"]]}
    assert any(one.startswith("period: is") for one in differences(shown(row), far))


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


async def test_evidence_that_is_not_of_its_form_is_a_fault_and_no_crash(autojump_clock: MockClock, host: Host) -> None:
    row = (await broken(host))["availability"]
    for name in ("hold_us", "segments_left_out", "tasks_completed", "probes"):
        said = verify_evidence(sign_evidence(shown(row), {**row.evidence, name: "5"}, KEY, T0), None)
        assert said.faults, name
